// Autograd of the latent ops. The noise is never saved: the backward draws it again from the seed.
#include "autograd/common.h"

namespace fastelbo::autograd {
namespace {

struct RSample : public Function<RSample> {
  enum { kMu, kLogvar, kNumSamples, kPriorMu, kPriorLogvar, kSeed, kEps, kFirstSample, kArguments };

  static variable_list forward(AutogradContext* ctx, const Tensor& mu, const Tensor& logvar, OptionalInt num_samples,
                               const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                               const OptionalTensor& seed, const OptionalTensor& eps, c10::SymInt first_sample) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [z, kl, log_ratio, gates] =
        ops::rsample(mu, logvar, num_samples, prior_mu, prior_logvar, seed, eps, first_sample);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({mu, logvar, tensor(prior_mu), tensor(prior_logvar), tensor(seed), tensor(eps)});
    if (num_samples) ctx->saved_data["num_samples"] = *num_samples;
    ctx->saved_data["first_sample"] = first_sample;
    return {z, kl, log_ratio, gates};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(kArguments);
    if (!grads[0].defined() && !grads[1].defined() && !grads[2].defined()) return result;  // gates alone pass nothing
    const auto saved = ctx->get_saved_variables();
    const Tensor &mu = saved[0], &logvar = saved[1], &prior_mu = saved[2], &prior_logvar = saved[3], &seed = saved[4],
                 &eps = saved[5];
    const auto needed = needs<6>(ctx, {mu, logvar, prior_mu, prior_logvar, seed, eps});
    OptionalInt num_samples;
    if (ctx->saved_data.count("num_samples")) num_samples = ctx->saved_data["num_samples"].toSymInt();
    BelowAutogradUnlessGraph guard;
    std::tie(result[kMu], result[kLogvar], result[kPriorMu], result[kPriorLogvar], result[kEps]) =
        ops::rsample_backward(optional(grads[0]), optional(grads[1]), optional(grads[2]), optional(grads[3]), mu,
                              logvar, num_samples, optional(prior_mu), optional(prior_logvar), optional(seed),
                              optional(eps), ctx->saved_data["first_sample"].toSymInt(),
                              {needed[0], needed[1], needed[2], needed[3], needed[5]});
    return result;
  }
};

struct RSampleKept : public Function<RSampleKept> {
  enum { kMu, kLogvar, kPriorMu, kPriorLogvar, kSample, kDatum, kSeed, kArguments };

  static variable_list forward(AutogradContext* ctx, const Tensor& mu, const Tensor& logvar,
                               const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar, const Tensor& sample,
                               const Tensor& datum, const Tensor& seed) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [z, log_ratio, gates] = ops::rsample_kept(mu, logvar, prior_mu, prior_logvar, sample, datum, seed);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({mu, logvar, tensor(prior_mu), tensor(prior_logvar), sample, datum, seed});
    return {z, log_ratio, gates};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(kArguments);
    if (!grads[0].defined() && !grads[1].defined()) return result;  // gates alone pass nothing
    const auto saved = ctx->get_saved_variables();
    const Tensor &mu = saved[kMu], &logvar = saved[kLogvar], &prior_mu = saved[kPriorMu],
                 &prior_logvar = saved[kPriorLogvar];
    BelowAutogradUnlessGraph guard;
    std::tie(result[kMu], result[kLogvar], result[kPriorMu], result[kPriorLogvar]) =
        ops::rsample_kept_backward(optional(grads[0]), optional(grads[1]), optional(grads[2]), mu, logvar,
                                   optional(prior_mu), optional(prior_logvar), saved[kSample], saved[kDatum],
                                   saved[kSeed], needs<4>(ctx, {mu, logvar, prior_mu, prior_logvar}));
    return result;
  }
};

struct GaussianKl : public Function<GaussianKl> {
  enum { kMu, kLogvar, kPriorMu, kPriorLogvar, kFreeBits, kArguments };

  static variable_list forward(AutogradContext* ctx, const Tensor& mu, const Tensor& logvar,
                               const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar, double free_bits) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({mu, logvar, tensor(prior_mu), tensor(prior_logvar)});
    ctx->saved_data["free_bits"] = free_bits;
    return {ops::gaussian_kl(mu, logvar, prior_mu, prior_logvar, free_bits)};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &mu = saved[0], &logvar = saved[1], &prior_mu = saved[2], &prior_logvar = saved[3];
    variable_list result(kArguments);
    BelowAutogradUnlessGraph guard;
    std::tie(result[kMu], result[kLogvar], result[kPriorMu], result[kPriorLogvar]) = ops::gaussian_kl_backward(
        grads[0], mu, logvar, optional(prior_mu), optional(prior_logvar), ctx->saved_data["free_bits"].toDouble(),
        needs<4>(ctx, {mu, logvar, prior_mu, prior_logvar}));
    return result;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastelbo, Autograd, m) {
  m.impl("rsample", Apply<RSample, decltype(ops::rsample)>::call);
  m.impl("_rsample_kept", Apply<RSampleKept, decltype(ops::rsample_kept)>::call);
  m.impl("gaussian_kl", Apply<GaussianKl, decltype(ops::gaussian_kl)>::call);
}

}  // namespace fastelbo::autograd
