// Shapes of the latent ops, for meta tensors and tracing.
#include <torch/library.h>

#include "ops.h"
#include "shapes.h"

namespace fastelbo {
namespace {

using namespace ops;

Samples rsample_meta(const Tensor& mu, const Tensor& logvar, OptionalInt num_samples, const OptionalTensor& prior_mu,
                     const OptionalTensor& prior_logvar, const OptionalTensor& seed, const OptionalTensor& eps,
                     c10::SymInt first_sample) {
  checks::latent(mu, logvar, prior_mu, prior_logvar);
  checks::noise(mu, num_samples, seed, eps, first_sample);
  return {shapes::samples_like(mu, num_samples, true), shapes::batch_like(mu, mu),
          shapes::samples_like(mu, num_samples, false), shapes::gates_like(mu, num_samples)};
}

Tensors rsample_backward_meta(const OptionalTensor& grad_z, const OptionalTensor& grad_kl,
                              const OptionalTensor& grad_log_ratio, const OptionalTensor& grad_gates, const Tensor& mu,
                              const Tensor& logvar, OptionalInt num_samples, const OptionalTensor& prior_mu,
                              const OptionalTensor& prior_logvar, const OptionalTensor& seed, const OptionalTensor& eps,
                              c10::SymInt first_sample, std::array<bool, 5> needs) {
  checks::rsample_backward(grad_z, grad_kl, grad_log_ratio, grad_gates, mu, logvar, num_samples, prior_mu, prior_logvar,
                           seed, eps, first_sample);
  const OptionalTensor m = mu, lv = logvar;
  return shapes::grads_like({&m, &lv, &prior_mu, &prior_logvar, &eps}, needs.data());
}

Tensor gaussian_kl_meta(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                        const OptionalTensor& prior_logvar, double free_bits) {
  checks::latent(mu, logvar, prior_mu, prior_logvar);
  checks::free_bits(free_bits);
  return shapes::batch_like(mu, mu);
}

Tensors gaussian_kl_backward_meta(const Tensor& grad, const Tensor& mu, const Tensor& logvar,
                                  const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar, double,
                                  std::array<bool, 4> needs) {
  checks::latent(mu, logvar, prior_mu, prior_logvar);
  checks::upstream("grad", grad, {mu.sym_size(0)}, mu);
  const OptionalTensor m = mu, lv = logvar;
  return shapes::grads_like({&m, &lv, &prior_mu, &prior_logvar}, needs.data());
}

}  // namespace

TORCH_LIBRARY_IMPL(fastelbo, Meta, m) {
  m.impl("rsample", rsample_meta);
  m.impl("_rsample_backward", rsample_backward_meta);
  m.impl("gaussian_kl", gaussian_kl_meta);
  m.impl("_gaussian_kl_backward", gaussian_kl_backward_meta);
}

}  // namespace fastelbo
