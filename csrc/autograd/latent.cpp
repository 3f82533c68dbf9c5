// Autograd of the latent ops. The noise is never saved: the backward draws it again from the seed.
#include <torch/library.h>

#include "autograd/common.h"

namespace fastelbo::autograd {
namespace {

struct RSample : public Function<RSample> {
  static variable_list forward(AutogradContext* ctx, const Tensor& mu, const Tensor& logvar,
                               const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                               const OptionalTensor& eps, const OptionalTensor& seed, OptionalInt num_samples,
                               c10::SymInt first_sample) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [z, kl, log_ratio, gates] =
        ops::rsample(mu, logvar, num_samples, prior_mu, prior_logvar, seed, eps, first_sample);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({mu, logvar, tensor(prior_mu), tensor(prior_logvar), tensor(eps), tensor(seed)});
    if (num_samples) ctx->saved_data["num_samples"] = *num_samples;
    ctx->saved_data["first_sample"] = first_sample;
    return {z, kl, log_ratio, gates};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto needed = needs<5>(ctx, {saved[0], saved[1], saved[2], saved[3], saved[4]});
    OptionalInt num_samples;
    if (ctx->saved_data.count("num_samples")) num_samples = ctx->saved_data["num_samples"].toSymInt();
    variable_list result(8);
    if (!grads[0].defined() && !grads[1].defined() && !grads[2].defined()) return result;  // gates alone pass nothing
    BelowAutogradUnlessGraph guard;
    result = spread(
        ops::rsample_backward(optional(grads[0]), optional(grads[1]), optional(grads[2]), optional(grads[3]), saved[0],
                              saved[1], num_samples, optional(saved[2]), optional(saved[3]), optional(saved[5]),
                              optional(saved[4]), ctx->saved_data["first_sample"].toSymInt(), needed),
        needed);
    result.resize(8);
    return result;
  }
};

Samples rsample_autograd(const Tensor& mu, const Tensor& logvar, OptionalInt num_samples,
                         const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar, const OptionalTensor& seed,
                         const OptionalTensor& eps, c10::SymInt first_sample) {
  auto out =
      RSample::apply(mu, logvar, prior_mu, prior_logvar, eps, seed, std::move(num_samples), std::move(first_sample));
  return {out[0], out[1], out[2], out[3]};
}

struct GaussianKl : public Function<GaussianKl> {
  static Tensor forward(AutogradContext* ctx, const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                        const OptionalTensor& prior_logvar, double free_bits) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({mu, logvar, tensor(prior_mu), tensor(prior_logvar)});
    ctx->saved_data["free_bits"] = free_bits;
    return ops::gaussian_kl(mu, logvar, prior_mu, prior_logvar, free_bits);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto needed = needs<4>(ctx, {saved[0], saved[1], saved[2], saved[3]});
    BelowAutogradUnlessGraph guard;
    auto result = spread(ops::gaussian_kl_backward(grads[0], saved[0], saved[1], optional(saved[2]), optional(saved[3]),
                                                   ctx->saved_data["free_bits"].toDouble(), needed),
                         needed);
    result.resize(5);
    return result;
  }
};

Tensor gaussian_kl_autograd(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                            const OptionalTensor& prior_logvar, double free_bits) {
  return GaussianKl::apply(mu, logvar, prior_mu, prior_logvar, free_bits);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastelbo, Autograd, m) {
  m.impl("rsample", rsample_autograd);
  m.impl("gaussian_kl", gaussian_kl_autograd);
}

}  // namespace fastelbo::autograd
