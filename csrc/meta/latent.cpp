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

Tensors rsample_backward_meta(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                              const OptionalTensor&, const Tensor& mu, const Tensor& logvar, OptionalInt,
                              const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar, const OptionalTensor&,
                              const OptionalTensor& eps, c10::SymInt, std::array<bool, 5> needs) {
  const OptionalTensor m = mu, lv = logvar;
  return shapes::grads_like({&m, &lv, &prior_mu, &prior_logvar, &eps}, needs.data());
}

Tensor gaussian_kl_meta(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                        const OptionalTensor& prior_logvar, double free_bits) {
  checks::latent(mu, logvar, prior_mu, prior_logvar);
  checks::free_bits(free_bits);
  return shapes::batch_like(mu, mu);
}

Tensors gaussian_kl_backward_meta(const Tensor&, const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                                  const OptionalTensor& prior_logvar, double, std::array<bool, 4> needs) {
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
