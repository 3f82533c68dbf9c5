// From tensors to what the kernels take, on any device.
#pragma once

#include <algorithm>
#include <array>
#include <numeric>
#include <vector>

#include "aten.h"
#include "params.h"
#include "prepare/checks.h"

namespace fastelbo::views {

using checks::OptionalTensor;

inline DType dtype_of(at::ScalarType t) {
  switch (t) {
    case at::kFloat: return DType::f32;
    case at::kDouble: return DType::f64;
    case at::kBFloat16: return DType::bf16;
    case at::kHalf: return DType::f16;
    case at::kByte: return DType::u8;
    case at::kBool: return DType::b8;
    case at::kShort: return DType::i16;
    case at::kInt: return DType::i32;
    case at::kLong: return DType::i64;
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

// A view of [K, B, D] of a tensor [*event], [B, *event] or [K, B, *event] with the given number of event dimensions;
// none where more than View::kMaxDims of them cannot be merged.
inline std::optional<View> try_view(const at::Tensor& t, int64_t event_dims, const Order& order = {},
                                    bool unit = false) {
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
    if (n == View::kMaxDims) return std::nullopt;
    v.size[n] = size;
    v.stride[n++] = stride;
  }
  v.ndim = std::max(n, 1);
  return v;
}

// The same where the dimensions are known to be few.
inline View view_of(const at::Tensor& t, int64_t event_dims, const Order& order = {}, bool unit = false) {
  const auto view = try_view(t, event_dims, order, unit);
  TORCH_INTERNAL_ASSERT(view.has_value());
  return *view;
}

// The views of one call, all walked in one order. What no View describes is copied, and a copy of an output is copied
// back by finish(), which is to be called when the kernels have been started.
class Views {
  int64_t event_dims_;
  Order order_;
  c10::SmallVector<at::Tensor, 2> inputs_;
  c10::SmallVector<std::pair<at::Tensor, at::Tensor>, 2> outputs_;

  // Uninitialized memory of t's shape whose dimensions merge in this order.
  at::Tensor empty(const at::Tensor& t) const {
    const int64_t lead = t.dim() - event_dims_;
    c10::SmallVector<int64_t, 8> dims(t.dim()), back(t.dim());
    std::iota(dims.begin(), dims.end(), 0);
    for (size_t i = 0; i < order_.size(); ++i) dims[lead + i] = lead + order_[i];
    for (int64_t i = 0; i < t.dim(); ++i) back[dims[i]] = i;
    return at::empty_like(t.permute(dims), at::MemoryFormat::Contiguous).permute(back);
  }

 public:
  Views(int64_t event_dims, Order order = {}) : event_dims_(event_dims), order_(std::move(order)) {}

  View in(const at::Tensor& t, bool unit = false) {
    if (const auto view = try_view(t, event_dims_, order_, unit)) return *view;
    inputs_.push_back(empty(t).copy_(t));
    return *try_view(inputs_.back(), event_dims_, order_, unit);
  }
  View in(const OptionalTensor& t) { return t.has_value() ? in(*t) : View{}; }

  View out(const at::Tensor& t) {
    if (!t.defined()) return {};
    if (const auto view = try_view(t, event_dims_, order_)) return *view;
    outputs_.emplace_back(t, empty(t));
    return *try_view(outputs_.back().second, event_dims_, order_);
  }

  int64_t event_dims() const { return event_dims_; }

  // Memory for an output as contiguous numbers of this type: its own where they are that.
  at::Tensor dense(const at::Tensor& t, at::ScalarType type) {
    if (t.scalar_type() == type && t.is_contiguous()) return t;
    outputs_.emplace_back(t, at::empty(t.sizes(), t.options().dtype(type)));
    return outputs_.back().second;
  }
  // The same for an output [*event], its numbers in the order of the walk.
  at::Tensor walked(const at::Tensor& t, at::ScalarType type) {
    if (order_.empty() || t.dim() == 0) return dense(t, type);
    outputs_.emplace_back(t, empty(t.to(type)));
    return outputs_.back().second;
  }

  void finish() {
    for (auto& [to, from] : outputs_) to.copy_(from);
    outputs_.clear();
  }
};

// [K?, B] numbers of the compute type.
inline RowScalars rows_of(const at::Tensor& t) {
  RowScalars r;
  r.data = t.const_data_ptr();
  r.stride_k = t.dim() == 2 ? t.stride(0) : 0;
  r.stride_b = t.stride(t.dim() - 1);
  return r;
}

// A number that host code reads where it lies on the CPU, and the kernels where it does not.
inline Number number_of(const OptionalTensor& t, double absent) {
  if (!t.has_value()) return {absent};
#if !defined(FASTELBO_HOST_CUDA)  // whose kernels read it as those of a device do
  if (t->is_cpu()) return {t->scalar_type() == at::kDouble ? *t->const_data_ptr<double>() : t->item<double>()};
#endif
  return {0, t->const_data_ptr(), dtype_of(t->scalar_type())};
}

inline bool is_double(const at::Tensor& t) { return t.scalar_type() == at::kDouble; }

// Sizes of log_w in front of, at and behind the averaged dimension; log_w and its gradient are contiguous here.
inline LogMeanExpParams log_mean_exp_params(const at::Tensor& log_w, int64_t dim) {
  LogMeanExpParams p;
  p.K = log_w.size(dim);
  p.inner = 1;
  for (int64_t d = dim + 1; d < log_w.dim(); ++d) p.inner *= log_w.size(d);
  p.stride_inner = 1, p.stride_k = p.inner, p.stride_outer = p.inner * p.K;
  p.log_w = log_w.const_data_ptr();
  return p;
}

// A contiguous copy of a matrix in another dtype, with columns of 0 up to a multiple of `panel`; itself where it is
// that.
inline at::Tensor padded(const at::Tensor& matrix, int64_t panel, at::ScalarType type) {
  const int64_t rows = matrix.size(0), columns = matrix.size(1), lanes = (columns + panel - 1) / panel * panel;
  if (lanes == columns) return matrix.to(type).contiguous();
  const at::Tensor wide = at::zeros({rows, lanes}, matrix.options().dtype(type));
  wide.narrow(1, 0, columns).copy_(matrix);
  return wide;
}

}  // namespace fastelbo::views
