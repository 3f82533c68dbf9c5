// Rows of log p(x | recon) with their gradient, on the device: what likelihood.cu and objective.cu share.
#pragma once

#include "cuda/kernels/device.cuh"
#include "likelihoods/list.h"

namespace fastelbo::cuda {

// This thread's part of sum log p over elements [begin, end) of row (k, b); the gradients of full size are factor x
// d log p. kCount parameters are given.
// Bytes per element in float32, in words of 16: 4 read for every parameter, 4 for x, which the samples share; 4 written
// per gradient.
template <class L, int kCount, bool kGrads, bool kPlain, class T>
__device__ T log_prob_part(const LogProbParams& p, int64_t k, int64_t b, int64_t begin, int64_t end, T factor, int lane,
                           int g) {
  const T added = T(p.added);
  if constexpr (kPlain) {  // is_plain(p): what most training steps are
    const auto at = [k, b](const View& v, int64_t i) { return row_of(v, k, b) + i; };
    float sum = 0;
    for (int64_t i = begin + 8 * lane; i < end; i += 8 * g) {
      Run in[kCount], out[kCount], of_x;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float u[kCount][4], x[4], grad[kCount][4];
#pragma unroll
        for (int c = 0; c < kCount; ++c) in[c].read(p.parameter[c], at(p.parameter[c], i), half, u[c]);
        of_x.read(p.x, at(p.x, i), half, x);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const Terms<float> t =
              with_indices<kCount>([&]<int... c>() { return evaluate<L>(Element<float>{{u[c][j]...}, x[j], added}); });
          sum += t.value;
          with_indices<kCount>([&]<int... c>() { ((grad[c][j] = factor * t.d.template get<c>()), ...); });
        }
        if constexpr (kGrads) {
#pragma unroll
          for (int c = 0; c < kCount; ++c) {
            if (p.grad[c]) out[c].write(p.grad[c], at(p.grad[c], i), half, grad[c]);
          }
        }
      }
    }
    return sum;
  }
  const int64_t row = row_of(p.parameter[0], k, b);
  const Pieces pieces(p.parameter[0], row, begin, end);
  T sum = 0;
  for (int64_t piece = lane; piece < pieces.count(); piece += g) {
    int n;
    const int64_t i = pieces.at(piece, n);
    T in[kCount][4] = {}, x[4] = {}, weight[4] = {1, 1, 1, 1}, grad[kCount][4] = {}, grad_x[4] = {}, value[4] = {};
#pragma unroll
    for (int c = 0; c < kCount; ++c) load4(p.parameter[c], row_of(p.parameter[c], k, b), i, n, in[c]);
    load4(p.x, row_of(p.x, k, b), i, n, x);
    if (p.mask) load4(p.mask, row_of(p.mask, k, b), i, n, weight);
#pragma unroll(L::kLong ? 1 : 4)
    for (int j = 0; j < 4; ++j) {
      if (j >= n) continue;
      const Terms<T> t =
          with_indices<kCount>([&]<int... c>() { return evaluate<L>(Element<T>{{in[c][j]...}, x[j], added}); });
      const bool seen = weight[j] != 0;  // what lies under a 0 of the mask is never looked at
      const T w = factor * weight[j];
      value[j] = seen ? weight[j] * t.value : T(0);
      sum += value[j];
      with_indices<kCount>([&]<int... c>() { ((grad[c][j] = seen ? w * t.d.template get<c>() : T(0)), ...); });
      grad_x[j] = seen ? w * t.d_x : T(0);
    }
#pragma unroll
    for (int c = 0; kGrads && c < kCount; ++c) {
      if (p.grad[c]) store4(p.grad[c], row_of(p.grad[c], k, b), i, n, grad[c]);
    }
    if (kGrads && p.grad_x) store4(p.grad_x, row_of(p.grad_x, k, b), i, n, grad_x);
    if (p.value) store4(p.value, row_of(p.value, k, b), i, n, value);
  }
  return sum;
}

// Blocks that a multiprocessor holds at a time: three parameters, and counts of two, need more registers than three
// blocks leave.
template <class L, int kCount, bool kPlain>
inline constexpr int kBlocks = kPlain && kCount < 3 && !(kCount > 1 && L::kDomain == Domain::counts) ? kRowBlocks : 2;

inline bool is_plain(const LogProbParams& p) {
  bool plain = is_plain(p.x, p.D) && !p.mask && !p.grad_x && !p.value;
  for (int i = 0; i < p.count; ++i) plain &= is_plain(p.parameter[i], p.D) && is_plain(p.grad[i], p.D);
  return plain;
}

// Calls f.template operator()<L, kCount>() for what is known at run time only.
template <class L, int kCount, class F>
void with_count(int count, F f) {
  if (count == kCount) return f.template operator()<L, kCount>();
  if constexpr (kCount < kParameters<L>) with_count<L, kCount + 1>(count, f);
}
template <class F, class... L>
void with_likelihood(TypeList<L...>, int likelihood, int count, F f) {
  int index = 0;
  const auto one = [&]<class Likelihood>() {
    if (index++ == likelihood) with_count<Likelihood, Likelihood::kFewest>(count, f);
  };
  (one.template operator()<L>(), ...);
}

// scripts/ptxas_table.py --main: without those of float64 and of rare layouts, which are two thirds of the kernels.
#ifdef FASTELBO_MAIN_KERNELS
inline constexpr bool kMainAlone = true;
#else
inline constexpr bool kMainAlone = false;
#endif

// The same, and f.template operator()<L, kCount, kGrads, kPlain, T>() for the rows of p. What is not plain computes
// gradients, and stores those that are wanted: a third of the kernels less, which take most of the build.
template <class F>
void with_rows(const LogProbParams& p, int likelihood, bool is_double, F f) {
  const bool plain = is_plain(p), grads = p.any_grad();
  with_likelihood(Likelihoods{}, likelihood, p.count, [&]<class L, int kCount>() {
    if constexpr (kMainAlone && L::kByElement) {
      f.template operator()<L, kCount, true, false, float>();
    } else if constexpr (kMainAlone) {
      grads ? f.template operator()<L, kCount, true, true, float>()
            : f.template operator()<L, kCount, false, true, float>();
    } else if constexpr (L::kByElement) {
      is_double ? f.template operator()<L, kCount, true, false, double>()
                : f.template operator()<L, kCount, true, false, float>();
    } else {
      is_double ? f.template operator()<L, kCount, true, false, double>()
      : !plain  ? f.template operator()<L, kCount, true, false, float>()
      : grads   ? f.template operator()<L, kCount, true, true, float>()
                : f.template operator()<L, kCount, false, true, float>();
    }
  });
}

}  // namespace fastelbo::cuda
