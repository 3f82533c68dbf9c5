// From tensors to the kernels' views, and from work items to threads.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <numeric>

#include "checks.h"
#include "kernels/params.h"

namespace fastelbo::cpu {

using checks::OptionalTensor;

inline DType dtype_of(at::ScalarType t) {
  switch (t) {
    case at::kFloat: return DType::f32;
    case at::kDouble: return DType::f64;
    case at::kBFloat16: return DType::bf16;
    case at::kHalf: return DType::f16;
    case at::kByte: return DType::u8;
    case at::kBool: return DType::b8;
    default: TORCH_INTERNAL_ASSERT(false, "unchecked dtype ", t);
  }
}

// The order in which the event dimensions are walked: that of the memory where `t` is dense, so that a channels-last
// tensor is read straight through. Sums do not depend on it beyond rounding. Empty: as they stand.
using Order = c10::SmallVector<int64_t, 8>;

inline Order event_order(const at::Tensor& t, int64_t event_dims) {
  if (event_dims < 2 || t.is_contiguous() || !t.is_non_overlapping_and_dense()) return {};
  Order order(event_dims);
  std::iota(order.begin(), order.end(), 0);
  const int64_t lead = t.dim() - event_dims;
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return t.stride(lead + a) > t.stride(lead + b); });
  return order;
}

// A view of [K, B, D] of a tensor [*event], [B, *event] or [K, B, *event] with the given number of event dimensions.
inline View view_of(const at::Tensor& t, int64_t event_dims, const Order& order = {}, bool unit = false) {
  View v;
  v.data = const_cast<void*>(t.const_data_ptr());
  v.dtype = dtype_of(t.scalar_type());
  v.unit = unit && v.dtype == DType::u8;
  const int64_t lead = t.dim() - event_dims;
  v.stride_k = lead == 2 ? t.stride(0) : 0;
  v.stride_b = lead >= 1 ? t.stride(lead - 1) : 0;
  v.size[0] = v.stride[0] = 1;
  int n = 0;  // dimensions so far
  for (int64_t i = 0; i < event_dims; ++i) {
    const int64_t d = lead + (order.empty() ? i : order[i]), size = t.size(d), stride = t.stride(d);
    if (size == 1) continue;
    if (n > 0 && v.stride[n - 1] == stride * size) {
      v.size[n - 1] *= size;
      v.stride[n - 1] = stride;
      continue;
    }
    TORCH_CHECK_VALUE(n < View::kMaxDims, "a tensor of shape ", checks::shape_text(t), " has more than ",
                      View::kMaxDims, " dimensions that cannot be merged; call .contiguous() on it");
    v.size[n] = size;
    v.stride[n++] = stride;
  }
  v.ndim = std::max(n, 1);
  return v;
}

inline View view_of(const OptionalTensor& t, int64_t event_dims, const Order& order = {}) {
  return t.has_value() ? view_of(*t, event_dims, order) : View{};
}

// [K?, B] numbers of the compute type.
inline RowScalars rows_of(const at::Tensor& t) {
  RowScalars r;
  r.data = t.const_data_ptr();
  r.stride_k = t.dim() == 2 ? t.stride(0) : 0;
  r.stride_b = t.stride(t.dim() - 1);
  return r;
}

// Elements that one thread should have before a second one is worth waking: about 10 us of work.
inline constexpr int64_t kGrain = 16384;

template <class Params>
void run(Kernel<Params> kernel, const Params& params, int64_t items, int64_t elements_per_item) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_per_item));
  if (items <= grain) return kernel(params, 0, items);
  at::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
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

inline bool is_double(const at::Tensor& t) { return t.scalar_type() == at::kDouble; }

}  // namespace fastelbo::cpu
