// Autograd of the objectives.
//
// A loss that is reduced to a scalar has its gradient computed in the forward, while each row is in the cache; the
// backward multiplies it by the upstream gradient, which is mostly 1. Everything else (reduction "none", half types,
// gradients of the returned parts, a graph of the gradient, a gradient for x) is put together in the backward from the
// backward ops of the likelihood and of the KL.
#include <torch/library.h>

#include "autograd/common.h"

namespace fastelbo::autograd {
namespace {

struct LogMeanExp : public Function<LogMeanExp> {
  static Tensor forward(AutogradContext* ctx, const Tensor& log_w, int64_t dim) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({log_w});
    ctx->saved_data["dim"] = dim;
    return ops::log_mean_exp(log_w, dim);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    BelowAutogradUnlessGraph guard;
    return {ops::log_mean_exp_backward(grads[0], ctx->get_saved_variables()[0], ctx->saved_data["dim"].toInt()),
            Tensor()};
  }
};

Tensor log_mean_exp_autograd(const Tensor& log_w, int64_t dim) { return LogMeanExp::apply(log_w, dim); }

// The sum of two gradients, either of which may be absent.
Tensor plus(const Tensor& a, const Tensor& b) { return !a.defined() ? b : !b.defined() ? a : a + b; }

// The sum of t [B], the same for any number of threads: torch splits a sum to one number among them, not one of rows.
Tensor ordered_sum(const Tensor& t) {
  constexpr int64_t kRow = 4096;
  if (at::isTensorSubclassLike(t) || t.numel() <= kRow) return t.sum();
  const int64_t rows = t.numel() / kRow;
  return t.narrow(0, 0, rows * kRow).view({rows, kRow}).sum(1).sum() + t.narrow(0, rows * kRow, t.numel() % kRow).sum();
}

struct ElboLoss : public Function<ElboLoss> {
  enum { kRecon, kX, kMu, kLogvar, kScale, kBeta, kMask, kKl, kInputs };
  static constexpr int kArguments = 11;

  static variable_list forward(AutogradContext* ctx, const Tensor& recon, const Tensor& x, const Tensor& mu,
                               const Tensor& logvar, const OptionalTensor& scale, const OptionalTensor& beta_tensor,
                               const OptionalTensor& mask, double beta, double free_bits, std::string_view likelihood,
                               std::string_view reduction) {
    const bool fused = reduction != "none" && !wants_grad(x) && !wants_grad(beta_tensor) && keeps_precision(recon) &&
                       keeps_precision(mu) && keeps_precision(logvar) && keeps_precision(scale);
    std::array<bool, 4> wanted{};
    if (fused) wanted = {wants_grad(recon), wants_grad(mu), wants_grad(logvar), wants_grad(scale)};
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, log_likelihood, kl, grads] = ops::elbo_loss_forward(
        recon, x, mu, logvar, scale, mask, beta, beta_tensor, free_bits, likelihood, reduction, wanted);
    ctx->set_materialize_grads(false);
    // an output is saved only where the backward may need it: its owner may change it in place
    const Tensor kept = wants_grad(beta_tensor) ? kl : Tensor();
    variable_list saved{recon, x, mu, logvar, tensor(scale), tensor(beta_tensor), tensor(mask), kept};
    for (auto& g : grads) saved.push_back(g);
    save(ctx, std::move(saved));
    ctx->saved_data["options"] = std::tuple<double, double, std::string, std::string>(
        beta, free_bits, std::string(likelihood), std::string(reduction));
    ctx->saved_data["fused"] = fused ? wanted[0] + 2 * wanted[1] + 4 * wanted[2] + 8 * wanted[3] : int64_t(0);
    return {loss, log_likelihood, kl};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    variable_list result(kArguments);
    const int64_t fused = ctx->saved_data["fused"].toInt();
    if (fused && !grads[1].defined() && !grads[2].defined() && !at::GradMode::is_enabled()) {
      if (!grads[0].defined()) return result;
      scale_saved(saved, kInputs, grads[0], fused, owns_saved(ctx), {kRecon, kMu, kLogvar, kScale}, result);
      return result;
    }
    return compose(ctx, saved, grads);
  }

