// What the objectives use of the latent side.
#pragma once

#include "cuda/device.h"

namespace fastelbo::cuda {

// With free bits, the batch mean of every dimension's KL is computed first, in a launch of its own. p.dim_means
// points into the returned tensor: keep it until the kernel that reads it has been launched.
inline at::Tensor set_dim_means(KlParams& p, const at::Tensor& like, bool is_double, cudaStream_t stream) {
  if (p.free_bits.is_zero()) return {};
  const at::Tensor means = doubles(like, {p.q.D});
  const KlDimsParams dims{p.q, means.mutable_data_ptr<double>()};
  launch_kl_dims(dims, is_double, stream);
  p.dim_means = dims.out;
  return means;
}

}  // namespace fastelbo::cuda
