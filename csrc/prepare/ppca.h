// Probabilistic PCA: checks and outputs. The algebra is in composite/ppca.cpp.
#pragma once

#include "ops.h"
#include "prepare/shapes.h"
#include "prepare/views.h"

namespace fastelbo::prepare {

using namespace ops;

struct PpcaFactor {
  Tensor W, log_sigma2;
  Tensor columns, triangle, whiten;  // [M, D], the basis transposed; [M, M]; [M, M]

  PpcaFactors result() { return {columns.t(), triangle, whiten}; }
};

inline PpcaFactor ppca_factor(const Tensor& W, const Tensor& log_sigma2) {
  checks::ppca_factor(W, log_sigma2);
  const auto options = W.options().dtype(at::kDouble);
  const c10::SymInt D = W.sym_size(0), M = W.sym_size(1);
  return {W, log_sigma2, at::empty_symint({M, D}, options), at::empty_symint({M, M}, options),
          at::empty_symint({M, M}, options)};
}

struct PpcaInvert {
  Tensor matrices;
  Tensor inverses, log_det;  // [N, M, M], [N]

  PpcaInverses result() { return {inverses, log_det}; }
};

inline PpcaInvert ppca_invert(const Tensor& matrices) {
  checks::ppca_invert(matrices);
  return {matrices, at::empty_symint(matrices.sym_sizes(), matrices.options()),
          at::empty_symint({matrices.sym_size(0)}, matrices.options())};
}

struct PpcaProject {
  Tensor x, basis, b;
  Tensor coords, square;  // [N, M], [N]

  PpcaCoordinates result() { return {coords, square}; }
};

inline PpcaProject ppca_project(const Tensor& x, const Tensor& basis, const Tensor& b) {
  checks::ppca_project(x, basis, b);
  return {x, basis, b, at::empty_symint({x.sym_size(0), basis.sym_size(1)}, basis.options()),
          at::empty_symint({x.sym_size(0)}, basis.options())};
}

struct PpcaRest {
  Tensor x, basis, b, coords, square;
  double safe_share;  // of |x - b|^2: where a difference of squares leaves it, that is exact enough
  Tensor rest;        // [N]

  Tensor result() { return rest; }
};

inline PpcaRest ppca_rest(const Tensor& x, const Tensor& basis, const Tensor& b, const Tensor& coords,
                          const Tensor& square) {
  checks::ppca_rest(x, basis, b, coords, square);
  return {x,
          basis,
          b,
          coords,
          square,
          views::is_double(b) ? 0.25 : 1e-6,
          at::empty_symint({x.sym_size(0)}, basis.options())};
}

struct PpcaResidual {
  Tensor x, basis, b, coords, mean, weight;
  Tensor residual, cross, sum;  // [N, D], [D, M], [D] in the compute type of b; undefined where not needed

  PpcaSums result() { return {residual, cross, sum}; }
};

inline PpcaResidual ppca_residual(const Tensor& x, const Tensor& basis, const Tensor& b, const Tensor& coords,
                                  const Tensor& mean, const Tensor& weight, std::array<bool, 3> needs) {
  checks::ppca_residual(x, basis, b, coords, mean, weight);
  const auto options = shapes::compute_options(b);
  const c10::SymInt N = x.sym_size(0), D = basis.sym_size(0), M = basis.sym_size(1);
  const auto make = [&](bool needed, c10::SymIntArrayRef sizes) {
    return needed ? at::empty_symint(sizes, options) : Tensor();
  };
  return {x, basis, b, coords, mean, weight, make(needs[0], {N, D}), make(needs[1], {D, M}), make(needs[2], {D})};
}

}  // namespace fastelbo::prepare