  // d loss_b = -mean_k d log p_kb + beta d KL_b, plus the upstream gradients of the parts.
  static variable_list compose(AutogradContext* ctx, const variable_list& saved, const variable_list& grads) {
    variable_list result(kArguments);
    const auto needed =
        needs<6>(ctx, {saved[kRecon], saved[kX], saved[kMu], saved[kLogvar], saved[kScale], saved[kBeta]});
    const auto& options = ctx->saved_data["options"].toTupleRef().elements();
    const double beta = options[0].toDouble(), free_bits = options[1].toDouble();
    const auto likelihood = options[2].toStringView(), reduction = options[3].toStringView();
    const Tensor &recon = saved[kRecon], &x = saved[kX], &mu = saved[kMu], &logvar = saved[kLogvar];
    const bool sampled = recon.dim() > x.dim();
    Tensor datum, rows, charged;  // upstream gradients: [B] of the loss, [K?, B] of log p, [B] of the loss's KL
    if (grads[0].defined()) {
      datum = per_datum(grads[0], reduction, x.sym_size(0));
      rows = sampled ? (-datum).div(at::Scalar(recon.sym_size(0))).expand_symint({recon.sym_size(0), x.sym_size(0)})
                     : -datum;
      charged = saved[kBeta].defined() ? datum * saved[kBeta].to(datum.scalar_type()) : datum * beta;
    }
    BelowAutogradUnlessGraph guard;
    rows = plus(rows, grads[1]);
    if (rows.defined() && (needed[0] || needed[1] || needed[4])) {
      const std::array<bool, 3> wanted{needed[0], needed[1], needed[4]};
      auto found = spread(
          ops::log_prob_backward(rows, recon, x, optional(saved[kScale]), optional(saved[kMask]), likelihood, wanted),
          wanted);
      result[kRecon] = found[0], result[kX] = found[1], result[kScale] = found[2];
    }
    if (needed[2] || needed[3]) {
      const std::array<bool, 4> wanted{needed[2], needed[3], false, false};
      const auto add = [&](const Tensor& grad, double bits) {
        if (!grad.defined()) return;
        auto found =
            spread(ops::gaussian_kl_backward(grad, mu, logvar, std::nullopt, std::nullopt, bits, wanted), wanted);
        result[kMu] = plus(result[kMu], found[0]), result[kLogvar] = plus(result[kLogvar], found[1]);
      };
      if (free_bits > 0) {
        add(charged, free_bits), add(grads[2], 0.0);
      } else {
        add(plus(charged, grads[2]), 0.0);
      }
    }
    if (needed[5] && datum.defined()) {
      const bool again = free_bits > 0 || at::GradMode::is_enabled();
      const Tensor kl = again ? ops::gaussian_kl(mu, logvar, std::nullopt, std::nullopt, free_bits) : saved[kKl];
      result[kBeta] = ordered_sum(datum * kl).to(saved[kBeta].scalar_type());
    }
    return result;
  }
};

// The loss without gradients, on any device: its forward op, asked for none.
std::tuple<Tensor, Tensor, Tensor> elbo_loss_value(const Tensor& recon, const Tensor& x, const Tensor& mu,
                                                   const Tensor& logvar, const OptionalTensor& scale,
                                                   const OptionalTensor& mask, double beta,
                                                   const OptionalTensor& beta_tensor, double free_bits,
                                                   std::string_view likelihood, std::string_view reduction) {
  auto [loss, log_likelihood, kl, grads] = ops::elbo_loss_forward(recon, x, mu, logvar, scale, mask, beta, beta_tensor,
                                                                  free_bits, likelihood, reduction, {});
  return {loss, log_likelihood, kl};
}

std::tuple<Tensor, Tensor, Tensor> elbo_loss_autograd(const Tensor& recon, const Tensor& x, const Tensor& mu,
                                                      const Tensor& logvar, const OptionalTensor& scale,
                                                      const OptionalTensor& mask, double beta,
                                                      const OptionalTensor& beta_tensor, double free_bits,
                                                      std::string_view likelihood, std::string_view reduction) {
  if (!at::GradMode::is_enabled()) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return elbo_loss_value(recon, x, mu, logvar, scale, mask, beta, beta_tensor, free_bits, likelihood, reduction);
  }
  auto out = ElboLoss::apply(recon, x, mu, logvar, scale, beta_tensor, mask, beta, free_bits, likelihood, reduction);
  return {out[0], out[1], out[2]};
}

