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

// This thread's part of the log densities of a row of samples.
template <class T>
struct Densities {
  T ratio = 0, log_q = 0;
};

// A row of samples, its noise from `eps` or from element `start` on.
template <class T>
__device__ Densities<T> draw_row(const Latents& q, int64_t b, uint64_t seed, int64_t start, const View& eps,
                                 int64_t eps_row, const View& z_out, int64_t to, int lane, int g) {
  // the counters whose numbers the row's elements take; the first and the last may belong to two rows
  const int64_t counters = q.D ? (start + q.D + 3) / 4 - start / 4 : 0;
  Densities<T> sums;
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
      const Sample<T> s = sample(l.mu, l.logvar, l.delta, l.t, exp_full(T(0.5) * l.logvar), l.inv_std_p, e);
      z[j] = s.z;
      sums.ratio += s.log_ratio, sums.log_q += s.log_q;
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
  return sums;
}

// A group takes row (k, b), or of chosen samples row i; then the KL of the data. Nothing waits for the device, so that
// an index out of range gives NaN.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) samples_kernel(SampleParams p, SampleOutputs out, int g) {
  const int per_block = kThreads / g, lane = int(threadIdx.x) % g, group = int(threadIdx.x) / g;
  const uint64_t seed = p.seed ? uint64_t(*p.seed) : 0;
  const int64_t rows = p.sample ? p.n : p.K * p.q.B, all = rows > p.q.B ? rows : p.q.B;
  for (int64_t base = int64_t(blockIdx.x) * per_block; base < all; base += int64_t(gridDim.x) * per_block) {
    const int64_t row = base + group;
    Densities<T> sums;
    T kl = 0;
    if (row < rows) {
      const int64_t to_k = p.sample ? 0 : row / p.q.B, to_b = p.sample ? row : row % p.q.B;
      const int64_t k = p.sample ? p.sample[row] : to_k, b = p.sample ? p.datum[row] : to_b;
      if (b >= 0 && b < p.q.B) {
        const int64_t start = ((p.first_sample + k) * p.q.B + b) * p.q.D;
        sums = draw_row<T>(p.q, b, seed, start, p.eps, row_of(p.eps, k, b), p.z, row_of(p.z, to_k, to_b), lane, g);
      } else {
        sums.ratio = sums.log_q = T(NAN);
        for (int64_t i = lane; i < p.q.D; i += g) store_one(p.z, row, i, T(NAN));
      }
    }
    if (row < p.q.B) {
      for (int64_t i = lane; i < p.q.D; i += g) kl += Latent<T>(p.q, row, i).kl().value;
    }
    sums.ratio = group_sum(sums.ratio, g), sums.log_q = group_sum(sums.log_q, g);
    kl = group_sum(kl, g);
    if (lane != 0) continue;
    if (row < rows) {
      static_cast<T*>(out.log_ratio)[row] = sums.ratio;
      static_cast<T*>(out.log_q)[row] = sums.log_q - T(0.91893853320467274178) * T(p.q.D);
    }
    if (row < p.q.B) static_cast<T*>(out.kl)[row] = kl;
  }
}

// Of one element, drawn with noise e: its gradients from that of z, and from those of the densities in row (k, b).
template <class T>
__device__ SampleGrad<T> grad_of_sample(const SampleBackwardParams& p, int64_t k, int64_t b, T grad_z, T delta, T std,
                                        T inv_std_p, T e) {
  const auto row = [k, b](const RowScalars& s) { return row_number<T>(s, k, b); };
  const T log_p = row(p.grad_log_ratio);
  return sample_grad(p.upstream(),
                     {grad_z, log_p, log_p - row(p.grad_log_q), 1 + row(p.gate_path), 1 + row(p.gate_score)}, delta,
                     std, inv_std_p, e);
}

// Adds the KL's own gradients of one element to those of its samples, and writes them.
template <class T>
__device__ void store_grads(const SampleBackwardParams& p, const Latent<T>& l, int64_t b, int64_t i, double* sums) {
  if (p.grad_kl.data) {
    const T up = row_number<T>(p.grad_kl, 0, b);
    const KlTerm<T> kl = l.kl();
    sums[0] += times(up, kl.d_mu), sums[1] += times(up, kl.d_logvar);
    sums[2] += times(up, kl.d_prior_mu), sums[3] += times(up, kl.d_prior_logvar);
  }
  store_one(p.grad.mu, b, i, T(sums[0]));
  store_one(p.grad.logvar, b, i, T(sums[1]));
  store_one(p.grad.prior_mu, b, i, T(sums[2]));
  store_one(p.grad.prior_logvar, b, i, T(sums[3]));
}

