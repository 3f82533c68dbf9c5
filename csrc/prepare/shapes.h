// Shapes and dtypes of what the ops return, allocated the same way by every device and by meta tensors.
#pragma once

#include <array>
#include <tuple>
#include <vector>

#include <ATen/TensorSubclassLikeUtils.h>

#include "aten.h"
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

// The sum of t over the dimensions in which it is larger than `shape`, which broadcasts to it. In an order of its own: the
// sum of a contiguous row is one thread's, but torch shares out the terms of a single one.
inline at::Tensor sum_to(const at::Tensor& t, at::IntArrayRef shape) {
  constexpr int64_t kRow = 4096;
  const int64_t missing = t.dim() - int64_t(shape.size());
  c10::SmallVector<int64_t, 8> order, summed;
  int64_t rows = 1;
  for (int64_t d = 0; d < t.dim(); ++d) {
    const bool stays = d >= missing && shape[d - missing] == t.size(d);
    (stays ? order : summed).push_back(d);
    if (stays) rows *= t.size(d);
  }
  order.append(summed.begin(), summed.end());
  at::Tensor terms = t.permute(order).reshape({rows, rows ? t.numel() / rows : 0});
  while (rows == 1 && terms.numel() > kRow && !at::isTensorSubclassLike(t)) {
    terms = at::constant_pad_nd(terms, {0, (kRow - terms.numel() % kRow) % kRow}).view({-1, kRow}).sum(1).view({1, -1});
  }
  return terms.contiguous().sum(1).view(shape);
}

inline at::Tensor reduced_like(const at::Tensor& log_w, int64_t dim) {
  c10::SymDimVector shape;
  for (int64_t d = 0; d < log_w.dim(); ++d) {
    if (d != dim) shape.push_back(log_w.sym_size(d));
  }
  return at::empty_symint(shape, compute_options(log_w));
}

}  // namespace fastelbo::shapes
