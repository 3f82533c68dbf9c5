// From work items to threads, and from their sums to tensors.
#pragma once

#include "cpu/kernels/kernels.h"
#include "parallel.h"
#include "prepare/implement.h"
#include "prepare/views.h"

namespace fastelbo::cpu {

// Elements that one thread should have before a second one is worth waking: about 10 us of work.
inline constexpr int64_t kGrain = 16384;

template <class Params>
void run(Kernel<Params> kernel, const Params& params, int64_t items, int64_t elements_per_item) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_per_item));
  if (items <= grain) return kernel(params, 0, items);
  parallel_for(0, items, grain, [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
}

using Scratch = c10::SmallVector<double, 256>;

// Writes numbers into a contiguous tensor of the compute type.
inline void write(const double* from, const at::Tensor& to) {
  const int64_t n = to.numel();
  if (to.scalar_type() == at::kDouble) {
    std::copy_n(from, n, to.mutable_data_ptr<double>());
  } else {
    float* p = to.mutable_data_ptr<float>();
    for (int64_t i = 0; i < n; ++i) p[i] = float(from[i]);
  }
}

}  // namespace fastelbo::cpu
