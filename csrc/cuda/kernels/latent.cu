// Samples of q with their log ratio and KL, and the gradients of all of it, on the device.
//
// Forward, float32: 4 bytes written per element of z; mu and logvar come from the cache after the first sample.
// Backward: 4 bytes read per element of grad_z; the noise is drawn again, never stored or read.
#include "cuda/kernels/latent.cuh"
#include "math/latent.h"
#include "math/philox.h"

namespace fastelbo::cuda {
namespace {

// The four normals of a counter, which are those of elements 4 counter .. 4 counter + 3.
inline __device__ void normals(uint64_t seed, uint64_t counter, float* to) {
  const Words w = philox(seed, uint32_t(counter), uint32_t(counter >> 32));
  const NormalPair a = box_muller(w.w0, w.w1), b = box_muller(w.w2, w.w3);
  to[0] = a.first, to[1] = a.second, to[2] = b.first, to[3] = b.second;
}

// A row of samples, its noise from `eps` or from element `start` on: z, and this thread's part of the log ratio.
template <class T>
__device__ T draw_row(const Latents& q, int64_t b, uint64_t seed, int64_t start, const View& eps, int64_t eps_row,
                      const View& z_out, int64_t to, int lane, int g) {
  // the counters whose numbers the row's elements take; the first and the last may belong to two rows
  const int64_t counters = q.D ? (start + q.D + 3) / 4 - start / 4 : 0;
  T ratio = 0;
  for (int64_t c = lane; c < counters; c += g) {
    float noise[4];
    if (!eps) normals(seed, uint64_t(start / 4 + c), noise);
    const int64_t first = 4 * (start / 4 + c) - start;  // the column of noise[0]; negative in front of the row
    T z[4] = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t i = first + j;
      if (i < 0 || i >= q.D) continue;
      const T e = eps ? load_at<T>(eps, eps_row + offset_of(eps, i)) : T(noise[j]);
      const Latent<T> l(q, b, i);
      const Sample<T> s = sample(l.mu, l.delta, l.t, exp_full(T(0.5) * l.logvar), l.inv_std_p, e);
      z[j] = s.z;
      ratio += s.log_ratio;
    }
    if (first >= 0 && first + 4 <= q.D) {
      store4(z_out, to, first, 4, z);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (first + j >= 0 && first + j < q.D) store_at<T>(z_out, to + offset_of(z_out, first + j), z[j]);
      }
    }
  }
  return ratio;
}

// A group takes row (k, b): z and the log ratio; the rows of k = 0 also have the KL.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) samples_kernel(SampleParams p, T* log_ratio, T* kl_out, int g) {
  const int per_block = kThreads / g, lane = int(threadIdx.x) % g, group = int(threadIdx.x) / g;
  const uint64_t seed = p.seed ? uint64_t(*p.seed) : 0;
  const int64_t rows = p.K * p.q.B;
  for (int64_t base = int64_t(blockIdx.x) * per_block; base < rows; base += int64_t(gridDim.x) * per_block) {
    const int64_t row = base + group, k = row / p.q.B, b = row % p.q.B;
    T ratio = 0, kl = 0;
    if (row < rows) {
      const int64_t start = ((p.first_sample + k) * p.q.B + b) * p.q.D;
      ratio = draw_row<T>(p.q, b, seed, start, p.eps, row_of(p.eps, k, b), p.z, row_of(p.z, k, b), lane, g);
    }
    if (row < rows && k == 0) {
      for (int64_t i = lane; i < p.q.D; i += g) kl += Latent<T>(p.q, b, i).kl().value;
    }
    ratio = group_sum(ratio, g);
    kl = group_sum(kl, g);
    if (row < rows && lane == 0) {
      log_ratio[row] = ratio;
      if (k == 0) kl_out[b] = kl;
    }
  }
}

