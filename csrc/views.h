// From tensors to what the kernels take, on any device.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <vector>

#include "checks.h"
#include "kernels/params.h"

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

inline bool is_double(const at::Tensor& t) { return t.scalar_type() == at::kDouble; }

// Where this share of |x - b|^2 is left by a difference of squares in double, it is as exact as the type of b asks for.
inline double ppca_safe_share(const at::Tensor& b) { return is_double(b) ? 0.25 : 1e-6; }

template <class Params>
void set_latent(Params& p, const at::Tensor& mu, const at::Tensor& logvar, const OptionalTensor& prior_mu,
                const OptionalTensor& prior_logvar) {
  const int64_t dims = mu.dim() - 1;
  p.B = mu.size(0);
  p.D = p.B ? mu.numel() / p.B : 0;
  p.mu = view_of(mu, dims);
  p.logvar = view_of(logvar, dims);
  p.prior_mu = view_of(prior_mu, dims);
  p.prior_logvar = view_of(prior_logvar, dims);
}

// The rows of recon [K?, B, *event] and their inputs, without outputs.
inline LogProbParams log_prob_params(const at::Tensor& recon, const at::Tensor& x, const OptionalTensor& scale,
                                     const OptionalTensor& mask, const Order& order) {
  const int64_t dims = x.dim() - 1;
  LogProbParams p;
  p.K = recon.dim() > x.dim() ? recon.size(0) : 1;
  p.B = x.size(0);
  p.D = 1;
  for (int64_t size : x.sizes().slice(1)) p.D *= size;
  p.recon = view_of(recon, dims, order);
  p.x = view_of(x, dims, order, /*unit=*/true);
  p.scale = view_of(scale, dims, order);
  p.mask = view_of(mask, dims, order);
  return p;
}

// Views of the wanted gradients, in the order of the needs.
template <size_t N>
void set_grads(const std::vector<at::Tensor>& grads, std::array<bool, N> needs, std::initializer_list<View*> views,
               std::initializer_list<const OptionalTensor*> inputs, int64_t dims) {
  size_t next = 0;
  const auto* input = inputs.begin();
  const auto* view = views.begin();
  for (size_t i = 0; i < N; ++i, ++input, ++view) {
    if (needs[i] && (*input)->has_value()) **view = view_of(grads[next++], dims);
  }
}

// The inputs of rsample's backward. What comes back may hold a copy of grad_z, and has to outlive the call.
inline at::Tensor set_sample_grads(SampleBackwardParams& p, const OptionalTensor& grad_z, const OptionalTensor& grad_kl,
                                   const OptionalTensor& grad_log_ratio, const OptionalTensor& grad_gates,
                                   const at::Tensor& mu, const at::Tensor& logvar,
                                   const std::optional<c10::SymInt>& num_samples, const OptionalTensor& prior_mu,
                                   const OptionalTensor& prior_logvar, const OptionalTensor& eps,
                                   int64_t first_sample) {
  const int64_t dims = mu.dim() - 1;
  set_latent(p, mu, logvar, prior_mu, prior_logvar);
  p.K = num_samples ? num_samples->expect_int() : 1;
  p.first_sample = first_sample;
  p.eps = view_of(eps, dims);
  // an upstream gradient's layout is not the caller's to mend
  const at::Tensor dense = !grad_z.has_value() ? at::Tensor() : dims > View::kMaxDims ? grad_z->contiguous() : *grad_z;
  if (dense.defined()) p.grad_z = view_of(dense, dims);
  if (grad_kl.has_value()) p.grad_kl = rows_of(*grad_kl);
  if (grad_log_ratio.has_value()) p.grad_log_ratio = rows_of(*grad_log_ratio);
  if (grad_gates.has_value() && num_samples) {
    p.gate_path = rows_of(grad_gates->select(0, 0)), p.gate_score = rows_of(grad_gates->select(0, 1));
  }
  return dense;
}

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

// The factor of every datum's loss in the returned one.
inline double share(checks::Reduction reduction, int64_t B) {
  return reduction == checks::Reduction::mean ? 1.0 / double(B) : 1.0;
}

}  // namespace fastelbo::views
