// log p(x | recon) of rows, with its gradient: one pass over recon and x.
#pragma once

#include "kernels/tile.h"
#include "likelihoods/list.h"

namespace fastelbo::FASTELBO_ISA {

enum class Grads { none, parameters, all };

template <class T>
struct Elements {
  const T *recon, *scale, *x, *weight;
  T *grad_recon, *grad_scale, *grad_x;
  const uint8_t* bytes;  // x as it lies, where it is bytes in a row: converted in registers
  ByteScale<T> byte_scale;
};

// A tile is done in several short loops instead of a long one: what limits a long one is not the number of its
// instructions but how few elements fit the processor's window while each waits for the one before (a chain of some 90
// cycles in the Bernoulli). Times of both are in benchmarks/LIMITS.md.
//
// Sums are of kGroup numbers in the compute type, then kTile / kGroup of these in vector lanes, then in double: their
// order depends on D and the instruction set alone, never on threads.
inline constexpr int64_t kGroup = 8;
inline constexpr int64_t kPadded = kGroup * kLanes;  // a tile is padded with zeros to a multiple of this
static_assert(kTile % kPadded == 0);

template <class T>
struct TileSums {
  alignas(64) T value[kTile], share[kTile], product[kTile / kGroup];
};

template <class L, bool kScale, class T>
inline void share_tile(const T* __restrict recon, const T* __restrict scale, T* __restrict share, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) share[i] = L::share(recon[i], kScale ? scale[i] : T(0));
}

// The values of n elements and their gradients times factor. An element of weight 0 counts for nothing, whatever it
// holds.
template <class L, bool kScale, Grads kGrads, bool kWeighted, bool kBytes, class T>
inline void log_prob_tile(const Elements<T>& e, T factor, int64_t n, T* __restrict value, T* __restrict share) {
  constexpr bool kShares = L::kShares && (kScale || !L::takes_scale);
  if constexpr (kShares) share_tile<L, kScale>(e.recon, e.scale, share, n);
  const T* __restrict recon = e.recon;
  const T* __restrict scale = e.scale;
  const T* __restrict x = e.x;
  const uint8_t* __restrict bytes = e.bytes;
  const ByteScale<T> byte_scale = e.byte_scale;
  const T* __restrict weight = e.weight;
  T* __restrict grad_recon = e.grad_recon;
  T* __restrict grad_scale = e.grad_scale;
  T* __restrict grad_x = e.grad_x;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    // one const value: gcc keeps a struct that is assigned in pieces in memory, and then does not vectorize
    const T s = kScale ? scale[i] : T(0);
    const T shared = kShares ? share[i] : L::share(recon[i], s);
    const Terms<T> t = L::eval(recon[i], s, kBytes ? scaled_byte(T(bytes[i]), byte_scale) : x[i], shared);
    const T m = kWeighted ? weight[i] : T(1);
    const bool seen = !kWeighted || m != 0;
    const T w = kWeighted ? factor * m : factor;
    const T v = kWeighted && L::kSoftplus ? t.value - log1p_unit(shared) : t.value;
    value[i] = seen ? m * v : T(0);
    if constexpr (kGrads != Grads::none) {
      grad_recon[i] = seen ? w * t.d_recon : T(0);
      if constexpr (kScale) grad_scale[i] = seen ? w * t.d_scale : T(0);
    }
    if constexpr (kGrads == Grads::all) grad_x[i] = seen ? w * t.d_x : T(0);
  }
}

// f over n numbers that lie `step` apart, as a tree.
template <int64_t n, class T, class F>
FASTELBO_HD T tree(const T* p, int64_t step, F f) {
  if constexpr (n == 1) {
    return *p;
  } else {
    return f(tree<n / 2>(p, step, f), tree<n / 2>(p + n / 2 * step, step, f));
  }
}

// The sum of the first n values of a tile, less log(1 + share) where kSoftplus: by products of kGroup factors, of which
// q holds what is beyond 1. So no digit is lost where all factors are near 1.
template <bool kSoftplus, class T>
inline double sum_tile(TileSums<T>& tile, int64_t n) {
  const int64_t padded = (n + kPadded - 1) / kPadded * kPadded, part = padded / kGroup;
  for (int64_t i = n; i < padded; ++i) tile.value[i] = 0;
  for (int64_t i = n; kSoftplus && i < padded; ++i) tile.share[i] = 0;
  const T* __restrict v = tile.value;
  const T* __restrict q = tile.share;
  T* __restrict product = tile.product;
  if constexpr (kSoftplus) {
#pragma omp simd
    for (int64_t i = 0; i < part; ++i) {
      product[i] = tree<kGroup>(q + i, part, [](T a, T b) { return a * b + (a + b); });
    }
  }
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < part; ++i) {
    T total = tree<kGroup>(v + i, part, [](T a, T b) { return a + b; });
    if constexpr (kSoftplus) total -= log1p_product(product[i]);
    sum += total;
  }
  return sum;
}

