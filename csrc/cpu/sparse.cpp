// Products of sparse matrices on the CPU.
#include <torch/library.h>

#include "cpu/run.h"
#include "prepare/sparse.h"

namespace fastelbo {
namespace cpu {
namespace {

using at::Tensor;

constexpr int64_t kBlockBytes = 1 << 18;  // of the rows that belong to a block of columns: in the L2 cache

// One of the two kernels; D: columns of X.
void csr(const Kernel<CsrParams> (&kernels)[2], prepare::Csr& op, int64_t D, bool by_columns) {
  const Tensor matrix = views::padded(op.matrix, kCsrPanel, op.matrix.scalar_type());
  const Tensor starts = op.starts.contiguous(), columns = op.columns.contiguous();
  CsrParams p;
  p.N = starts.size(0) - 1, p.D = D, p.lanes = matrix.size(1);
  const bool whole = p.lanes == op.product.size(1);
  const Tensor product = whole ? op.product : at::empty({op.product.size(0), p.lanes}, matrix.options());
  p.block = std::max<int64_t>(16, kBlockBytes / (p.lanes * matrix.element_size()));
  p.starts = starts.const_data_ptr<int64_t>();
  p.columns = columns.const_data_ptr(), p.wide = columns.scalar_type() == at::kLong;
  p.values = views::view_of(op.values, 1, {}, /*unit=*/true);
  p.matrix = matrix.const_data_ptr(), p.product = product.mutable_data_ptr();
  const int64_t items = by_columns ? (D + p.block - 1) / p.block : (p.N + kCsrRows - 1) / kCsrRows;
  const int64_t work = p.N == 0 ? 0 : (p.starts[p.N] - p.starts[0]) * p.lanes / 4;
  run(kernels[views::is_double(matrix)], p, items, work / std::max<int64_t>(1, items));
  if (!whole) op.product.copy_(product.narrow(1, 0, op.product.size(1)));
}

void csr_matmul(prepare::Csr& op) { csr(kernels().csr_matmul, op, op.matrix.size(0), /*by_columns=*/false); }

void csr_matmul_t(prepare::Csr& op) { csr(kernels().csr_matmul_t, op, op.product.size(0), /*by_columns=*/true); }

}  // namespace
}  // namespace cpu

TORCH_LIBRARY_FRAGMENT(fastelbo, m) {
  on_cpu_and_meta<ops::csr_matmul, prepare::csr_matmul, cpu::csr_matmul>(m, "_csr_matmul");
  on_cpu_and_meta<ops::csr_matmul_t, prepare::csr_matmul_t, cpu::csr_matmul_t>(m, "_csr_matmul_t");
}

}  // namespace fastelbo
