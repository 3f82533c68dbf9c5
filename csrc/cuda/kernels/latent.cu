// Samples of q with their log ratio and KL, and the gradients of all of it, on the device.
//
// Forward, float32: 4 bytes written per element of z; mu and logvar come from the cache after the first sample.
// Backward: 4 bytes read per element of grad_z; the noise is drawn again, never stored or read.
#include "kernels/latent.cuh"
#include "math/philox.h"

namespace fastelbo::cuda {
namespace {

// The four normals of a counter, which are those of elements 4 counter .. 4 counter + 3.
inline __device__ void normals(uint64_t seed, uint64_t counter, float* to) {
  const Words w = philox(seed, uint32_t(counter), uint32_t(counter >> 32));
  const NormalPair a = box_muller(w.w0, w.w1), b = box_muller(w.w2, w.w3);
  to[0] = a.first, to[1] = a.second, to[2] = b.first, to[3] = b.second;
}

// A group takes row (k, b): z and the log ratio; the rows of k = 0 also have the KL.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) samples_kernel(SamplesParams q, int g) {
  const SampleParams& p = q.p;
  const int per_block = kThreads / g, lane = int(threadIdx.x) % g, group = int(threadIdx.x) / g;
  const uint64_t seed = q.seed ? uint64_t(*q.seed) : 0;
  const int64_t rows = p.K * p.B;
  for (int64_t base = int64_t(blockIdx.x) * per_block; base < rows; base += int64_t(gridDim.x) * per_block) {
    const int64_t row = base + group, k = row / p.B, b = row % p.B;
    T ratio = 0, kl = 0;
    if (row < rows) {
      // the counters whose numbers the row's elements take; the first and the last may belong to two rows
      const int64_t start = ((p.first_sample + k) * p.B + b) * p.D;
      const int64_t counters = p.D ? (start + p.D + 3) / 4 - start / 4 : 0;
      for (int64_t c = lane; c < counters; c += g) {
        float noise[4];
        if (!p.eps) normals(seed, uint64_t(start / 4 + c), noise);
        const int64_t first = 4 * (start / 4 + c) - start;  // the column of noise[0]; negative in front of the row
        T z[4] = {};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int64_t i = first + j;
          if (i < 0 || i >= p.D) continue;
          const T e = p.eps ? load_at<T>(p.eps, row_of(p.eps, k, b) + offset_of(p.eps, i)) : T(noise[j]);
          const Latent<T> l(p, b, i);
          const T step = exp_full(T(0.5) * l.logvar) * e, from_prior = l.delta + step;
          z[j] = l.mu + step;
          ratio += T(0.5) * (l.t + (e * e - from_prior * from_prior * l.inv_p));
        }
        const int64_t to = row_of(p.z, k, b);
        if (first >= 0 && first + 4 <= p.D) {
          store4(p.z, to, first, 4, z);
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (first + j >= 0 && first + j < p.D) store_at<T>(p.z, to + offset_of(p.z, first + j), z[j]);
          }
        }
      }
    }
    if (row < rows && k == 0 && q.kl) {
      for (int64_t i = lane; i < p.D; i += g) kl += Latent<T>(p, b, i).kl().value;
    }
    ratio = group_sum(ratio, g);
    kl = group_sum(kl, g);
    if (row < rows && lane == 0) {
      static_cast<T*>(q.log_ratio)[row] = ratio;
      if (k == 0 && q.kl) static_cast<T*>(q.kl)[b] = kl;
    }
  }
}

