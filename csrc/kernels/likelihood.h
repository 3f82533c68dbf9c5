// log p(x | recon) of rows, with its gradient: one pass over recon and x.
//
// Sums run over at most kRun elements in vector lanes of the compute type, then in double: their order depends on D
// and the instruction set alone, never on threads.
#pragma once

#include "kernels/tile.h"
#include "likelihoods/list.h"

namespace fastelbo::FASTELBO_ISA {

enum class Grads { none, parameters, all };

template <class T>
struct Elements {
  const T *recon, *scale, *x, *weight;
  T *grad_recon, *grad_scale, *grad_x;
};

// Sum over n elements; the gradients are factor x d log p. An element of weight 0 counts for nothing, whatever it
// holds.
template <class L, bool kScale, Grads kGrads, bool kWeighted, class T>
inline T log_prob_tile(const Elements<T>& e, T factor, int64_t n) {
  const T* __restrict recon = e.recon;
  const T* __restrict scale = e.scale;
  const T* __restrict x = e.x;
  const T* __restrict weight = e.weight;
  T* __restrict grad_recon = e.grad_recon;
  T* __restrict grad_scale = e.grad_scale;
  T* __restrict grad_x = e.grad_x;
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    // one const value: gcc keeps a struct that is assigned in pieces in memory, and then does not vectorize
    const Terms<T> t = L::eval(recon[i], kScale ? scale[i] : T(0), x[i]);
    const T m = kWeighted ? weight[i] : T(1);
    const bool seen = !kWeighted || m != 0;
    const T w = kWeighted ? factor * m : factor;
    sum += seen ? m * t.value : T(0);
    if constexpr (kGrads != Grads::none) {
      grad_recon[i] = seen ? w * t.d_recon : T(0);
      if constexpr (kScale) grad_scale[i] = seen ? w * t.d_scale : T(0);
    }
    if constexpr (kGrads == Grads::all) grad_x[i] = seen ? w * t.d_x : T(0);
  }
  return sum;
}

// Elements that are added up in the compute type: 32 to a lane of float, 64 of double, whatever the instruction set.
inline constexpr int64_t kRun = FASTELBO_X86_LEVEL == 4 ? 512 : FASTELBO_X86_LEVEL == 3 ? 256 : 128;
static_assert(kTile % kRun == 0 && kRun % kLanes == 0);

template <class L, bool kScale, Grads kGrads, bool kWeighted, class T>
inline double log_prob_runs(const Elements<T>& e, T factor, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i += kRun) {
    const auto from = [i](auto* p) { return p ? p + i : p; };
    const Elements<T> run{from(e.recon),      from(e.scale),      from(e.x),     from(e.weight),
                          from(e.grad_recon), from(e.grad_scale), from(e.grad_x)};
    sum += log_prob_tile<L, kScale, kGrads, kWeighted>(run, factor, n - i < kRun ? n - i : kRun);
  }
  return sum;
}

template <class L, bool kScale, Grads kGrads, class T>
inline double log_prob_segment(const LogProbParams& p, int64_t k, int64_t b, int64_t begin, int64_t end) {
  alignas(64) T in[4][kTile], out[3][kTile];
  const T factor = at<T>(p.grad, k, b);
  double sum = 0;
  for (int64_t i = begin; i < end; i += kTile) {
    const int64_t n = end - i < kTile ? end - i : kTile;
    Elements<T> e;
    e.recon = load(p.recon, k, b, i, n, in[0]);
    e.x = load(p.x, k, b, i, n, in[1]);
    e.scale = kScale ? load(p.scale, k, b, i, n, in[2]) : nullptr;
    e.weight = p.mask ? load(p.mask, k, b, i, n, in[3]) : nullptr;
    e.grad_recon = target(p.grad_recon, k, b, i, out[0]);
    e.grad_scale = target(p.grad_scale, k, b, i, out[1]);
    e.grad_x = target(p.grad_x, k, b, i, out[2]);
    const int64_t whole = n - n % kLanes, tail = n - whole;
    sum += e.weight ? log_prob_runs<L, kScale, kGrads, true>(e, factor, whole)
                    : log_prob_runs<L, kScale, kGrads, false>(e, factor, whole);
    if (tail) {  // one more vector, padded with elements of weight 0: no scalar loop
      alignas(64) T ti[4][kLanes], to[3][kLanes];
      for (int64_t j = 0; j < kLanes; ++j) {
        const bool inside = j < tail;
        ti[0][j] = inside ? e.recon[whole + j] : T(0.5);
        ti[1][j] = inside ? e.x[whole + j] : T(0.5);
        if constexpr (kScale) ti[2][j] = inside ? e.scale[whole + j] : T(0);
        ti[3][j] = inside ? (e.weight ? e.weight[whole + j] : T(1)) : T(0);
      }
      const Elements<T> padded{ti[0], ti[2], ti[1], ti[3], to[0], to[1], to[2]};
      sum += log_prob_tile<L, kScale, kGrads, true>(padded, factor, kLanes);
      for (int64_t j = 0; j < tail; ++j) {
        if constexpr (kGrads != Grads::none) e.grad_recon[whole + j] = to[0][j];
        if constexpr (kGrads != Grads::none && kScale) e.grad_scale[whole + j] = to[1][j];
        if constexpr (kGrads == Grads::all) e.grad_x[whole + j] = to[2][j];
      }
    }
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