// A group takes row i: z and the log ratio. Nothing waits for the device, so that an index out of range gives NaN.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) samples_kept_kernel(KeptParams p, T* log_ratio, int g) {
  const int per_block = kThreads / g, lane = int(threadIdx.x) % g, group = int(threadIdx.x) / g;
  for (int64_t base = int64_t(blockIdx.x) * per_block; base < p.n; base += int64_t(gridDim.x) * per_block) {
    const int64_t row = base + group, b = row < p.n ? p.datum[row] : -1;
    T ratio = 0;
    if (row < p.n && b >= 0 && b < p.q.B) {
      const int64_t start = (p.sample[row] * p.q.B + b) * p.q.D, to = row_of(p.z, 0, row);
      ratio = draw_row<T>(p.q, b, uint64_t(*p.seed), start, View{}, 0, p.z, to, lane, g);
    } else if (row < p.n) {
      ratio = T(NAN);
      for (int64_t i = lane; i < p.q.D; i += g) store_one(p.z, row, i, ratio);
    }
    ratio = group_sum(ratio, g);
    if (row < p.n && lane == 0) log_ratio[row] = ratio;
  }
}

// Of one element of sample (k, b), drawn with noise e: its gradients from grad_z (gz) and from the log ratio.
template <class T, class P>
__device__ SampleGrad<T> grad_of_sample(const P& p, int64_t k, int64_t b, T gz, T delta, T std, T inv_std_p, T e) {
  if (!p.grad_log_ratio.data && !p.gate_path.data) return sample_grad(gz, std, e);
  const T up = p.grad_log_ratio.data ? row_number<T>(p.grad_log_ratio, k, b) : T(0);
  if (!p.gate_path.data) return sample_grad(gz, up, delta, std, inv_std_p, e);
  const T path = 1 + row_number<T>(p.gate_path, k, b), score = 1 + row_number<T>(p.gate_score, k, b);
  return gated_sample_grad(gz, up, path, score, delta, std, inv_std_p, e);
}

// A thread takes one element of a datum, and adds up its rows in their order.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) samples_kept_backward_kernel(KeptBackwardParams p) {
  const bool prior = p.grad.prior(), ratio = p.grad_log_ratio.data;
  const int64_t elements = p.q.B * p.q.D;
  for (int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x; at < elements; at += int64_t(gridDim.x) * kThreads) {
    const int64_t b = at / p.q.D, i = at % p.q.D;
    const Latent<T> l(p.q, b, i);
    const T std = exp_full(T(0.5) * l.logvar);
    double mu = 0, logvar = 0, prior_mu = 0, prior_logvar = 0;
    for (int64_t next = p.starts[b]; next < p.starts[b + 1]; ++next) {
      const int64_t row = p.order[next], index = p.sample[row] * elements + at;
      float noise[4];
      normals(uint64_t(*p.seed), uint64_t(index) >> 2, noise);
      const int s = int(index & 3);  // no index that varies: it would put the numbers in memory
      const T e = s == 0 ? noise[0] : s == 1 ? noise[1] : s == 2 ? noise[2] : noise[3];
      const T gz = p.grad_z ? load_at<T>(p.grad_z, row_of(p.grad_z, 0, row) + offset_of(p.grad_z, i)) : T(0);
      const SampleGrad<T> g = grad_of_sample(p, 0, row, gz, l.delta, std, l.inv_std_p, e);
      mu += g.mu, logvar += g.logvar;
      if (ratio && prior) prior_mu += g.prior_mu, prior_logvar += g.prior_logvar;
    }
    store_one(p.grad.mu, b, i, T(mu));
    store_one(p.grad.logvar, b, i, T(logvar));
    store_one(p.grad.prior_mu, b, i, T(prior_mu));
    store_one(p.grad.prior_logvar, b, i, T(prior_logvar));
  }
}

// A block has kPieces pieces of four columns and a slice of the samples for each of its other threads; a thread adds up
// its samples, then the slices are added in order.
template <class T>
struct Sums {
  T mu = 0, logvar = 0, prior_mu = 0, prior_logvar = 0;
};

// What all samples of one element share.
template <class T>
struct Column {
  int64_t b = 0, grad_z = 0, eps = 0, grad_eps = 0;  // the datum; where its first sample is in the views
  T delta = 0, std = 0, inv_std_p = 0;