// A block has 32 pieces of four columns and kSlices slices of the samples; a thread adds up its samples, then the
// slices are added in order. The formulas are those of sample_backward_kernel in latent.h.
constexpr int kSlices = kThreads / 32;
template <class T>
struct Sums {
  T mu = 0, logvar = 0, prior_mu = 0, prior_logvar = 0;
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2) samples_backward_kernel(SamplesBackwardParams q) {
  __shared__ Sums<T> slices[kSlices][32];
  const SampleBackwardParams& p = q.p;
  const int piece = int(threadIdx.x) % 32, slice = int(threadIdx.x) / 32;
  const uint64_t seed = q.seed ? uint64_t(*q.seed) : 0;
  const bool prior = p.grad_prior_mu || p.grad_prior_logvar, ratio = p.grad_log_ratio.data, gated = p.gate_path.data;
  const int64_t elements = p.B * p.D, pieces = (elements + 3) / 4;
  for (int64_t base = int64_t(blockIdx.x) * 32; base < pieces; base += int64_t(gridDim.x) * 32) {
    const int64_t first = 4 * (base + piece);
    const int n = elements - first < 4 ? int(elements - first > 0 ? elements - first : 0) : 4;
    Sums<T> sums[4];
    for (int64_t k = slice; k < p.K && n > 0; k += kSlices) {
      const int64_t index = (p.first_sample + k) * elements + first;  // a multiple of four more `skip`
      const int skip = int(index & 3);
      float noise[4] = {}, next[4] = {};
      if (!p.eps) {
        normals(seed, uint64_t(index >> 2), noise);
        if (skip) {
          normals(seed, uint64_t(index >> 2) + 1, next);
          for (int s = 0; s < skip; ++s) {  // in registers: an index that varies would put them in memory
            noise[0] = noise[1], noise[1] = noise[2], noise[2] = noise[3], noise[3] = next[0];
            next[0] = next[1], next[1] = next[2], next[2] = next[3];
          }
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j >= n) continue;
        const int64_t b = (first + j) / p.D, i = (first + j) % p.D;
        const Latent<T> l(p, b, i);
        const T e = p.eps ? load_at<T>(p.eps, row_of(p.eps, k, b) + offset_of(p.eps, i)) : T(noise[j]);
        const T gz = p.grad_z ? load_at<T>(p.grad_z, row_of(p.grad_z, k, b) + offset_of(p.grad_z, i)) : T(0);
        const T up = ratio ? at<T>(p.grad_log_ratio, k, b) : T(0);
        const T std = exp_full(T(0.5) * l.logvar), step = std * e, from_prior = l.delta + step;
        const T slope = ratio ? up * from_prior * l.inv_p : T(0);  // 0 x infinity is never formed
        T grad_eps;
        if (gated) {
          const T path = 1 + at<T>(p.gate_path, k, b), score = 1 + at<T>(p.gate_score, k, b);
          const T g = path * (gz - slope), of_q = up * (path - score);
          sums[j].mu += g + of_q * e / std;
          sums[j].logvar += T(0.5) * (g * step + (of_q * e * e + up * score));
          grad_eps = g * std + up * path * e;
        } else {
          const T g = gz - slope;
          sums[j].mu += g;
          sums[j].logvar += T(0.5) * (ratio ? g * step + up : g * step);
          grad_eps = ratio ? g * std + up * e : g * std;
        }
        if (ratio && prior) {
          sums[j].prior_mu += slope;
          sums[j].prior_logvar += T(0.5) * (slope * from_prior - up);
        }
        if (p.grad_eps) store_at<T>(p.grad_eps, row_of(p.grad_eps, k, b) + offset_of(p.grad_eps, i), grad_eps);
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      slices[slice][piece] = sums[j];
      __syncthreads();
      if (slice == 0 && j < n) {
        double mu = 0, logvar = 0, prior_mu = 0, prior_logvar = 0;
        for (int s = 0; s < kSlices; ++s) {
          const Sums<T>& part = slices[s][piece];
          mu += part.mu, logvar += part.logvar, prior_mu += part.prior_mu, prior_logvar += part.prior_logvar;
        }
        const int64_t b = (first + j) / p.D, i = (first + j) % p.D;
        if (p.grad_kl.data) {
          const T up = at<T>(p.grad_kl, 0, b);
          const KlTerm<T> kl = Latent<T>(p, b, i).kl();
          mu += up * kl.d_mu, logvar += up * kl.d_logvar;
          prior_mu += up * kl.d_prior_mu, prior_logvar += up * kl.d_prior_logvar;
        }
        store_one(p.grad_mu, b, i, T(mu));
        store_one(p.grad_logvar, b, i, T(logvar));
        store_one(p.grad_prior_mu, b, i, T(prior_mu));
        store_one(p.grad_prior_logvar, b, i, T(prior_logvar));
      }
      __syncthreads();
    }
  }
}

// A block takes one latent dimension: the mean of its KL over the batch.
template <class T>
__global__ void __launch_bounds__(kThreads) kl_dims_kernel(KlDimsParams p) {
  for (int64_t i = blockIdx.x; i < p.D; i += gridDim.x) {
    double sum = 0;
    for (int64_t b = threadIdx.x; b < p.B; b += kThreads) sum += double(Latent<T>(p, b, i).kl().value);
    sum = group_sum(sum, kThreads);
    if (threadIdx.x == 0) p.out[i] = sum / double(p.B);
  }
}

}  // namespace

void launch_samples(const SamplesParams& p, bool wide, cudaStream_t stream) {
  const int64_t rows = p.p.K * p.p.B;
  const int g = group_size(p.p.D, kMaxBlocks * kThreads);  // by D alone: samples in chunks are those of the whole
  const int64_t blocks = blocks_for(rows, kThreads / g);
  wide ? launch(samples_kernel<double>, blocks, stream, p, g) : launch(samples_kernel<float>, blocks, stream, p, g);
}

void launch_samples_backward(const SamplesBackwardParams& p, bool wide, cudaStream_t stream) {
  const int64_t blocks = blocks_for((p.p.B * p.p.D + 3) / 4, 32);
  wide ? launch(samples_backward_kernel<double>, blocks, stream, p)
       : launch(samples_backward_kernel<float>, blocks, stream, p);
}

void launch_kl_dims(const KlDimsParams& p, bool wide, cudaStream_t stream) {
  const int64_t blocks = blocks_for(p.D, 1);
  wide ? launch(kl_dims_kernel<double>, blocks, stream, p) : launch(kl_dims_kernel<float>, blocks, stream, p);
}

}  // namespace fastelbo::cuda
