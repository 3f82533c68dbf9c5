// Rows of log p(x | recon) with their gradient, on the device: what likelihood.cu and objective.cu share.
#pragma once

#include "kernels/device.cuh"
#include "likelihoods/list.h"

namespace fastelbo::cuda {

// This thread's part of sum log p over elements [begin, end) of row (k, b); the gradients are factor x d log p.
// Bytes per element in float32: 8 read (recon, x; x is shared by the samples), 4 written with kGrads.
template <class L, bool kScale, bool kGrads, bool kPlain, class T>
__device__ T log_prob_part(const LogProbParams& p, int64_t k, int64_t b, int64_t begin, int64_t end, T factor, int lane,
                           int g) {
  if constexpr (kPlain) {  // is_plain(p): what most training steps are
    const auto row = [k, b](const View& v) { return static_cast<float*>(v.data) + row_of(v, k, b); };
    const auto in = [row](const View& v) { return reinterpret_cast<const float4*>(row(v)); };
    const auto out = [row](const View& v) { return v ? reinterpret_cast<float4*>(row(v)) : nullptr; };
    const float4* __restrict__ recon = in(p.recon);
    const float4* __restrict__ x = in(p.x);
    const float4* __restrict__ scale = kScale ? in(p.scale) : nullptr;
    float4* __restrict__ d_recon = kGrads ? out(p.grad_recon) : nullptr;
    float4* __restrict__ d_scale = kGrads && kScale ? out(p.grad_scale) : nullptr;
    float sum = 0;
#pragma unroll 2
    for (int i = int(begin / 4) + lane; i < int(end / 4); i += g) {
      const float4 r = recon[i], d = x[i], s = kScale ? scale[i] : make_float4(0, 0, 0, 0);
      const Terms<float> t0 = evaluate<L>(r.x, s.x, d.x), t1 = evaluate<L>(r.y, s.y, d.y),
                         t2 = evaluate<L>(r.z, s.z, d.z), t3 = evaluate<L>(r.w, s.w, d.w);
      sum += (t0.value + t1.value) + (t2.value + t3.value);
      if (d_recon) {
        d_recon[i] = make_float4(factor * t0.d_recon, factor * t1.d_recon, factor * t2.d_recon, factor * t3.d_recon);
      }
      if (d_scale) {
        d_scale[i] = make_float4(factor * t0.d_scale, factor * t1.d_scale, factor * t2.d_scale, factor * t3.d_scale);
      }
    }
    return sum;
  }
  const int64_t recon_row = row_of(p.recon, k, b);
  const Pieces pieces(p.recon, recon_row, begin, end);
  T sum = 0;
  for (int64_t c = lane; c < pieces.count(); c += g) {
    int n;
    const int64_t i = pieces.at(c, n);
    T recon[4] = {}, x[4] = {}, scale[4] = {}, weight[4] = {1, 1, 1, 1}, d_recon[4] = {}, d_scale[4] = {}, d_x[4] = {};
    load4(p.recon, recon_row, i, n, recon);
    load4(p.x, row_of(p.x, k, b), i, n, x);
    if constexpr (kScale) load4(p.scale, row_of(p.scale, k, b), i, n, scale);
    if (p.mask) load4(p.mask, row_of(p.mask, k, b), i, n, weight);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j >= n) continue;
      const Terms<T> t = evaluate<L>(recon[j], kScale ? scale[j] : T(0), x[j]);
      const bool seen = weight[j] != 0;  // what lies under a 0 of the mask is never looked at
      const T w = factor * weight[j];
      sum += seen ? weight[j] * t.value : T(0);
      if constexpr (kGrads) {
        d_recon[j] = seen ? w * t.d_recon : T(0);
        d_scale[j] = seen ? w * t.d_scale : T(0);
        d_x[j] = seen ? w * t.d_x : T(0);
      }
    }
    if constexpr (kGrads) {
      if (p.grad_recon) store4(p.grad_recon, row_of(p.grad_recon, k, b), i, n, d_recon);
      if (kScale && p.grad_scale) store4(p.grad_scale, row_of(p.grad_scale, k, b), i, n, d_scale);
      if (p.grad_x) store4(p.grad_x, row_of(p.grad_x, k, b), i, n, d_x);
    }
  }
  return sum;
}

inline bool is_plain(const LogProbParams& p) {
  const int64_t D = p.D;
  return D < (int64_t(1) << 32) && is_plain(p.recon, D) && is_plain(p.x, D) && is_plain(p.scale, D) && !p.mask &&
         is_plain(p.grad_recon, D) && is_plain(p.grad_scale, D) && !p.grad_x;
}

inline bool any_grad(const LogProbParams& p) { return p.grad_recon || p.grad_scale || p.grad_x; }

// Calls f.template operator()<L, kScale, kGrads, kPlain, T>() for what is known at run time only.
template <class F, class... L>
void with_likelihood(TypeList<L...>, int likelihood, bool scale, bool grads, bool plain, bool wide, F f) {
  const auto call = [&]<class Likelihood, bool kScale, bool kGrads>() {
    if (wide) return f.template operator()<Likelihood, kScale, kGrads, false, double>();
    plain ? f.template operator()<Likelihood, kScale, kGrads, true, float>()
          : f.template operator()<Likelihood, kScale, kGrads, false, float>();
  };
  int index = 0;
  const auto one = [&]<class Likelihood>() {
    if (index++ != likelihood) return;
    if constexpr (Likelihood::takes_scale) {
      if (scale) {
        return grads ? call.template operator()<Likelihood, true, true>()
                     : call.template operator()<Likelihood, true, false>();
      }
    }
    grads ? call.template operator()<Likelihood, false, true>() : call.template operator()<Likelihood, false, false>();
  };
  (one.template operator()<L>(), ...);
}

}  // namespace fastelbo::cuda