// The gradient of a K-sample bound is a choice: see estimator.h for what reaches the decoder and what the encoder.
struct MultiSampleLoss : public Function<MultiSampleLoss> {
  enum { kRecon, kX, kLogRatio, kGates, kScale, kMask, kLogLikelihood, kInputs };
  static constexpr int kArguments = 9;

  static variable_list forward(AutogradContext* ctx, const Tensor& recon, const Tensor& x, const Tensor& log_ratio,
                               const OptionalTensor& gates, const OptionalTensor& scale, const OptionalTensor& mask,
                               std::string_view likelihood, std::string_view reduction, const Estimator& estimator) {
    // not in bfloat16 either: the weights would have to be rounded before they are multiplied
    const auto full = [](const Tensor& t) { return !t.defined() || !t.requires_grad() || t.element_size() >= 4; };
    const bool fused = reduction != "none" && !wants_grad(x) && full(recon) && full(log_ratio) && full(tensor(scale));
    std::array<bool, 4> wanted{};
    if (fused) wanted = {wants_grad(recon), wants_grad(log_ratio), wants_grad(gates), wants_grad(scale)};
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, log_likelihood, grads] = ops::multi_sample_loss_forward(recon, x, log_ratio, gates, scale, mask,
                                                                        likelihood, reduction, estimator, wanted);
    ctx->set_materialize_grads(false);
    variable_list saved{
        recon, x, log_ratio, tensor(gates), tensor(scale), tensor(mask), fused ? Tensor() : log_likelihood};
    for (auto& g : grads) saved.push_back(g);
    save(ctx, std::move(saved));
    ctx->saved_data["likelihood"] = std::string(likelihood);
    ctx->saved_data["reduction"] = std::string(reduction);
    const Estimator& e = estimator;
    ctx->saved_data["estimator"] = std::tuple<double, double, int64_t, double, double, double>(
        e.elbo_share, e.alpha, e.groups, e.path, e.path_weight, e.score);
    ctx->saved_data["fused"] = fused ? wanted[0] + 2 * wanted[1] + 4 * wanted[2] + 8 * wanted[3] : int64_t(0);
    return {loss, log_likelihood};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    variable_list result(kArguments);
    const int64_t fused = ctx->saved_data["fused"].toInt();
    if (fused && !grads[1].defined() && !at::GradMode::is_enabled()) {
      if (!grads[0].defined()) return result;
      constexpr int64_t kGatesBit = 4;  // factors of gradients: the upstream gradient is already in those
      variable_list scaled(saved.begin() + kInputs, saved.end());
      if (fused & kGatesBit) {
        const auto at = scaled.begin() + (fused & 1) + (fused >> 1 & 1);
        result[kGates] = owns_saved(ctx) ? *at : at->clone();
        scaled.erase(at);
      }
      scale_saved(scaled, 0, grads[0], (fused & 3) | (fused >> 1 & 4), owns_saved(ctx), {kRecon, kLogRatio, kScale},
                  result);
      return result;
    }
    return compose(ctx, saved, grads);
  }

  // The weights a [K, B] of estimator.h times minus `datum` [B].
  static Tensor weigh(const Estimator& e, const Tensor& log_w, const Tensor& datum) {
    const c10::SymInt K = log_w.sym_size(0), B = log_w.sym_size(1);
    Tensor rows;
    if (e.elbo_share != 1) {
      const Tensor tempered = e.alpha == 0 ? log_w : log_w * (1 - e.alpha);
      const Tensor factor = datum * (-(1 - e.elbo_share) / double(e.groups));
      rows = ops::log_mean_exp_backward(factor.expand_symint({e.groups, B}),
                                        tempered.reshape_symint({e.groups, K / e.groups, B}), 1)
                 .reshape_symint({K, B});
    }
    if (e.elbo_share != 0) {
      const Tensor even = (datum * -e.elbo_share).div(at::Scalar(K)).expand_symint({K, B});
      rows = plus(rows, even);
    }
    return rows;
  }

  static variable_list compose(AutogradContext* ctx, const variable_list& saved, const variable_list& grads) {
    variable_list result(kArguments);
    const auto needed = needs<5>(ctx, {saved[kRecon], saved[kX], saved[kLogRatio], saved[kGates], saved[kScale]});
    const auto likelihood = ctx->saved_data["likelihood"].toStringView();
    const auto& row = ctx->saved_data["estimator"].toTupleRef().elements();
    const Estimator e{row[0].toDouble(), row[1].toDouble(), row[2].toInt(),
                      row[3].toDouble(), row[4].toDouble(), row[5].toDouble()};
    const Tensor &recon = saved[kRecon], &x = saved[kX], &log_ratio = saved[kLogRatio];
    const OptionalTensor scale = optional(saved[kScale]), mask = optional(saved[kMask]);
    BelowAutogradUnlessGraph guard;
    Tensor rows;
    if (grads[0].defined()) {
      const Tensor datum = per_datum(grads[0], ctx->saved_data["reduction"].toStringView(), x.sym_size(0));
      const bool again = !saved[kLogLikelihood].defined() || at::GradMode::is_enabled();
      const Tensor log_likelihood = again ? ops::log_prob(recon, x, scale, mask, likelihood) : saved[kLogLikelihood];
      const Tensor log_w = log_likelihood + log_ratio.to(log_likelihood.scalar_type());
      rows = weigh(e, log_w, datum);
      if (needed[2]) result[kLogRatio] = rows.to(log_ratio.scalar_type());
      if (needed[3]) {
        Tensor path = at::full_like(log_w, e.path - 1);
        if (e.path_weight != 0) path = path + weigh(e, log_w, at::full_like(datum, -e.path_weight));
        result[kGates] = at::stack({path, at::full_like(log_w, e.score - 1)}).to(saved[kGates].scalar_type());
      }
    }
    rows = plus(rows, grads[1]);
    if (rows.defined() && (needed[0] || needed[1] || needed[4])) {
      const std::array<bool, 3> wanted{needed[0], needed[1], needed[4]};
      auto found = spread(ops::log_prob_backward(rows, recon, x, scale, mask, likelihood, wanted), wanted);
      result[kRecon] = found[0], result[kX] = found[1], result[kScale] = found[2];
    }
    return result;
  }
};

