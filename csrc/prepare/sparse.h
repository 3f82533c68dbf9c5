// Products of sparse matrices: checks and outputs.
#pragma once

#include "ops.h"
#include "prepare/shapes.h"
#include "prepare/views.h"

namespace fastelbo::prepare {

struct Csr {
  at::Tensor starts, columns, values, matrix;
  at::Tensor product;  // [N, M], or [D, M]

  at::Tensor result() { return product; }
};

inline Csr csr_matmul(const at::Tensor& starts, const at::Tensor& columns, const at::Tensor& values,
                      const at::Tensor& matrix) {
  checks::csr(starts, columns, values, matrix);
  return {starts, columns, values, matrix,
          at::empty_symint({starts.sym_size(0) - 1, matrix.sym_size(1)}, matrix.options())};
}

inline Csr csr_matmul_t(const at::Tensor& starts, const at::Tensor& columns, const at::Tensor& values,
                        const at::Tensor& matrix, c10::SymInt D) {
  checks::csr(starts, columns, values, matrix);
  TORCH_CHECK_VALUE(matrix.sym_size(0) == starts.sym_size(0) - 1,
                    "matrix must be [N, M] with N=", starts.sym_size(0) - 1, " from starts; got ",
                    checks::shape_text(matrix));
  return {starts, columns, values, matrix, at::empty_symint({std::move(D), matrix.sym_size(1)}, matrix.options())};
}

}  // namespace fastelbo::prepare
