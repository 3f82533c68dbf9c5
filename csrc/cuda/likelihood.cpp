// The likelihood ops on CUDA devices.
#include "cuda/likelihood.h"

#include <torch/library.h>

#include "ops.h"
#include "shapes.h"

namespace fastelbo {
namespace {

using namespace ops;
using namespace cuda;
using namespace views;

Tensor log_prob_cuda(const Tensor& recon, const Tensor& x, const OptionalTensor& scale, const OptionalTensor& mask,
                     std::string_view likelihood) {
  const int index = checks::log_prob(recon, x, scale, mask, likelihood);
  const OnDeviceOf device(recon);
  const Tensor result = shapes::rows_like(recon, x);
  Views views = data_views(recon, x);
  RowsParams p;
  p.fit = log_prob_params(views, recon, x, scale, mask);
  RowSums sums(p, recon, result);
  launch_rows(p, index, scale.has_value(), is_double(recon), device.stream());
  sums.finish(p, is_double(recon), device.stream());
  return result;
}

Tensors log_prob_backward_cuda(const Tensor& grad, const Tensor& recon, const Tensor& x, const OptionalTensor& scale,
                               const OptionalTensor& mask, std::string_view likelihood, std::array<bool, 3> needs) {
  const int index = checks::log_prob_backward(grad, recon, x, scale, mask, likelihood);
  const OnDeviceOf device(recon);
  Views views = data_views(recon, x);
  const OptionalTensor r = recon, data = x;
  Tensors grads = shapes::grads_like({&r, &data, &scale}, needs.data());
  RowsParams p;
  p.fit = log_prob_params(views, recon, x, scale, mask);
  p.fit.grad = rows_of(grad);
  size_t next = 0;
  if (needs[0]) p.fit.grad_recon = views.out(grads[next++]);
  // x is shared by the samples: its gradient is the sum of theirs
  Tensor grad_x;
  const size_t x_index = next;
  if (needs[1]) {
    grad_x = p.fit.K > 1 ? at::empty(recon.sizes(), shapes::compute_options(recon)) : grads[next];
    p.fit.grad_x = views.out(grad_x);
    ++next;
  }
  if (needs[2] && scale.has_value()) p.fit.grad_scale = views.out(grads[next]);
  launch_rows(p, index, scale.has_value(), is_double(recon), device.stream());
  views.finish();
  if (needs[1] && p.fit.K > 1) grads[x_index].copy_(grad_x.sum(0));
  return grads;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastelbo, FASTELBO_CUDA_KEY, m) {
  m.impl("log_prob", log_prob_cuda);
  m.impl("_log_prob_backward", log_prob_backward_cuda);
}

}  // namespace fastelbo
