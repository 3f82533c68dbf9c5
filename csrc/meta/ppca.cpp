// Shapes of probabilistic PCA, for meta tensors and tracing.
#include <torch/library.h>

#include "ops.h"
#include "shapes.h"

namespace fastelbo {
namespace {

using namespace ops;

PpcaFactor ppca_factor_meta(const Tensor& W, const Tensor& log_sigma2) {
  checks::ppca_factor(W, log_sigma2);
  const auto options = W.options().dtype(at::kDouble);
  const c10::SymInt D = W.sym_size(0), M = W.sym_size(1);
  return {at::empty_symint({M, D}, options).t(), at::empty_symint({M, M}, options), at::empty_symint({M, M}, options)};
}

PpcaProjection ppca_project_meta(const Tensor& x, const Tensor& basis, const Tensor& b) {
  checks::ppca_project(x, basis, b);
  const auto options = basis.options();
  return {at::empty_symint({x.sym_size(0), basis.sym_size(1)}, options), at::empty_symint({x.sym_size(0)}, options)};
}

Tensor ppca_rest_meta(const Tensor& x, const Tensor& basis, const Tensor& b, const Tensor& coords,
                      const Tensor& square) {
  checks::ppca_rest(x, basis, b, coords, square);
  return at::empty_symint({x.sym_size(0)}, basis.options());
}

PpcaResidual ppca_residual_meta(const Tensor& x, const Tensor& basis, const Tensor& b, const Tensor& coords,
                                const Tensor& mean, const Tensor& weight, std::array<bool, 3> needs) {
  checks::ppca_residual(x, basis, b, coords, mean, weight);
  return shapes::ppca_residual(x, basis, b, needs);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastelbo, Meta, m) {
  m.impl("_ppca_factor", ppca_factor_meta);
  m.impl("_ppca_project", ppca_project_meta);
  m.impl("_ppca_rest", ppca_rest_meta);
  m.impl("_ppca_residual", ppca_residual_meta);
}

}  // namespace fastelbo