  Column() = default;
  __device__ Column(const SampleBackwardParams& p, int64_t at) : b(at / p.q.D) {
    const int64_t i = at % p.q.D;
    const Latent<T> l(p.q, b, i);
    delta = l.delta, std = exp_full(T(0.5) * l.logvar), inv_std_p = l.inv_std_p;
    if (p.grad_z) grad_z = row_of(p.grad_z, 0, b) + offset_of(p.grad_z, i);
    if (p.eps) eps = row_of(p.eps, 0, b) + offset_of(p.eps, i);
    if (p.grad_eps) grad_eps = row_of(p.grad_eps, 0, b) + offset_of(p.grad_eps, i);
  }
};

template <class T, int kPieces>
__global__ void __launch_bounds__(kThreads, 2) samples_backward_kernel(SampleBackwardParams p) {
  constexpr int kSlices = kThreads / kPieces;
  __shared__ Sums<T> slices[kSlices][kPieces];
  const int piece = int(threadIdx.x) % kPieces, slice = int(threadIdx.x) / kPieces;
  const uint64_t seed = p.seed ? uint64_t(*p.seed) : 0;
  const bool prior = p.grad.prior(), ratio = p.grad_log_ratio.data;
  const int64_t elements = p.q.B * p.q.D, pieces = (elements + 3) / 4;
  for (int64_t base = int64_t(blockIdx.x) * kPieces; base < pieces; base += int64_t(gridDim.x) * kPieces) {
    const int64_t first = 4 * (base + piece);
    const int n = elements - first < 4 ? int(elements - first > 0 ? elements - first : 0) : 4;
    Sums<T> sums[4];
    Column<T> columns[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j < n) columns[j] = Column<T>(p, first + j);
    }
    for (int64_t turn = 0; turn < p.K; turn += kSlices) {  // as many in every thread: they shuffle
      const int64_t k = turn + slice;
      float noise[4] = {};
      if (!p.eps) {
        const int64_t index = (p.first_sample + k) * elements + first;  // a multiple of four more `skip`
        const int skip = int(index & 3);
        normals(seed, uint64_t(index >> 2), noise);
        if (elements & 3) {  // the numbers of two counters, of which the second is the next piece's first
          float next[4];
#pragma unroll
          for (int s = 0; s < 4; ++s) next[s] = __shfl_down_sync(0xffffffffu, noise[s], 1);
          if (skip && piece == kPieces - 1) normals(seed, uint64_t(index >> 2) + 1, next);
          for (int s = 0; s < skip; ++s) {  // in registers: an index that varies would put them in memory
            noise[0] = noise[1], noise[1] = noise[2], noise[2] = noise[3], noise[3] = next[0];
            next[0] = next[1], next[1] = next[2], next[2] = next[3];
          }
        }
      }
      if (k >= p.K) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j >= n) continue;
        const Column<T>& c = columns[j];
        const T e = p.eps ? load_at<T>(p.eps, k * p.eps.stride_k + c.eps) : T(noise[j]);
        const T gz = p.grad_z ? load_at<T>(p.grad_z, k * p.grad_z.stride_k + c.grad_z) : T(0);
        const SampleGrad<T> g = grad_of_sample(p, k, c.b, gz, c.delta, c.std, c.inv_std_p, e);
        sums[j].mu += g.mu;
        sums[j].logvar += g.logvar;
        if (ratio && prior) {
          sums[j].prior_mu += g.prior_mu;
          sums[j].prior_logvar += g.prior_logvar;
        }
        if (p.grad_eps) store_at<T>(p.grad_eps, k * p.grad_eps.stride_k + c.grad_eps, g.eps);
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
        const int64_t b = (first + j) / p.q.D, i = (first + j) % p.q.D;
        if (p.grad_kl.data) {
          const T up = row_number<T>(p.grad_kl, 0, b);
          const KlTerm<T> kl = Latent<T>(p.q, b, i).kl();
          mu += times(up, kl.d_mu), logvar += times(up, kl.d_logvar);
          prior_mu += times(up, kl.d_prior_mu), prior_logvar += times(up, kl.d_prior_logvar);
        }
        store_one(p.grad.mu, b, i, T(mu));
        store_one(p.grad.logvar, b, i, T(logvar));
        store_one(p.grad.prior_mu, b, i, T(prior_mu));
        store_one(p.grad.prior_logvar, b, i, T(prior_logvar));
      }
      __syncthreads();
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) kl_kernel(KlParams p, void* kl_out, void* floored_kl, int g) {
  kl_rows<T>(p, T(1), kl_out, floored_kl, g);
}

