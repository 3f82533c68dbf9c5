// The noise of rsample by itself: its kernels draw it beside a mean of 0 and a standard deviation of 1.
#include <torch/library.h>

#include "aten.h"
#include "ops.h"

namespace fastelbo {
namespace {

using namespace ops;

Tensor normal_rows(const Tensor& seed, const Tensor& rows, c10::SymInt size) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const Tensor zeros = at::zeros_symint({1, std::move(size)}, seed.options().dtype(at::kFloat));
  return std::get<0>(
      ops::rsample(zeros, zeros, {}, {}, {}, seed, {}, rows, at::zeros_symint(rows.sym_sizes(), rows.options()), 0));
}

}  // namespace

TORCH_LIBRARY_IMPL(fastelbo, CompositeExplicitAutograd, m) { m.impl("_normal_rows", normal_rows); }

}  // namespace fastelbo
