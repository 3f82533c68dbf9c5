// The latent ops on CUDA devices.
#include "cuda/latent.h"

#include <torch/library.h>

#include "prepare/implement.h"
#include "prepare/latent.h"

namespace fastelbo {
namespace cuda {
namespace {

void gaussian_kl(prepare::GaussianKl& op) {
  const OnDeviceOf device(op.kl);
  const at::Tensor means = set_dim_means(op.params, op.kl, op.is_double, device.stream());
  void* out = op.kl.mutable_data_ptr();
  launch_kl(op.params, means.defined() ? nullptr : out, means.defined() ? out : nullptr, op.is_double, device.stream());
}

void gaussian_kl_backward(prepare::GaussianKlBackward& op) {
  const OnDeviceOf device(op.mu);
  const at::Tensor means = set_dim_means(op.params, op.mu, op.is_double, device.stream());
  launch_kl(op.params, nullptr, nullptr, op.is_double, device.stream());
}

void rsample(prepare::RSample& op) {
  const OnDeviceOf device(op.z);
  launch_samples(op.params, {op.log_ratio.mutable_data_ptr(), op.log_q.mutable_data_ptr(), op.kl.mutable_data_ptr()},
                 op.is_double, device.stream());
}

void rsample_backward(prepare::RSampleBackward& op) {
  const OnDeviceOf device(op.mu);
  launch_samples_backward(op.params, op.is_double, device.stream());
}

}  // namespace
}  // namespace cuda

TORCH_LIBRARY_IMPL(fastelbo, FASTELBO_CUDA_KEY, m) {
  m.impl("rsample", implement<ops::rsample, prepare::rsample, cuda::rsample>);
  m.impl("_rsample_backward", implement<ops::rsample_backward, prepare::rsample_backward, cuda::rsample_backward>);
  m.impl("gaussian_kl", implement<ops::gaussian_kl, prepare::gaussian_kl, cuda::gaussian_kl>);
  m.impl("_gaussian_kl_backward",
         implement<ops::gaussian_kl_backward, prepare::gaussian_kl_backward, cuda::gaussian_kl_backward>);
}

}  // namespace fastelbo