template <class L, bool kScale, Grads kGrads, class T>
inline double log_prob_segment(const LogProbParams& p, int64_t k, int64_t b, int64_t begin, int64_t end) {
  alignas(64) T in[4][kTile], out[3][kTile];
  TileSums<T> tile;
  const T factor = at<T>(p.grad, k, b);
  double sum = 0;
  for (int64_t i = begin; i < end; i += kTile) {
    const int64_t n = end - i < kTile ? end - i : kTile;
    Elements<T> e;
    e.recon = load(p.recon, k, b, i, n, in[0]);
    e.bytes = p.mask ? nullptr : bytes_of(p.x, k, b, i);
    e.byte_scale = byte_scale(p.x.unit, T());
    e.x = e.bytes ? nullptr : load(p.x, k, b, i, n, in[1]);
    e.scale = kScale ? load(p.scale, k, b, i, n, in[2]) : nullptr;
    e.weight = p.mask ? load(p.mask, k, b, i, n, in[3]) : nullptr;
    e.grad_recon = target(p.grad_recon, k, b, i, out[0]);
    e.grad_scale = target(p.grad_scale, k, b, i, out[1]);
    e.grad_x = target(p.grad_x, k, b, i, out[2]);
    const int64_t whole = n - n % kLanes, tail = n - whole;
    const auto evaluate_part = [&](const Elements<T>& part, int64_t count, int64_t at) {
      T *value = tile.value + at, *share = tile.share + at;
      if (part.bytes) return log_prob_tile<L, kScale, kGrads, false, true>(part, factor, count, value, share);
      e.weight ? log_prob_tile<L, kScale, kGrads, true, false>(part, factor, count, value, share)
               : log_prob_tile<L, kScale, kGrads, false, false>(part, factor, count, value, share);
    };
    evaluate_part(e, whole, 0);
    if (tail) {  // one more vector, padded: no scalar loop
      alignas(64) T ti[4][kLanes], to[3][kLanes];
      for (int64_t j = 0; j < kLanes; ++j) {
        const bool inside = j < tail;
        ti[0][j] = inside ? e.recon[whole + j] : T(0.5);
        ti[1][j] = !inside ? T(0.5) : e.bytes ? scaled_byte(T(e.bytes[whole + j]), e.byte_scale) : e.x[whole + j];
        if constexpr (kScale) ti[2][j] = inside ? e.scale[whole + j] : T(0);
        ti[3][j] = inside && e.weight ? e.weight[whole + j] : T(0);
      }
      evaluate_part({ti[0], ti[2], ti[1], ti[3], to[0], to[1], to[2], nullptr, {}}, kLanes, whole);
      for (int64_t j = 0; j < tail; ++j) {
        if constexpr (kGrads != Grads::none) e.grad_recon[whole + j] = to[0][j];
        if constexpr (kGrads != Grads::none && kScale) e.grad_scale[whole + j] = to[1][j];
        if constexpr (kGrads == Grads::all) e.grad_x[whole + j] = to[2][j];
      }
    }
    sum += e.weight ? sum_tile<false>(tile, n) : sum_tile<L::kSoftplus>(tile, n);
    store(p.grad_recon, k, b, i, n, e.grad_recon);
    store(p.grad_scale, k, b, i, n, e.grad_scale);
    store(p.grad_x, k, b, i, n, e.grad_x);
  }
  return sum;
}

template <class L, bool kScale, class T>
void log_prob_kernel(const LogProbParams& p, int64_t begin, int64_t end) {
  const int64_t per_row = segments(p.D);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / per_row, k = row / p.B, b = row % p.B;
    const int64_t first = item % per_row * kSegment;
    const int64_t last = first + kSegment < p.D ? first + kSegment : p.D;
    double sum;
    if (p.grad_x) {
      sum = log_prob_segment<L, kScale, Grads::all, T>(p, k, b, first, last);
    } else if (p.grad_recon || p.grad_scale) {
      sum = log_prob_segment<L, kScale, Grads::parameters, T>(p, k, b, first, last);
    } else {
      sum = log_prob_segment<L, kScale, Grads::none, T>(p, k, b, first, last);
    }
    if (p.out) p.out[item] = sum;
  }
}

template <class T>
void scale_row_kernel(void* data, int64_t n, double factor) {
  T* __restrict p = static_cast<T*>(data);
  const T f = T(factor);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) p[i] *= f;
}

}  // namespace fastelbo::FASTELBO_ISA