// A block takes one latent dimension: the mean of its KL over the batch.
template <class T>
__global__ void __launch_bounds__(kThreads) kl_dims_kernel(KlDimsParams p) {
  for (int64_t i = blockIdx.x; i < p.q.D; i += gridDim.x) {
    double sum = 0;
    for (int64_t b = threadIdx.x; b < p.q.B; b += kThreads) sum += double(Latent<T>(p.q, b, i).kl().value);
    sum = group_sum(sum, kThreads);
    if (threadIdx.x == 0) p.out[i] = sum / double(p.q.B);
  }
}

}  // namespace

void launch_kl(const KlParams& p, void* kl_out, void* floored_kl, bool is_double, cudaStream_t stream) {
  const int g = group_size(p.q.D, p.q.B);
  const int64_t blocks = blocks_for(p.q.B, kThreads / g);
  is_double ? launch(kl_kernel<double>, blocks, stream, p, kl_out, floored_kl, g)
            : launch(kl_kernel<float>, blocks, stream, p, kl_out, floored_kl, g);
}

void launch_samples(const SampleParams& p, void* log_ratio, void* kl, bool is_double, cudaStream_t stream) {
  const int g = group_size(p.q.D, kMaxBlocks * kThreads);  // by D alone: samples in chunks are those of the whole
  const int64_t blocks = blocks_for(p.K * p.q.B, kThreads / g);
  is_double
      ? launch(samples_kernel<double>, blocks, stream, p, static_cast<double*>(log_ratio), static_cast<double*>(kl), g)
      : launch(samples_kernel<float>, blocks, stream, p, static_cast<float*>(log_ratio), static_cast<float*>(kl), g);
}

void launch_samples_backward(const SampleBackwardParams& p, bool is_double, cudaStream_t stream) {
  const int64_t pieces = (p.q.B * p.q.D + 3) / 4;
  const auto with = [&]<int kPieces>() {
    const int64_t blocks = blocks_for(pieces, kPieces);
    is_double ? launch(samples_backward_kernel<double, kPieces>, blocks, stream, p)
              : launch(samples_backward_kernel<float, kPieces>, blocks, stream, p);
  };
  // few columns of many samples: more blocks, each with more slices. By shapes alone, as the order of the sums
  pieces < 32 * kBusy&& p.K > 8 ? with.template operator()<8>() : with.template operator()<32>();
}

void launch_samples_kept(const KeptParams& p, void* log_ratio, bool is_double, cudaStream_t stream) {
  const int g = group_size(p.q.D, kMaxBlocks * kThreads);  // as of all samples
  const int64_t blocks = blocks_for(p.n, kThreads / g);
  is_double ? launch(samples_kept_kernel<double>, blocks, stream, p, static_cast<double*>(log_ratio), g)
            : launch(samples_kept_kernel<float>, blocks, stream, p, static_cast<float*>(log_ratio), g);
}

void launch_samples_kept_backward(const KeptBackwardParams& p, bool is_double, cudaStream_t stream) {
  const int64_t blocks = blocks_for(p.q.B * p.q.D, kThreads);
  is_double ? launch(samples_kept_backward_kernel<double>, blocks, stream, p)
            : launch(samples_kept_backward_kernel<float>, blocks, stream, p);
}

void launch_kl_dims(const KlDimsParams& p, bool is_double, cudaStream_t stream) {
  const int64_t blocks = blocks_for(p.q.D, 1);
  is_double ? launch(kl_dims_kernel<double>, blocks, stream, p) : launch(kl_dims_kernel<float>, blocks, stream, p);
}

}  // namespace fastelbo::cuda
