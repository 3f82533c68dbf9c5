// Autograd of the objectives.
//
// A loss that is reduced to a scalar has its gradient computed in the forward, while each row is in the cache; the
// backward multiplies it by the upstream gradient, which is mostly 1. Everything else (reduction "none", half types,
// gradients of the returned parts, a graph of the gradient, a gradient for x) is put together in the backward from the
// backward ops of the likelihood and of the KL: composite/objective.cpp.
#include "composite/objective.h"
#include "autograd/common.h"

namespace fastelbo::autograd {
namespace {

struct LogMeanExp : public Function<LogMeanExp> {
  static variable_list forward(AutogradContext* ctx, const Tensor& log_w, int64_t dim) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({log_w});
    ctx->saved_data["dim"] = dim;
    return {ops::log_mean_exp(log_w, dim)};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    BelowAutogradUnlessGraph guard;
    return {ops::log_mean_exp_backward(grads[0], ctx->get_saved_variables()[0], ctx->saved_data["dim"].toInt()),
            Tensor()};
  }
};

// Whether a gradient that is computed in the forward and multiplied by the upstream one in the backward is as good as
// one computed in the backward. float16 loses by it: what is too small for it is gone before a gradient scaler's 2^16,
// which exists to save just that. bfloat16 has the range of float, and a scaler's power of two multiplies exactly.
bool keeps_precision(const Tensor& t) { return !wants_grad(t) || t.scalar_type() != at::kHalf; }
// The weights of a K-sample bound would have to be rounded to bfloat16, too, before they are multiplied.
bool keeps_weighted_precision(const Tensor& t) { return !wants_grad(t) || t.element_size() >= 4; }

struct ElboLoss : public Function<ElboLoss> {
  enum {
    kRecon,
    kX,
    kMu,
    kLogvar,
    kPriorMu,
    kPriorLogvar,
    kSecond,
    kThird,
    kMask,
    kBeta,
    kBetaTensor,
    kFreeBits,
    kLikelihood,
    kReduction,
    kArguments
  };
  // what is saved: inputs, the KL, then the gradients that the forward computed
  enum {
    kSavedKl = kArguments,
    kGradRecon,
    kGradMu,
    kGradLogvar,
    kGradPriorMu,
    kGradPriorLogvar,
    kGradSecond,
    kGradThird,
    kSaved
  };

  static variable_list forward(AutogradContext* ctx, const Tensor& recon, const Tensor& x, const Tensor& mu,
                               const Tensor& logvar, const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                               const OptionalTensor& second, const OptionalTensor& third, const OptionalTensor& mask,
                               double beta, const OptionalTensor& beta_tensor, double free_bits,
                               std::string_view likelihood, std::string_view reduction) {
    variable_list saved(kSaved);
    saved[kRecon] = recon, saved[kX] = x, saved[kMu] = mu, saved[kLogvar] = logvar;
    saved[kPriorMu] = tensor(prior_mu), saved[kPriorLogvar] = tensor(prior_logvar);
    saved[kSecond] = tensor(second), saved[kThird] = tensor(third), saved[kMask] = tensor(mask);
    saved[kBetaTensor] = tensor(beta_tensor);
    bool fused = reduction != "none" && !wants_grad(x) && !wants_grad(beta_tensor);
    std::array<bool, 7> wanted{};
    const std::array<int, 7> inputs{kRecon, kMu, kLogvar, kPriorMu, kPriorLogvar, kSecond, kThird};
    for (int i : inputs) fused &= keeps_precision(saved[i]);
    for (size_t i = 0; fused && i < inputs.size(); ++i) wanted[i] = wants_grad(saved[inputs[i]]);
    at::AutoDispatchBelowADInplaceOrView guard;
    Tensor loss, log_likelihood, kl;
    std::tie(loss, log_likelihood, kl, saved[kGradRecon], saved[kGradMu], saved[kGradLogvar], saved[kGradPriorMu],
             saved[kGradPriorLogvar], saved[kGradSecond], saved[kGradThird]) =
        ops::elbo_loss_forward(recon, x, mu, logvar, prior_mu, prior_logvar, second, third, mask, beta, beta_tensor,
                               free_bits, likelihood, reduction, wanted);
    // an output is saved only where the backward may need it: its owner may change it in place
    if (wants_grad(beta_tensor)) saved[kSavedKl] = kl;
    ctx->set_materialize_grads(false);
    save(ctx, std::move(saved));
    ctx->saved_data["options"] = std::tuple<bool, double, double, std::string, std::string>(
        fused, beta, free_bits, std::string(likelihood), std::string(reduction));
    return {loss, log_likelihood, kl};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto& options = ctx->saved_data["options"].toTupleRef().elements();
    variable_list result(kArguments);
    if (options[0].toBool() && !grads[1].defined() && !grads[2].defined() && !at::GradMode::is_enabled()) {
      if (!grads[0].defined()) return result;
      const bool owned = owns_saved(ctx);
      const auto give = [&](int argument, int gradient) {
        result[argument] = scaled(saved[gradient], grads[0], owned);
      };
      give(kRecon, kGradRecon), give(kMu, kGradMu), give(kLogvar, kGradLogvar), give(kPriorMu, kGradPriorMu);
      give(kPriorLogvar, kGradPriorLogvar), give(kSecond, kGradSecond), give(kThird, kGradThird);
      return result;
    }
    const auto needed =
        needs<10>(ctx, {saved[kRecon], saved[kX], saved[kMu], saved[kLogvar], saved[kPriorMu], saved[kPriorLogvar],
                        saved[kSecond], saved[kThird], saved[kMask], saved[kBetaTensor]});
    BelowAutogradUnlessGraph guard;
    const composite::ElboGrads found = composite::elbo_loss_backward(
        grads[0], grads[1], grads[2],
        {{saved[kRecon], saved[kX], saved[kSecond], saved[kThird], saved[kMask], options[3].toStringRef()},
         saved[kMu],
         saved[kLogvar],
         saved[kPriorMu],
         saved[kPriorLogvar],
         saved[kBetaTensor],
         options[1].toDouble(),
         options[2].toDouble(),
         options[4].toStringRef(),
         saved[kSavedKl]},
        {{needed[kRecon], needed[kX], needed[kSecond], needed[kThird]},
         {needed[kMu], needed[kLogvar], needed[kPriorMu], needed[kPriorLogvar]},
         needed[9]});
    result[kRecon] = found.fit.recon, result[kX] = found.fit.x;
    result[kSecond] = found.fit.second, result[kThird] = found.fit.third;
    result[kMu] = found.mu, result[kLogvar] = found.logvar;
    result[kPriorMu] = found.prior_mu, result[kPriorLogvar] = found.prior_logvar, result[kBetaTensor] = found.beta;
    return result;
  }
};

struct MultiSampleLoss : public Function<MultiSampleLoss> {
  enum { kRecon, kX, kLogRatio, kGates, kSecond, kThird, kMask, kLikelihood, kEstimator, kReduction, kArguments };
  // what is saved: inputs, log p, then the gradients that the forward computed
  enum { kLogLikelihood = kArguments, kGradRecon, kGradLogRatio, kGradGates, kGradSecond, kGradThird, kSaved };

