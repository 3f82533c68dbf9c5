#include "composite/objective.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/library.h>

#include "prepare/shapes.h"

namespace fastelbo::composite {
namespace {

// The sum of two gradients, either of which may be absent.
Tensor plus(const Tensor& a, const Tensor& b) { return !a.defined() ? b : !b.defined() ? a : a + b; }

// The gradient of a number, from those that every datum gives it [B].
Tensor of_number(const Tensor& grads, const OptionalTensor& number) {
  const bool traced = at::GradMode::is_enabled() || at::isTensorSubclassLike(grads);  // sum_to has no derivative
  return (traced ? grads.sum() : shapes::sum_to(grads, {})).to(number->options());
}

// Upstream gradients [B] of the loss of every datum.
Tensor per_datum(const Tensor& grad_loss, std::string_view reduction, c10::SymInt B) {
  if (reduction == "none") return grad_loss;
  const Tensor g = reduction == "mean" ? grad_loss.div(at::Scalar(B)) : grad_loss;
  return g.expand_symint({B});
}

template <class Inputs>
FitGrads log_prob_backward(const Tensor& rows, const Inputs& in, const FitNeeds& needs) {
  if (!rows.defined() || needs == FitNeeds{}) return {};
  const auto found = ops::log_prob_backward(rows, in.parameters, in.x, in.mask, in.likelihood, needs);
  return {some_of<kMaxParameters>(found), std::get<kMaxParameters>(found)};
}

}  // namespace

// d loss_b = -mean_k d log p_kb + beta d KL_b, plus the upstream gradients of the parts.
ElboGrads elbo_loss_backward(const Tensor& grad_loss, const Tensor& grad_log_likelihood, const Tensor& grad_kl,
                             const ElboInputs& in, const FitNeeds& fit, const std::array<bool, 4>& latents, bool beta,
                             const Tensor& kl) {
  const Tensor &recon = in.parameters[0], &x = in.x;
  Tensor datum, rows, penalty;  // upstream gradients: [B] of the loss, [K?, B] of log p, [B] of beta's KL
  if (grad_loss.defined()) {
    datum = per_datum(grad_loss, in.reduction, x.sym_size(0));
    rows = -datum;
    if (recon.dim() > x.dim()) {
      rows = rows.div(at::Scalar(recon.sym_size(0))).expand_symint({recon.sym_size(0), x.sym_size(0)});
    }
    penalty = in.beta.has_value() ? datum * in.beta->to(datum.scalar_type()) : datum;
  }
  ElboGrads result{log_prob_backward(plus(rows, grad_log_likelihood), in, fit)};
  // the two gradients of a half type's prior, which may be sums over data, are rounded once
  const auto wide = [&](const OptionalTensor& t) {
    return t.has_value() ? OptionalTensor(t->to(checks::compute_type(*t))) : t;
  };
  const OptionalTensor prior_mu = wide(in.prior_mu), prior_logvar = wide(in.prior_logvar);
  const auto add_kl = [&](const Tensor& grad, const OptionalTensor& free_bits) {
    if (!grad.defined() || latents == std::array<bool, 4>{}) return;
    const auto found =
        some_of<4>(ops::gaussian_kl_backward(grad, in.mu, in.logvar, prior_mu, prior_logvar, free_bits, latents));
    for (size_t i = 0; i < 4; ++i) result.latents[i] = plus(result.latents[i], found[i]);
  };
  if (in.free_bits.has_value()) {
    add_kl(penalty, in.free_bits), add_kl(grad_kl, {});
  } else {
    add_kl(plus(penalty, grad_kl), {});
  }
  if (result.latents[2].defined()) result.latents[2] = result.latents[2].to(in.prior_mu->scalar_type());
  if (result.latents[3].defined()) result.latents[3] = result.latents[3].to(in.prior_logvar->scalar_type());
  if (beta && datum.defined()) {
    const bool again = in.free_bits.has_value() || !kl.defined() || at::GradMode::is_enabled();
    const Tensor weighted = again ? ops::gaussian_kl(in.mu, in.logvar, in.prior_mu, in.prior_logvar, in.free_bits) : kl;
    result.beta = of_number(datum * weighted, in.beta);
  }
  return result;
}

BoundGrads minus_bound_backward(const Tensor& grad, const Tensor& log_w, const OptionalTensor& gates,
                                const OptionalTensor& elbo_weight, const OptionalTensor& alpha, int64_t groups,
                                at::ArrayRef<double> coefficients, const std::array<bool, 4>& needs,
                                const Tensor& weights, const Tensor& factors) {
  const bool of_numbers = needs[2] || needs[3];
  Tensor a = weights, of_gates = factors, slopes;
  if (!a.defined() || of_numbers || at::GradMode::is_enabled()) {
    std::tie(std::ignore, a, of_gates, slopes) =
        ops::multi_sample_weights(log_w, elbo_weight, alpha, groups, coefficients, of_numbers);
  }
  BoundGrads result;
  result.log_w = a * grad.neg();  // [K, B]
  if (needs[1]) result.gates = of_gates.to(gates->scalar_type());
  if (needs[2]) result.elbo_weight = of_number(slopes.select(0, 0) * grad.neg(), elbo_weight);
  if (needs[3]) result.alpha = of_number(slopes.select(0, 1) * grad.neg(), alpha);
  return result;
}

// What reaches the decoder, and what the encoder, is the estimator's choice: math/estimator.h.
MultiSampleGrads multi_sample_loss_backward(const Tensor& grad_loss, const Tensor& grad_log_likelihood,
                                            const MultiSampleInputs& in, const FitNeeds& fit,
                                            const std::array<bool, 4>& bound, const Tensor& log_likelihood) {
  MultiSampleGrads result;
  Tensor rows;  // upstream gradients [K, B] of log p
  if (grad_loss.defined()) {
    const bool again = !log_likelihood.defined() || at::GradMode::is_enabled();
    const Tensor log_p = again ? ops::log_prob(in.parameters, in.x, in.mask, in.likelihood) : log_likelihood;
    result.bound = minus_bound_backward(per_datum(grad_loss, in.reduction, in.x.sym_size(0)),
                                        log_p + in.log_ratio.to(log_p.scalar_type()), in.gates, in.elbo_weight,
                                        in.alpha, in.groups, in.coefficients, bound);
    rows = result.bound.log_w;
    result.bound.log_w = bound[0] ? rows.to(in.log_ratio.scalar_type()) : Tensor();
  }
  static_cast<FitGrads&>(result) = log_prob_backward(plus(rows, grad_log_likelihood), in, fit);
  return result;
}

namespace {

Tensor minus_bound(const Tensor& log_w, const OptionalTensor& gates, const OptionalTensor& elbo_weight,
                   const OptionalTensor& alpha, int64_t groups, at::ArrayRef<double> coefficients) {
  checks::gates(gates, log_w);
  return std::get<0>(ops::multi_sample_weights(log_w, elbo_weight, alpha, groups, coefficients, false)).neg();
}

}  // namespace

TORCH_LIBRARY_IMPL(fastelbo, CompositeExplicitAutograd, m) { m.impl("minus_bound", minus_bound); }

}  // namespace fastelbo::composite
