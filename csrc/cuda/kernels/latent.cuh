// KL of rows on the device: what latent.cu and likelihood.cu share.
#pragma once

#include "cuda/kernels/device.cuh"
#include "math/kl.h"

namespace fastelbo::cuda {

// One element of q and of the prior.
template <class T>
struct Latent {
  T mu, logvar, delta, t, inv_std_p;  // delta = mu - mu_p, t = lv - lv_p, inv_std_p = exp(-lv_p / 2)

  __device__ Latent(const Latents& p, int64_t b, int64_t i) {
    mu = load_at<T>(p.mu, row_of(p.mu, 0, b) + offset_of(p.mu, i));
    logvar = load_at<T>(p.logvar, row_of(p.logvar, 0, b) + offset_of(p.logvar, i));
    delta = mu, t = logvar, inv_std_p = 1;
    if (p.prior_mu) delta -= load_at<T>(p.prior_mu, row_of(p.prior_mu, 0, b) + offset_of(p.prior_mu, i));
    if (p.prior_logvar) {
      const T lv_p = load_at<T>(p.prior_logvar, row_of(p.prior_logvar, 0, b) + offset_of(p.prior_logvar, i));
      t -= lv_p, inv_std_p = exp_full(T(-0.5) * lv_p);
    }
  }
  __device__ KlTerm<T> kl() const { return kl_term(delta, t, exp_full(t), inv_std_p); }
};

template <class T>
__device__ void store_one(const View& v, int64_t b, int64_t i, T value) {
  if (v) store_at<T>(v, row_of(v, 0, b) + offset_of(v, i), value);
}

// KL of all rows of the grid with its gradient times `factor`. -> the sum over this thread's rows, in one thread per
// row, of the KL (with free bits where there are any).
template <class T>
__device__ double kl_rows(const KlParams& p, T factor, void* out, void* floored_out, int g) {
  const int per_block = kThreads / g, lane = int(threadIdx.x) % g, group = int(threadIdx.x) / g;
  const bool grads = p.grad.any();
  const double free_bits = read(p.free_bits);
  double total = 0;
  for (int64_t base = int64_t(blockIdx.x) * per_block; base < p.q.B; base += int64_t(gridDim.x) * per_block) {
    const int64_t b = base + group;
    T sum = 0, floored = 0;
    int64_t below = 0;  // floors are counted: the roundings of a sum of equal numbers all go the same way
    if (b < p.q.B) {
      const T up = factor * row_number<T>(p.factor, 0, b);
      for (int64_t i = lane; i < p.q.D; i += g) {
        const KlTerm<T> k = Latent<T>(p.q, b, i).kl();
        const bool free = p.dim_means && p.dim_means[i] < free_bits;  // NaN is not below the floor
        sum += k.value;
        floored += free ? T(0) : k.value;
        below += free;
        if (!grads) continue;
        store_one(p.grad.mu, b, i, free ? T(0) : times(up, k.d_mu));
        store_one(p.grad.logvar, b, i, free ? T(0) : times(up, k.d_logvar));
        store_one(p.grad.prior_mu, b, i, free ? T(0) : times(up, k.d_prior_mu));
        store_one(p.grad.prior_logvar, b, i, free ? T(0) : times(up, k.d_prior_logvar));
      }
    }
    sum = group_sum(sum, g);
    floored = T(group_sum(double(floored) + free_bits * double(below), g));
    if (b < p.q.B && lane == 0) {
      if (out) static_cast<T*>(out)[b] = sum;
      if (floored_out) static_cast<T*>(floored_out)[b] = floored;
      total += double(floored);
    }
  }
  return total;
}

}  // namespace fastelbo::cuda
