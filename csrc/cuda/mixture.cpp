// Mixtures on CUDA devices.
#include <torch/library.h>

#include "cuda/device.h"
#include "prepare/implement.h"
#include "prepare/mixture.h"

namespace fastelbo {
namespace cuda {
namespace {

void mixture_log_prob(prepare::MixtureLogProb& op) {
  const OnDeviceOf device(op.log_prob);
  launch_mixture_components(op.components, op.is_double, device.stream());
  launch_mixture(op.params, op.is_double, device.stream());
}

void mixture_log_prob_backward(prepare::MixtureLogProbBackward& op) {
  const OnDeviceOf device(op.inv_std);
  MixtureBackwardParams& p = op.backward;
  const MixtureParams& of = p.of;
  launch_mixture_components(op.components, op.is_double, device.stream());
  // segments of rows, where there are too few components to keep the device busy
  const int64_t wanted = std::clamp<int64_t>(kBusy * 2 / of.C, 1, std::max<int64_t>(of.N / 1024, 1));
  p.segment = std::max<int64_t>((of.N + wanted - 1) / wanted, 1);
  p.segments = std::max<int64_t>((of.N + p.segment - 1) / p.segment, 1);
  at::Tensor sums, weight_sums;
  if (op.grad_mu.defined() || op.grad_logvar.defined()) {
    sums = doubles(op.inv_std, {p.segments, 2, of.C, of.M});
    p.sums = sums.mutable_data_ptr<double>();
  }
  if (op.shared_weights.defined()) {
    weight_sums = doubles(op.inv_std, {p.segments, of.C});
    p.weight_sums = weight_sums.mutable_data_ptr<double>();
  }
  launch_mixture_backward(p, op.is_double, device.stream());
  if (!op.any_sums()) return;
  MixtureSumsParams& s = op.sums;
  s.segments = p.segments, s.sums = p.sums, s.weight_sums = p.weight_sums;
  launch_mixture_sums(s, op.is_double, device.stream());
}

}  // namespace
}  // namespace cuda

TORCH_LIBRARY_IMPL(fastelbo, FASTELBO_CUDA_KEY, m) {
  m.impl("mixture_log_prob", implement<ops::mixture_log_prob, prepare::mixture_log_prob, cuda::mixture_log_prob>);
  m.impl(
      "_mixture_log_prob_backward",
      implement<ops::mixture_log_prob_backward, prepare::mixture_log_prob_backward, cuda::mixture_log_prob_backward>);
}

}  // namespace fastelbo