// Of chosen samples: a thread takes one element of a datum, and adds up its rows in their order.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) chosen_backward_kernel(SampleBackwardParams p) {
  const int64_t elements = p.q.B * p.q.D;
  for (int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x; at < elements; at += int64_t(gridDim.x) * kThreads) {
    const int64_t b = at / p.q.D, i = at % p.q.D;
    const Latent<T> l(p.q, b, i);
    const T std = exp_full(T(0.5) * l.logvar);
    double sums[4] = {};
    for (int64_t next = p.starts[b]; next < p.starts[b + 1]; ++next) {
      const int64_t row = p.order[next], index = p.sample[row] * elements + at;
      float noise[4];
      normals(uint64_t(*p.seed), uint64_t(index) >> 2, noise);
      const int s = int(index & 3);  // no index that varies: it would put the numbers in memory
      const T e = s == 0 ? noise[0] : s == 1 ? noise[1] : s == 2 ? noise[2] : noise[3];
      const T gz = p.grad_z ? load_at<T>(p.grad_z, row_of(p.grad_z, 0, row) + offset_of(p.grad_z, i)) : T(0);
      const SampleGrad<T> g = grad_of_sample(p, 0, row, gz, l.delta, std, l.inv_std_p, e);
      sums[0] += g.mu, sums[1] += g.logvar, sums[2] += g.prior_mu, sums[3] += g.prior_logvar;
    }
    store_grads<T>(p, l, b, i, sums);
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
  const bool prior = p.grad.prior() && p.upstream() != Upstream::z;
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
        if (prior) {
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
        double total[4] = {};
        for (int s = 0; s < kSlices; ++s) {
          const Sums<T>& part = slices[s][piece];
          total[0] += part.mu, total[1] += part.logvar, total[2] += part.prior_mu, total[3] += part.prior_logvar;
        }
        const int64_t b = (first + j) / p.q.D, i = (first + j) % p.q.D;
        store_grads<T>(p, Latent<T>(p.q, b, i), b, i, total);
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

void launch_samples(const SampleParams& p, const SampleOutputs& out, bool is_double, cudaStream_t stream) {
  const int g = group_size(p.q.D, kMaxBlocks * kThreads);  // by D alone: samples in chunks are those of the whole
  const int64_t blocks = blocks_for(std::max(p.sample ? p.n : p.K * p.q.B, p.q.B), kThreads / g);
  is_double ? launch(samples_kernel<double>, blocks, stream, p, out, g)
            : launch(samples_kernel<float>, blocks, stream, p, out, g);
}

void launch_samples_backward(const SampleBackwardParams& p, bool is_double, cudaStream_t stream) {
  const int64_t elements = p.q.B * p.q.D, pieces = (elements + 3) / 4;
  if (p.sample) {
    const int64_t blocks = blocks_for(elements, kThreads);
    is_double ? launch(chosen_backward_kernel<double>, blocks, stream, p)
              : launch(chosen_backward_kernel<float>, blocks, stream, p);
    return;
  }
  const auto with = [&]<int kPieces>() {
    const int64_t blocks = blocks_for(pieces, kPieces);
    is_double ? launch(samples_backward_kernel<double, kPieces>, blocks, stream, p)
              : launch(samples_backward_kernel<float, kPieces>, blocks, stream, p);
  };
  // few columns of many samples: more blocks, each with more slices. By shapes alone, as the order of the sums
  pieces < 32 * kBusy&& p.K > 8 ? with.template operator()<8>() : with.template operator()<32>();
}

void launch_kl_dims(const KlDimsParams& p, bool is_double, cudaStream_t stream) {
  const int64_t blocks = blocks_for(p.q.D, 1);
  is_double ? launch(kl_dims_kernel<double>, blocks, stream, p) : launch(kl_dims_kernel<float>, blocks, stream, p);
}

}  // namespace fastelbo::cuda
