// Autograd of the latent ops. The noise is never saved: the backward draws it again from the seed.
#include "autograd/common.h"

namespace fastelbo::autograd {
namespace {

struct RSample : public Function<RSample> {
  enum { kMu, kLogvar, kPriorMu, kPriorLogvar, kSeed, kEps, kSample, kDatum, kSaved };

  template <class... A>
  static variable_list forward(AutogradContext* ctx, const A&... arguments) {
    const SampleInputs in{arguments...};
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [z, kl, log_ratio, log_q, gates] = ops::rsample(arguments...);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({in.mu, in.logvar, tensor(in.prior_mu), tensor(in.prior_logvar), tensor(in.seed),
                            tensor(in.eps), tensor(in.sample), tensor(in.datum)});
    if (in.num_samples) ctx->saved_data["num_samples"] = *in.num_samples;
    ctx->saved_data["first_sample"] = in.first_sample;
    return {z, kl, log_ratio, log_q, gates};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    // one gradient for each argument of the op, in which num_samples comes in front of the seed
    variable_list result(10);
    bool any = false;
    for (int i = 0; i < 4; ++i) any |= grads[i].defined();
    if (!any) return result;  // gates alone pass nothing
    const auto saved = ctx->get_saved_variables();
    const auto at = [&](int i) { return optional(saved[i]); };
    const auto needed = needs<6>(ctx, saved);
    OptionalInt num_samples;
    if (ctx->saved_data.count("num_samples")) num_samples = ctx->saved_data["num_samples"].toSymInt();
    BelowAutogradUnlessGraph guard;
    std::tie(result[0], result[1], result[2], result[3], result[6]) = ops::rsample_backward(
        optional(grads[0]), optional(grads[1]), optional(grads[2]), optional(grads[3]), optional(grads[4]), saved[kMu],
        saved[kLogvar], at(kPriorMu), at(kPriorLogvar), num_samples, at(kSeed), at(kEps), at(kSample), at(kDatum),
        ctx->saved_data["first_sample"].toSymInt(), {needed[0], needed[1], needed[2], needed[3], needed[5]});
    return result;
  }
};

struct GaussianKl : public Function<GaussianKl> {
  static variable_list forward(AutogradContext* ctx, const Tensor& mu, const Tensor& logvar,
                               const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                               const OptionalTensor& free_bits) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({mu, logvar, tensor(prior_mu), tensor(prior_logvar), tensor(free_bits)});
    return {ops::gaussian_kl(mu, logvar, prior_mu, prior_logvar, free_bits)};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    variable_list result(5);
    BelowAutogradUnlessGraph guard;
    std::tie(result[0], result[1], result[2], result[3]) = ops::gaussian_kl_backward(
        grads[0], saved[0], saved[1], optional(saved[2]), optional(saved[3]), optional(saved[4]), needs<4>(ctx, saved));
    return result;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastelbo, Autograd, m) {
  m.impl("rsample", Apply<RSample, decltype(ops::rsample)>::call);
  m.impl("gaussian_kl", Apply<GaussianKl, decltype(ops::gaussian_kl)>::call);
}

}  // namespace fastelbo::autograd