std::tuple<Tensor, Tensor> multi_sample_loss_value(const Tensor& recon, const Tensor& x, const Tensor& log_ratio,
                                                   const OptionalTensor& gates, const OptionalTensor& scale,
                                                   const OptionalTensor& mask, std::string_view likelihood,
                                                   std::string_view reduction, double elbo_share, double alpha,
                                                   int64_t groups, double path, double path_weight, double score) {
  auto [loss, log_likelihood, grads] =
      ops::multi_sample_loss_forward(recon, x, log_ratio, gates, scale, mask, likelihood, reduction,
                                     {elbo_share, alpha, groups, path, path_weight, score}, {});
  return {loss, log_likelihood};
}

std::tuple<Tensor, Tensor> multi_sample_loss_autograd(const Tensor& recon, const Tensor& x, const Tensor& log_ratio,
                                                      const OptionalTensor& gates, const OptionalTensor& scale,
                                                      const OptionalTensor& mask, std::string_view likelihood,
                                                      std::string_view reduction, double elbo_share, double alpha,
                                                      int64_t groups, double path, double path_weight, double score) {
  if (!at::GradMode::is_enabled()) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return multi_sample_loss_value(recon, x, log_ratio, gates, scale, mask, likelihood, reduction, elbo_share, alpha,
                                   groups, path, path_weight, score);
  }
  auto out = MultiSampleLoss::apply(recon, x, log_ratio, gates, scale, mask, likelihood, reduction,
                                    Estimator{elbo_share, alpha, groups, path, path_weight, score});
  return {out[0], out[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastelbo, CompositeExplicitAutograd, m) {
  m.impl("elbo_loss", elbo_loss_value);
  m.impl("multi_sample_loss", multi_sample_loss_value);
}

TORCH_LIBRARY_IMPL(fastelbo, Autograd, m) {
  m.impl("log_mean_exp", log_mean_exp_autograd);
  m.impl("elbo_loss", elbo_loss_autograd);
  m.impl("multi_sample_loss", multi_sample_loss_autograd);
}

}  // namespace fastelbo::autograd
