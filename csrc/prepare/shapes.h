// Shapes and dtypes of what the ops return, allocated the same way by every device and by meta tensors.
#pragma once

#include <array>
#include <tuple>
#include <vector>

#include <ATen/TensorSubclassLikeUtils.h>

#include "aten.h"
#include "parallel.h"
#include "prepare/checks.h"

namespace fastelbo::shapes {

using checks::OptionalTensor;

inline at::TensorOptions compute_options(const at::Tensor& t) { return t.options().dtype(checks::compute_type(t)); }

// [K?, B] for recon [K?, B, *event]
inline at::Tensor rows_like(const at::Tensor& recon, const at::Tensor& x) {
  return at::empty_symint(recon.sym_sizes().slice(0, recon.dim() - x.dim() + 1), compute_options(recon));
}

inline at::Tensor batch_like(const at::Tensor& t, const at::Tensor& batch) {
  return at::empty_symint({batch.sym_size(0)}, compute_options(t));
}

inline at::Tensor loss_like(const at::Tensor& recon, const at::Tensor& x, checks::Reduction reduction) {
  return reduction == checks::Reduction::none ? batch_like(recon, x) : at::empty({}, compute_options(recon));
}

// An uninitialized gradient of t: t's strides where t is dense, contiguous where it is expanded or overlapping.
inline at::Tensor grad_like(const at::Tensor& t) {
  return t.is_non_overlapping_and_dense() ? at::empty_like(t) : at::empty_like(t, at::MemoryFormat::Contiguous);
}

inline at::Tensor grad_like(const OptionalTensor& t, bool needed) {
  return needed && t.has_value() ? grad_like(*t) : at::Tensor();
}

// The columns of t, [rows, columns] in memory, added up in double, some rows at a time: each by one thread.
template <class T>
at::Tensor column_sums(const at::Tensor& t, int64_t columns, at::IntArrayRef shape) {
  const at::Tensor sums = at::empty(shape, t.options());
  const int64_t rows = columns ? t.numel() / columns : 0;
  const T* from = t.const_data_ptr<T>();
  T* to = sums.mutable_data_ptr<T>();
  parallel_for(0, columns, std::max<int64_t>(16, 32768 / std::max<int64_t>(rows, 1)), [&](int64_t first, int64_t last) {
    constexpr int64_t kTogether = 64;
    const int64_t n = last - first;
    c10::SmallVector<double, 256> total(n, 0.0), part(n);
    for (int64_t r = 0; r < rows; r += kTogether) {
      std::fill(part.begin(), part.end(), 0.0);
      for (int64_t row = r; row < std::min(rows, r + kTogether); ++row) {
        for (int64_t c = 0; c < n; ++c) part[c] += double(from[row * columns + first + c]);
      }
      for (int64_t c = 0; c < n; ++c) total[c] += part[c];
    }
    for (int64_t c = 0; c < n; ++c) to[first + c] = T(total[c]);
  });
  return sums;
}

// The sum of t over the dimensions in which it is larger than `shape`, which broadcasts to it: of the same bits for any
// number of threads. torch's own are, of a contiguous row.
inline at::Tensor sum_to(const at::Tensor& t, at::IntArrayRef shape) {
  const int64_t missing = t.dim() - int64_t(shape.size());
  c10::SmallVector<int64_t, 8> order, summed;
  int64_t rows = 1;
  for (int64_t d = 0; d < t.dim(); ++d) {
    const bool stays = d >= missing && shape[d - missing] == t.size(d);
    (stays ? order : summed).push_back(d);
    if (stays) rows *= t.size(d);
  }
  const bool leading = order.empty() || summed.empty() || summed.back() < order.front();
  if (leading && t.is_cpu() && t.is_contiguous() && !at::isTensorSubclassLike(t)) {
    return t.scalar_type() == at::kDouble ? column_sums<double>(t, rows, shape) : column_sums<float>(t, rows, shape);
  }
  order.append(summed.begin(), summed.end());
  return t.permute(order).reshape({rows, rows ? t.numel() / rows : 0}).contiguous().sum(1).view(shape);
}

inline at::Tensor reduced_like(const at::Tensor& log_w, int64_t dim) {
  c10::SymDimVector shape;
  for (int64_t d = 0; d < log_w.dim(); ++d) {
    if (d != dim) shape.push_back(log_w.sym_size(d));
  }
  return at::empty_symint(shape, compute_options(log_w));
}

}  // namespace fastelbo::shapes