  static variable_list forward(AutogradContext* ctx, const Tensor& recon, const Tensor& x, const Tensor& log_ratio,
                               const OptionalTensor& gates, const OptionalTensor& second, const OptionalTensor& third,
                               const OptionalTensor& mask, std::string_view likelihood, at::ArrayRef<double> estimator,
                               std::string_view reduction) {
    variable_list saved(kSaved);
    saved[kRecon] = recon, saved[kX] = x, saved[kLogRatio] = log_ratio, saved[kGates] = tensor(gates);
    saved[kSecond] = tensor(second), saved[kThird] = tensor(third), saved[kMask] = tensor(mask);
    const std::array<int, 5> inputs{kRecon, kLogRatio, kGates, kSecond, kThird};
    bool fused = reduction != "none" && !wants_grad(x);
    for (int i : {kRecon, kLogRatio, kSecond, kThird}) fused &= keeps_weighted_precision(saved[i]);
    std::array<bool, 5> wanted{};
    for (size_t i = 0; fused && i < inputs.size(); ++i) wanted[i] = wants_grad(saved[inputs[i]]);
    at::AutoDispatchBelowADInplaceOrView guard;
    Tensor loss, log_likelihood;
    std::tie(loss, log_likelihood, saved[kGradRecon], saved[kGradLogRatio], saved[kGradGates], saved[kGradSecond],
             saved[kGradThird]) = ops::multi_sample_loss_forward(recon, x, log_ratio, gates, second, third, mask,
                                                                 likelihood, estimator, reduction, wanted);
    if (!fused) saved[kLogLikelihood] = log_likelihood;
    ctx->set_materialize_grads(false);
    save(ctx, std::move(saved));
    ctx->saved_data["options"] = std::tuple<bool, std::vector<double>, std::string, std::string>(
        fused, estimator.vec(), std::string(likelihood), std::string(reduction));
    return {loss, log_likelihood};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto& options = ctx->saved_data["options"].toTupleRef().elements();
    variable_list result(kArguments);
    if (options[0].toBool() && !grads[1].defined() && !at::GradMode::is_enabled()) {
      if (!grads[0].defined()) return result;
      const bool owned = owns_saved(ctx);
      const auto give = [&](int argument, int gradient) {
        result[argument] = scaled(saved[gradient], grads[0], owned);
      };
      give(kRecon, kGradRecon), give(kLogRatio, kGradLogRatio), give(kSecond, kGradSecond), give(kThird, kGradThird);
      // no gradient, but the factors of those of z and of the log ratio (math/estimator.h), which carry the upstream
      // one
      const Tensor& gates = saved[kGradGates];
      if (gates.defined()) result[kGates] = owned ? gates : gates.clone();
      return result;
    }
    const auto needed =
        needs<6>(ctx, {saved[kRecon], saved[kX], saved[kLogRatio], saved[kGates], saved[kSecond], saved[kThird]});
    BelowAutogradUnlessGraph guard;
    const composite::MultiSampleGrads found = composite::multi_sample_loss_backward(
        grads[0], grads[1],
        {{saved[kRecon], saved[kX], saved[kSecond], saved[kThird], saved[kMask], options[2].toStringRef()},
         saved[kLogRatio],
         saved[kGates],
         options[1].toDoubleVector(),
         options[3].toStringRef(),
         saved[kLogLikelihood]},
        {{needed[kRecon], needed[kX], needed[kSecond], needed[kThird]}, needed[kLogRatio], needed[kGates]});
    result[kRecon] = found.fit.recon, result[kX] = found.fit.x;
    result[kSecond] = found.fit.second, result[kThird] = found.fit.third;
    result[kLogRatio] = found.log_ratio, result[kGates] = found.gates;
    return result;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastelbo, Autograd, m) {
  m.impl("log_mean_exp", Apply<LogMeanExp, decltype(ops::log_mean_exp)>::call);
  m.impl("elbo_loss", Apply<ElboLoss, decltype(ops::elbo_loss)>::call);
  m.impl("multi_sample_loss", Apply<MultiSampleLoss, decltype(ops::multi_sample_loss)>::call);
}

}  // namespace fastelbo::autograd
