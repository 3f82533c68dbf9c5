// Shapes of probabilistic PCA, for meta tensors and tracing.
#include <torch/library.h>

#include "ops.h"
#include "prepare/shapes.h"

namespace fastelbo {
namespace {

using namespace ops;

PpcaProjection ppca_project_meta(const Tensor& x, const Tensor& W, const Tensor& b) {
  checks::ppca(x, W, b);
  const auto options = W.options().dtype(at::kDouble);
  return {at::empty_symint({x.sym_size(0), W.sym_size(1)}, options), at::empty_symint({x.sym_size(0)}, options)};
}

PpcaResidual ppca_residual_meta(const Tensor& x, const Tensor& W, const Tensor& b, const Tensor& mean,
                                const Tensor& weight, std::array<bool, 3> needs) {
  checks::ppca_residual(x, W, b, mean, weight);
  return shapes::ppca_residual(x, W, needs);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastelbo, Meta, m) {
  m.impl("_ppca_project", ppca_project_meta);
  m.impl("_ppca_residual", ppca_residual_meta);
}

}  // namespace fastelbo
