#include "composite/objective.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/library.h>

namespace fastelbo::composite {
namespace {

// The sum of two gradients, either of which may be absent.
Tensor plus(const Tensor& a, const Tensor& b) { return !a.defined() ? b : !b.defined() ? a : a + b; }

// The sum of t [B], the same for any number of threads: torch splits a sum to one number among them, not one of rows.
Tensor ordered_sum(const Tensor& t) {
  constexpr int64_t kRow = 4096;
  if (at::isTensorSubclassLike(t) || t.numel() <= kRow) return t.sum();
  const int64_t rows = t.numel() / kRow;
  return t.narrow(0, 0, rows * kRow).view({rows, kRow}).sum(1).sum() + t.narrow(0, rows * kRow, t.numel() % kRow).sum();
}

// Upstream gradients [B] of the loss of every datum.
Tensor per_datum(const Tensor& grad_loss, std::string_view reduction, c10::SymInt B) {
  if (reduction == "none") return grad_loss;
  const Tensor g = reduction == "mean" ? grad_loss.div(at::Scalar(B)) : grad_loss;
  return g.expand_symint({B});
}

LikelihoodGrads log_prob_backward(const Tensor& rows, const LikelihoodInputs& in, std::array<bool, 4> needs) {
  if (!rows.defined() || !(needs[0] || needs[1] || needs[2] || needs[3])) return {};
  auto [recon, x, second, third] = ops::log_prob_backward(rows, in.recon, in.x, optional(in.second), optional(in.third),
                                                          optional(in.mask), in.likelihood, needs);
  return {recon, x, second, third};
}

}  // namespace

// d loss_b = -mean_k d log p_kb + beta d KL_b, plus the upstream gradients of the parts.
ElboGrads elbo_loss_backward(const Tensor& grad_loss, const Tensor& grad_log_likelihood, const Tensor& grad_kl,
                             const ElboInputs& in, const ElboNeeds& needs) {
  const Tensor &recon = in.fit.recon, &x = in.fit.x;
  ElboGrads result;
  Tensor datum, rows, penalty;  // upstream gradients: [B] of the loss, [K?, B] of log p, [B] of beta's KL
  if (grad_loss.defined()) {
    datum = per_datum(grad_loss, in.reduction, x.sym_size(0));
    rows = -datum;
    if (recon.dim() > x.dim()) {
      rows = rows.div(at::Scalar(recon.sym_size(0))).expand_symint({recon.sym_size(0), x.sym_size(0)});
    }
    penalty = in.beta_tensor.defined() ? datum * in.beta_tensor.to(datum.scalar_type()) : datum * in.beta;
  }
  result.fit = log_prob_backward(plus(rows, grad_log_likelihood), in.fit, needs.fit);
  const auto add_kl = [&](const Tensor& grad, double free_bits) {
    if (!grad.defined()) return;
    const auto [mu, logvar, prior_mu, prior_logvar] = ops::gaussian_kl_backward(
        grad, in.mu, in.logvar, optional(in.prior_mu), optional(in.prior_logvar), free_bits, needs.latent);
    result.mu = plus(result.mu, mu), result.logvar = plus(result.logvar, logvar);
    result.prior_mu = plus(result.prior_mu, prior_mu);
    result.prior_logvar = plus(result.prior_logvar, prior_logvar);
  };
  if (needs.latent[0] || needs.latent[1] || needs.latent[2] || needs.latent[3]) {
    if (in.free_bits > 0) {
      add_kl(penalty, in.free_bits), add_kl(grad_kl, 0.0);
    } else {
      add_kl(plus(penalty, grad_kl), 0.0);
    }
  }
  if (needs.beta && datum.defined()) {
    const bool again = in.free_bits > 0 || !in.kl.defined() || at::GradMode::is_enabled();
    const Tensor kl =
        again ? ops::gaussian_kl(in.mu, in.logvar, optional(in.prior_mu), optional(in.prior_logvar), in.free_bits)
              : in.kl;
    result.beta = ordered_sum(datum * kl).to(in.beta_tensor.scalar_type());
  }
  return result;
}

// What reaches the decoder, and what the encoder, is the estimator's choice: math/estimator.h.
MultiSampleGrads multi_sample_loss_backward(const Tensor& grad_loss, const Tensor& grad_log_likelihood,
                                            const MultiSampleInputs& in, const MultiSampleNeeds& needs) {
  const LikelihoodInputs& fit = in.fit;
  MultiSampleGrads result;
  Tensor rows;  // upstream gradients [K, B] of log p
  if (grad_loss.defined()) {
    const bool again = !in.log_likelihood.defined() || at::GradMode::is_enabled();
    const Tensor log_p = again ? ops::log_prob(fit.recon, fit.x, optional(fit.second), optional(fit.third),
                                               optional(fit.mask), fit.likelihood)
                               : in.log_likelihood;
    const Tensor log_w = log_p + in.log_ratio.to(log_p.scalar_type());
    const auto [bound, weights, gates] = ops::multi_sample_weights(log_w, in.estimator);
    rows = weights * -per_datum(grad_loss, in.reduction, fit.x.sym_size(0));
    if (needs.log_ratio) result.log_ratio = rows.to(in.log_ratio.scalar_type());
    if (needs.gates) result.gates = gates.to(in.gates.scalar_type());
  }
  result.fit = log_prob_backward(plus(rows, grad_log_likelihood), fit, needs.fit);
  return result;
}

namespace {

// The losses as they are without gradients: their forward ops, asked for none.
ElboLoss elbo_loss(const Tensor& recon, const Tensor& x, const Tensor& mu, const Tensor& logvar,
                   const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar, const OptionalTensor& second,
                   const OptionalTensor& third, const OptionalTensor& mask, double beta,
                   const OptionalTensor& beta_tensor, double free_bits, std::string_view likelihood,
                   std::string_view reduction) {
  const auto out = ops::elbo_loss_forward(recon, x, mu, logvar, prior_mu, prior_logvar, second, third, mask, beta,
                                          beta_tensor, free_bits, likelihood, reduction, {});
  return {std::get<0>(out), std::get<1>(out), std::get<2>(out)};
}

MultiSampleLoss multi_sample_loss(const Tensor& recon, const Tensor& x, const Tensor& log_ratio,
                                  const OptionalTensor& gates, const OptionalTensor& second,
                                  const OptionalTensor& third, const OptionalTensor& mask, std::string_view likelihood,
                                  at::ArrayRef<double> estimator, std::string_view reduction) {
  const auto out = ops::multi_sample_loss_forward(recon, x, log_ratio, gates, second, third, mask, likelihood,
                                                  estimator, reduction, {});
  return {std::get<0>(out), std::get<1>(out)};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastelbo, CompositeExplicitAutograd, m) {
  m.impl("elbo_loss", elbo_loss);
  m.impl("multi_sample_loss", multi_sample_loss);
}

}  // namespace fastelbo::composite
