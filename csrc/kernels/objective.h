// Log mean exp over K of columns [outer, K, inner], and its gradient: the normalized weights times the upstream one.
#pragma once

#include "kernels/tile.h"
#include "math/log_mean_exp.h"

namespace fastelbo::FASTELBO_ISA {

// Up to kTile numbers of a column, contiguous.
template <class T>
inline const T* column_tile(const T* column, int64_t stride, int64_t k, int64_t n, T* buffer) {
  if (stride == 1) return column + k;
  for (int64_t i = 0; i < n; ++i) buffer[i] = column[(k + i) * stride];
  return buffer;
}

template <class T>
inline LogMeanExp<T> accumulate(const T* column, int64_t stride, int64_t K) {
  alignas(64) T buffer[kTile];
  T largest = -T(__builtin_huge_val());
  for (int64_t k = 0; k < K; k += kTile) {
    const int64_t n = K - k < kTile ? K - k : kTile;
    const T* __restrict x = column_tile(column, stride, k, n, buffer);
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
  }
  const T shift = LogMeanExp<T>::shift_of(largest);
  double sum = 0;
  for (int64_t k = 0; k < K; k += kTile) {
    const int64_t n = K - k < kTile ? K - k : kTile;
    const T* __restrict x = column_tile(column, stride, k, n, buffer);
    T part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = 0; i < n; ++i) part += exp_full(x[i] - shift);
    sum += part;
  }
  return {shift, sum};
}

template <class T>
FASTELBO_HD const T* column_of(const LogMeanExpParams& p, int64_t item) {
  return static_cast<const T*>(p.log_w) + item / p.inner * p.stride_outer + item % p.inner * p.stride_inner;
}

template <class T>
void log_mean_exp_kernel(const LogMeanExpParams& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    static_cast<T*>(p.out)[item] = T(accumulate(column_of<T>(p, item), p.stride_k, p.K).value(p.K));
  }
}

template <class T>
void log_mean_exp_backward_kernel(const LogMeanExpParams& p, int64_t begin, int64_t end) {
  alignas(64) T buffer[kTile], weights[kTile];
  for (int64_t item = begin; item < end; ++item) {
    const T* column = column_of<T>(p, item);
    T* to = static_cast<T*>(p.grad_log_w) + (column - static_cast<const T*>(p.log_w));
    const LogMeanExp<T> total = accumulate(column, p.stride_k, p.K);
    const T factor = static_cast<const T*>(p.grad)[item] * total.weight_factor();
    for (int64_t k = 0; k < p.K; k += kTile) {
      const int64_t n = p.K - k < kTile ? p.K - k : kTile;
      const T* __restrict x = column_tile(column, p.stride_k, k, n, buffer);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) weights[i] = factor * exp_full(x[i] - total.shift);
      for (int64_t i = 0; i < n; ++i) to[(k + i) * p.stride_k] = weights[i];
    }
  }
}

}  // namespace fastelbo::FASTELBO_ISA
