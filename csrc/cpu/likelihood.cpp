// The likelihood ops on the CPU.
#include "cpu/likelihood.h"

#include <torch/library.h>

#include "ops.h"
#include "shapes.h"

namespace fastelbo {
namespace {

using namespace ops;
using namespace cpu;

Tensor log_prob_cpu(const Tensor& recon, const Tensor& x, const OptionalTensor& scale, const OptionalTensor& mask,
                    std::string_view likelihood) {
  const int index = checks::log_prob(recon, x, scale, mask, likelihood);
  const Tensor result = shapes::rows_like(recon, x);
  Views views = data_views(recon, x);
  LogProbParams p = log_prob_params(views, recon, x, scale, mask);
  Scratch out(p.K * p.B);
  run_log_prob(log_prob_kernel(index, scale, is_double(recon)), p, out.data());
  write(out.data(), result);
  return result;
}

Tensors log_prob_backward_cpu(const Tensor& grad, const Tensor& recon, const Tensor& x, const OptionalTensor& scale,
                              const OptionalTensor& mask, std::string_view likelihood, std::array<bool, 3> needs) {
  const int index = checks::log_prob_backward(grad, recon, x, scale, mask, likelihood);
  Views views = data_views(recon, x);
  const OptionalTensor r = recon, data = x;
  Tensors grads = shapes::grads_like({&r, &data, &scale}, needs.data());
  LogProbParams p = log_prob_params(views, recon, x, scale, mask);
  p.grad = rows_of(grad);
  size_t next = 0;
  if (needs[0]) p.grad_recon = views.out(grads[next++]);
  // x is shared by the samples: its gradient is the sum of theirs
  Tensor grad_x;
  const size_t x_index = next;
  if (needs[1]) {
    grad_x = p.K > 1 ? at::empty(recon.sizes(), shapes::compute_options(recon)) : grads[next];
    p.grad_x = views.out(grad_x);
    ++next;
  }
  if (needs[2] && scale.has_value()) p.grad_scale = views.out(grads[next]);
  run_log_prob(log_prob_kernel(index, scale, is_double(recon)), p, nullptr);
  views.finish();
  if (needs[1] && p.K > 1) {  // in order: torch's sum over K would depend on the number of threads
    Tensor sum = grad_x[0];
    for (int64_t k = 1; k < p.K; ++k) sum.add_(grad_x[k]);
    grads[x_index].copy_(sum);
  }
  return grads;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastelbo, CPU, m) {
  m.impl("log_prob", log_prob_cpu);
  m.impl("_log_prob_backward", log_prob_backward_cpu);
}

}  // namespace fastelbo
