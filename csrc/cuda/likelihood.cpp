// The likelihood ops on CUDA devices.
#include "cuda/likelihood.h"

#include <torch/library.h>

#include "prepare/implement.h"

namespace fastelbo {
namespace cuda {
namespace {

void log_prob(prepare::LogProb& op) {
  const OnDeviceOf device(op.log_prob);
  RowsParams p;
  p.fit = op.rows.params;
  RowSums sums(p, op.log_prob);
  launch_rows(p, op.rows.info.kernel, op.rows.is_double, device.stream());
  sums.finish(p, op.rows.is_double, device.stream());
}

void log_prob_elements(prepare::LogProbElements& op) {
  const OnDeviceOf device(op.log_prob);
  RowsParams p;
  p.fit = op.rows.params;
  launch_rows(p, op.rows.info.kernel, op.rows.is_double, device.stream());
}

void log_prob_backward(prepare::LogProbBackward& op) {
  const OnDeviceOf device(op.grad);
  RowsParams p;
  p.fit = op.rows.params;
  if (p.fit.any_grad()) launch_rows(p, op.rows.info.kernel, op.rows.is_double, device.stream());
  run_shared_grads(op.rows, device.stream());
  if (!op.grad_x_samples.defined()) return;
  op.rows.views.finish();
  op.grad_x.copy_(op.grad_x_samples.sum(0));
}

}  // namespace
}  // namespace cuda

TORCH_LIBRARY_IMPL(fastelbo, FASTELBO_CUDA_KEY, m) {
  m.impl("log_prob", implement<ops::log_prob, prepare::log_prob, cuda::log_prob>);
  m.impl("_log_prob_backward", implement<ops::log_prob_backward, prepare::log_prob_backward, cuda::log_prob_backward>);
  m.impl("log_prob_elements", implement<ops::log_prob_elements, prepare::log_prob_elements, cuda::log_prob_elements>);
  m.impl("_log_prob_elements_backward",
         implement<ops::log_prob_elements_backward, prepare::log_prob_elements_backward, cuda::log_prob_backward>);
}

}  // namespace fastelbo
