// Shapes and dtypes of what the ops return, allocated the same way by every device and by meta tensors.
#pragma once

#include <array>
#include <tuple>
#include <vector>

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

inline at::Tensor samples_like(const at::Tensor& mu, const std::optional<c10::SymInt>& num_samples, bool whole) {
  c10::SymDimVector shape;
  if (num_samples) shape.push_back(*num_samples);
  for (const auto& s : mu.sym_sizes().slice(0, whole ? mu.dim() : 1)) shape.push_back(s);
  return at::empty_symint(shape, whole ? mu.options() : compute_options(mu));
}

// [2, K, B] zeros, see math/estimator.h; without K samples there is nothing to weigh.
inline at::Tensor gates_like(const at::Tensor& mu, const std::optional<c10::SymInt>& num_samples) {
  if (!num_samples) return at::empty({0}, compute_options(mu));
  return at::zeros_symint({2, *num_samples, mu.sym_size(0)}, compute_options(mu));
}

inline at::Tensor reduced_like(const at::Tensor& log_w, int64_t dim) {
  c10::SymDimVector shape;
  for (int64_t d = 0; d < log_w.dim(); ++d) {
    if (d != dim) shape.push_back(log_w.sym_size(d));
  }
  return at::empty_symint(shape, compute_options(log_w));
}

}  // namespace fastelbo::shapes
