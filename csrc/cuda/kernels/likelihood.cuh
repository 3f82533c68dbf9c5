// Rows of log p(x | recon) with their gradient, on the device: what likelihood.cu and objective.cu share.
#pragma once

#include "cuda/kernels/device.cuh"
#include "likelihoods/list.h"

namespace fastelbo::cuda {

// This thread's part of sum log p over elements [begin, end) of row (k, b); the gradients of full size are factor x
// d log p. kCount parameters are given.
// Bytes per element in float32: 4 read for every parameter, 4 for x, which the samples share; 4 written per gradient.
template <class L, int kCount, bool kGrads, bool kPlain, class T>
__device__ T log_prob_part(const LogProbParams& p, int64_t k, int64_t b, int64_t begin, int64_t end, T factor, int lane,
                           int g) {
  if constexpr (kPlain) {  // is_plain(p): what most training steps are
    const auto row = [k, b](const View& v) { return static_cast<float*>(v.data) + row_of(v, k, b); };
    const auto in = [row](const View& v) { return reinterpret_cast<const float4*>(row(v)); };
    const auto out = [row](const View& v) { return v ? reinterpret_cast<float4*>(row(v)) : nullptr; };
    const float4* __restrict__ first = in(p.parameter[0]);
    const float4* __restrict__ second = kCount > 1 ? in(p.parameter[1]) : nullptr;
    const float4* __restrict__ third = kCount > 2 ? in(p.parameter[2]) : nullptr;
    const float4* __restrict__ x = in(p.x);
    float4* __restrict__ d_first = kGrads ? out(p.grad[0]) : nullptr;
    float4* __restrict__ d_second = kGrads && kCount > 1 ? out(p.grad[1]) : nullptr;
    float4* __restrict__ d_third = kGrads && kCount > 2 ? out(p.grad[2]) : nullptr;
    const float4 zero = make_float4(0, 0, 0, 0);
    float sum = 0;
#pragma unroll 2
    for (int i = int(begin / 4) + lane; i < int(end / 4); i += g) {
      const float4 u = first[i], v = kCount > 1 ? second[i] : zero, w = kCount > 2 ? third[i] : zero, d = x[i];
      const Terms<float> t0 = evaluate<L>(u.x, v.x, w.x, d.x), t1 = evaluate<L>(u.y, v.y, w.y, d.y),
                         t2 = evaluate<L>(u.z, v.z, w.z, d.z), t3 = evaluate<L>(u.w, v.w, w.w, d.w);
      sum += (t0.value + t1.value) + (t2.value + t3.value);
      if (d_first) {
        d_first[i] = make_float4(factor * t0.d_first, factor * t1.d_first, factor * t2.d_first, factor * t3.d_first);
      }
      if (d_second) {
        d_second[i] =
            make_float4(factor * t0.d_second, factor * t1.d_second, factor * t2.d_second, factor * t3.d_second);
      }
      if (d_third) {
        d_third[i] = make_float4(factor * t0.d_third, factor * t1.d_third, factor * t2.d_third, factor * t3.d_third);
      }
    }
    return sum;
  }
  const int64_t row = row_of(p.parameter[0], k, b);
  const Pieces pieces(p.parameter[0], row, begin, end);
  T sum = 0;
  for (int64_t c = lane; c < pieces.count(); c += g) {
    int n;
    const int64_t i = pieces.at(c, n);
    T first[4] = {}, second[4] = {}, third[4] = {}, x[4] = {}, weight[4] = {1, 1, 1, 1};
    T d_first[4] = {}, d_second[4] = {}, d_third[4] = {}, d_x[4] = {};
    load4(p.parameter[0], row, i, n, first);
    if constexpr (kCount > 1) load4(p.parameter[1], row_of(p.parameter[1], k, b), i, n, second);
    if constexpr (kCount > 2) load4(p.parameter[2], row_of(p.parameter[2], k, b), i, n, third);
    load4(p.x, row_of(p.x, k, b), i, n, x);
    if (p.mask) load4(p.mask, row_of(p.mask, k, b), i, n, weight);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j >= n) continue;
      const Terms<T> t = evaluate<L>(first[j], second[j], third[j], x[j]);
      const bool seen = weight[j] != 0;  // what lies under a 0 of the mask is never looked at
      const T w = factor * weight[j];
      sum += seen ? weight[j] * t.value : T(0);
      if constexpr (kGrads) {
        d_first[j] = seen ? w * t.d_first : T(0);
        d_second[j] = seen ? w * t.d_second : T(0);
        d_third[j] = seen ? w * t.d_third : T(0);
        d_x[j] = seen ? w * t.d_x : T(0);
      }
    }
    if constexpr (kGrads) {
      if (p.grad[0]) store4(p.grad[0], row_of(p.grad[0], k, b), i, n, d_first);
      if (kCount > 1 && p.grad[1]) store4(p.grad[1], row_of(p.grad[1], k, b), i, n, d_second);
      if (kCount > 2 && p.grad[2]) store4(p.grad[2], row_of(p.grad[2], k, b), i, n, d_third);
      if (p.grad_x) store4(p.grad_x, row_of(p.grad_x, k, b), i, n, d_x);
    }
  }
  return sum;
}

inline bool is_plain(const LogProbParams& p) {
  bool plain = p.D < (int64_t(1) << 32) && is_plain(p.x, p.D) && !p.mask && !p.grad_x;
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

// The same, and f.template operator()<L, kCount, kGrads, kPlain, T>() for the rows of p.
template <class F>
void with_rows(const LogProbParams& p, int likelihood, bool is_double, F f) {
  const bool plain = is_plain(p);
  with_likelihood(Likelihoods{}, likelihood, p.count, [&]<class L, int kCount>() {
    const auto call = [&]<bool kGrads>() {
      if (is_double) return f.template operator()<L, kCount, kGrads, false, double>();
      plain ? f.template operator()<L, kCount, kGrads, true, float>()
            : f.template operator()<L, kCount, kGrads, false, float>();
    };
    p.any_grad() ? call.template operator()<true>() : call.template operator()<false>();
  });
}

}  // namespace fastelbo::cuda
