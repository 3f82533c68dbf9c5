// K-sample bounds by datum with their gradients; log mean exp; the scaling of gradients by an upstream one.
//
// multi_sample_kernel, float32: recon is read from memory once (4 bytes per element; its second reading, for the
// gradient, comes from the L2 cache as long as the data in flight fit there), the gradient is written once (4).
// Recomputing in a backward would read recon again from memory: 12. Few data with many elements take three launches
// instead (values, weights, gradients), so that all of the device works.
#include "kernels/likelihood.cuh"
#include "math/log_mean_exp.h"

namespace fastelbo::cuda {
namespace {

// Of K numbers log_w[k * stride], by all threads of the block: their shift, and the sum of exp(t (log_w - shift)).
template <class T>
__device__ LogMeanExp<double> accumulate(const T* log_w, int64_t stride, int64_t K, double t) {
  double largest = -__builtin_huge_val();
  for (int64_t k = threadIdx.x; k < K; k += kThreads) {
    const double w = t * double(log_w[k * stride]);
    largest = w > largest ? w : largest;
  }
  const double shift = LogMeanExp<double>::shift_of(block_max(largest));
  double sum = 0;
  for (int64_t k = threadIdx.x; k < K; k += kThreads) sum += exp_full(t * double(log_w[k * stride]) - shift);
  return {shift, group_sum(sum, kThreads)};
}

// log w [K] of datum b becomes the weights a; -> the bound, in all threads.
inline __device__ double weigh(const Estimator& e, double* log_w, int64_t K, int64_t B, int64_t b) {
  double bound = 0;
  if (e.elbo_share != 0) {
    double sum = 0;
    for (int64_t k = threadIdx.x; k < K; k += kThreads) sum += log_w[k * B + b];
    bound = e.elbo_share / double(K) * group_sum(sum, kThreads);
  }
  const double even = e.elbo_share / double(K), t = 1 - e.alpha;
  if (e.elbo_share == 1) {
    for (int64_t k = threadIdx.x; k < K; k += kThreads) log_w[k * B + b] = even;
    return bound;
  }
  const int64_t size = K / e.groups;
  const double part = (1 - e.elbo_share) / double(e.groups);
  for (int64_t group = 0; group < e.groups; ++group) {
    double* column = log_w + group * size * B + b;
    const LogMeanExp<double> total = accumulate(column, B, size, t);
    bound += part / t * total.value(size);
    for (int64_t k = threadIdx.x; k < size; k += kThreads) {
      column[k * B] = part * total.weight_factor() * exp_full(t * column[k * B] - total.shift) + even;
    }
  }
  return bound;
}

template <class L, bool kScale, bool kGrads, bool kPlain, class T>
__global__ void __launch_bounds__(kThreads, kPlain ? 3 : 2) multi_sample_kernel(MultiSampleParams p, int g) {
  const int64_t K = p.fit.K, B = p.fit.B, D = p.fit.D, segs = segments(D);
  const int per_block = kThreads / g, lane = int(threadIdx.x) % g, group = int(threadIdx.x) / g;
  double total = 0;
  for (int64_t b = blockIdx.x; b < B; b += gridDim.x) {
    for (int64_t base = 0; base < K; base += per_block) {
      const int64_t k = base + group;
      double sum = 0;
      if (p.given) {
        for (int64_t s = lane; s < segs && k < K; s += g) sum += p.fit.out[(k * B + b) * segs + s];
        sum = group_sum(sum, g);
      } else {
        T part = 0;
        if (k < K) part = log_prob_part<L, kScale, false, kPlain>(p.fit, k, b, 0, D, T(0), lane, g);
        sum = double(group_sum(part, g));
      }
      if (k < K && lane == 0) {
        static_cast<T*>(p.log_p)[k * B + b] = T(sum);
        p.weights[k * B + b] = sum + double(at<T>(p.log_ratio, k, b));
      }
    }
    __syncthreads();  // the weights, in global memory, are this block's own
    const double bound = weigh(p.estimator, p.weights, K, B, b);
    __syncthreads();
    if (threadIdx.x == 0) {
      if (p.bound) static_cast<T*>(p.bound)[b] = T(-bound);
      total -= p.share * bound;
    }
    for (int64_t k = threadIdx.x; k < K; k += kThreads) {
      const double a = p.weights[k * B + b];
      if (p.row_grad) static_cast<T*>(p.row_grad)[k * B + b] = T(-p.share * a);
      if (p.grad_log_ratio) static_cast<T*>(p.grad_log_ratio)[k * B + b] = T(-p.share * a);
      if (p.grad_gates) {
        T* gates = static_cast<T*>(p.grad_gates);
        gates[k * B + b] = T(path_factor(p.estimator, a));
        gates[(K + k) * B + b] = T(p.estimator.score - 1);
      }
    }
    if constexpr (kGrads) {
      for (int64_t k = group; k < K; k += per_block) {
        const T factor = T(-p.share * p.weights[k * B + b]);
        log_prob_part<L, kScale, true, kPlain>(p.fit, k, b, 0, D, factor, lane, g);
      }
    }
  }
  add_to_total<T>(p.total, total);
}

// A block takes a column; with a gradient, the normalized weights times it.
template <class T>
__global__ void __launch_bounds__(kThreads) log_mean_exp_kernel(LogMeanExpParams p, int64_t columns) {
  for (int64_t column = blockIdx.x; column < columns; column += gridDim.x) {
    const int64_t at = column / p.inner * p.stride_outer + column % p.inner * p.stride_inner;
    const T* log_w = static_cast<const T*>(p.log_w) + at;
    const LogMeanExp<double> total = accumulate(log_w, p.stride_k, p.K, 1.0);
    if (p.out && threadIdx.x == 0) static_cast<T*>(p.out)[column] = T(total.value(p.K));
    if (!p.grad_log_w) continue;
    const double factor = double(static_cast<const T*>(p.grad)[column]) * total.weight_factor();
    for (int64_t k = threadIdx.x; k < p.K; k += kThreads) {
      const double w = exp_full(double(log_w[k * p.stride_k]) - total.shift);
      static_cast<T*>(p.grad_log_w)[at + k * p.stride_k] = T(factor * w);
    }
  }
}

// 8 bytes per float32 element; 4 in all where the factor is 1.
template <class T>
__global__ void __launch_bounds__(kThreads) scale_kernel(View p, int64_t n, DeviceScalar factor) {
  const T f = T(read(factor));
  if (f == 1) return;
  const Pieces pieces(p, 0, 0, n);
  for (int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x; c < pieces.count();
       c += int64_t(gridDim.x) * kThreads) {
    int count;
    const int64_t i = pieces.at(c, count);
    T values[4] = {};
    load4(p, 0, i, count, values);
#pragma unroll
    for (int j = 0; j < 4; ++j) values[j] *= f;
    store4(p, 0, i, count, values);
  }
}

}  // namespace

void launch_multi_sample(const MultiSampleParams& p, int likelihood, bool scale, bool wide, cudaStream_t stream) {
  const int g = p.given ? 4 : std::min(group_size(p.fit.D, p.fit.K * p.fit.B), 32);
  const int64_t blocks = blocks_for(p.fit.B, 1);
  const bool grads = !p.given && any_grad(p.fit);
  const auto start = [&]<class L, bool kScale, bool kGrads, bool kPlain, class T>() {
    launch(multi_sample_kernel<L, kScale, kGrads, kPlain, T>, blocks, stream, p, g);
  };
  with_likelihood(Likelihoods{}, likelihood, scale, grads, is_plain(p.fit), wide, start);
}

void launch_log_mean_exp(const LogMeanExpParams& p, int64_t columns, bool wide, cudaStream_t stream) {
  const int64_t blocks = blocks_for(columns, 1);
  wide ? launch(log_mean_exp_kernel<double>, blocks, stream, p, columns)
       : launch(log_mean_exp_kernel<float>, blocks, stream, p, columns);
}

void launch_scale(const View& p, int64_t n, DeviceScalar factor, cudaStream_t stream) {
  const int64_t blocks = blocks_for((n + 3) / 4 + 1, kThreads);
  p.dtype == DType::f64 ? launch(scale_kernel<double>, blocks, stream, p, n, factor)
                        : launch(scale_kernel<float>, blocks, stream, p, n, factor);
}

}  // namespace fastelbo::cuda
