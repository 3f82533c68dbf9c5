// What the objectives use of the latent side.
#pragma once

#include "cuda/device.h"

namespace fastelbo::cuda {

// With free bits, the batch mean of every dimension's KL is computed first, in a launch of its own. The tensor that
// comes back holds it: it has to live until the next launch.
inline at::Tensor set_free_bits(KlParams& p, const at::Tensor& mu, double free_bits, cudaStream_t stream) {
  if (!(free_bits > 0)) return {};
  const at::Tensor means = doubles(mu, {p.D});
  KlDimsParams dims;
  dims.B = p.B, dims.D = p.D;
  dims.mu = p.mu, dims.logvar = p.logvar, dims.prior_mu = p.prior_mu, dims.prior_logvar = p.prior_logvar;
  dims.out = means.mutable_data_ptr<double>();
  launch_kl_dims(dims, views::is_double(mu), stream);
  p.dim_means = dims.out, p.free_bits = free_bits;
  return means;
}

}  // namespace fastelbo::cuda
