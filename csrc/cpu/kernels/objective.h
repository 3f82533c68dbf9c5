// Log mean exp over K of columns [outer, K, inner], and its gradient: the normalized weights times the upstream one.
// K-sample bounds with their gradients.
#pragma once

#include "cpu/kernels/likelihood.h"
#include "math/weights.h"

namespace fastelbo::FASTELBO_ISA {

// Up to kTile numbers of a column, contiguous.
template <class T>
inline const T* column_tile(const T* column, int64_t stride, int64_t k, int64_t n, T* buffer) {
  if (stride == 1) return column + k;
  for (int64_t i = 0; i < n; ++i) buffer[i] = column[(k + i) * stride];
  return buffer;
}

// The largest of n numbers and `largest`; NaN is passed over.
template <class T>
inline T largest_of(const T* __restrict x, int64_t n, T largest) {
#if defined(__clang__)  // which vectorizes no maximum of numbers that may be NaN
  T lanes[kLanes];
  for (T& lane : lanes) lane = largest;
  for (; n >= kLanes; x += kLanes, n -= kLanes) {
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = x[i] > lanes[i] ? x[i] : lanes[i];
  }
  for (const T lane : lanes) largest = lane > largest ? lane : largest;
#else
#pragma omp simd reduction(max : largest)
#endif
  for (int64_t i = 0; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

template <class T>
inline LogMeanExp<T> accumulate(const T* column, int64_t stride, int64_t K) {
  alignas(64) T buffer[kTile];
  T largest = -T(__builtin_huge_val());
  for (int64_t k = 0; k < K; k += kTile) {
    const int64_t n = K - k < kTile ? K - k : kTile;
    largest = largest_of(column_tile(column, stride, k, n, buffer), n, largest);
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

// math/weights.h on one thread.
struct OneThread {
  bool leads() const { return true; }
  template <class F>
  double max(int64_t n, F f) const {
    double largest = -__builtin_huge_val();
    for (int64_t i = 0; i < n; ++i) largest = f(i) > largest ? f(i) : largest;
    return largest;
  }
  template <class F>
  double sum(int64_t n, F f) const {
    double total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; ++i) total += f(i);
    return total;
  }
  template <class F>
  void each(int64_t n, F f) const {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) f(i);
  }
};

// Work items: data.
template <class T>
[[gnu::noinline]] void weigh_kernel(const MultiSampleParams& p, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) weigh_datum<T>(p, b, OneThread{});
}

// Work items: data. They are taken a few at a time, so that their K rows stay in the cache: log p and its gradient with
// factor 1, then the weights, then the gradient times its weight. The data of a block are next to each other, so that
// the K runs of memory that it reads are long enough for the processor to see them coming. Where the first gradient
// cannot be kept in place and unrounded, in half types and strided outputs, it is computed again.
template <class L, int kCount, class T>
void multi_sample_kernel(const MultiSampleParams& p, int64_t begin, int64_t end) {
  constexpr int64_t kCache = 1 << 21;  // bytes
  const int64_t K = p.fit.K, B = p.fit.B, D = p.fit.D, row_bytes = K * D * int64_t(sizeof(T));
  const int64_t block = row_bytes && row_bytes < kCache ? kCache / row_bytes : 1;
  const Grads grads = grads_of(p.fit);
  bool in_place = true;
  for (int i = 0; i < kCount; ++i) in_place &= !p.fit.grad[i] || lies_as<T>(p.fit.grad[i]);
  SharedSums<T> none;  // gradients of parameters that rows share take the log_prob kernel, after the weights
  const auto row = [&](Grads wanted, int64_t k, int64_t b, T factor) {
    double sum = 0;
    for (int64_t d = 0; d < D; d += kSegment) {
      sum += log_prob_segment<L, kCount>(wanted, p.fit, k, b, d, D - d < kSegment ? D : d + kSegment, factor, none);
    }
    return sum;
  };
  for (int64_t b0 = begin; b0 < end; b0 += block) {
    const int64_t b1 = b0 + block < end ? b0 + block : end;
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t b = b0; b < b1; ++b) p.weights[k * B + b] = row(in_place ? grads : Grads::none, k, b, T(1));
    }
    weigh_kernel<T>(p, b0, b1);
    if (grads == Grads::none) continue;
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t b = b0; b < b1; ++b) {
        const T factor = T(-p.datum_weight * p.weights[k * B + b]);
        if (!in_place) row(grads, k, b, factor);
        for (int i = 0; in_place && i < kCount; ++i) {
          if (!p.fit.grad[i]) continue;
          T* __restrict grad = target(p.fit.grad[i], k, b, 0, static_cast<T*>(nullptr));
#pragma omp simd
          for (int64_t d = 0; d < D; ++d) grad[d] *= factor;
        }
      }
    }
  }
}

}  // namespace fastelbo::FASTELBO_ISA
