// Shapes of the likelihood ops, for meta tensors and tracing.
#include <torch/library.h>

#include "ops.h"
#include "shapes.h"

namespace fastelbo {
namespace {

using namespace ops;

Tensor log_prob_meta(const Tensor& recon, const Tensor& x, const OptionalTensor& scale, const OptionalTensor& mask,
                     std::string_view likelihood) {
  checks::log_prob(recon, x, scale, mask, likelihood);
  return shapes::rows_like(recon, x);
}

Tensors log_prob_backward_meta(const Tensor& grad, const Tensor& recon, const Tensor& x, const OptionalTensor& scale,
                               const OptionalTensor& mask, std::string_view likelihood, std::array<bool, 3> needs) {
  checks::log_prob_backward(grad, recon, x, scale, mask, likelihood);
  const OptionalTensor r = recon, data = x;
  return shapes::grads_like({&r, &data, &scale}, needs.data());
}

}  // namespace

TORCH_LIBRARY_IMPL(fastelbo, Meta, m) {
  m.impl("log_prob", log_prob_meta);
  m.impl("_log_prob_backward", log_prob_backward_meta);
}

}  // namespace fastelbo
