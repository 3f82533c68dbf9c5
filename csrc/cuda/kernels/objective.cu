// K-sample bounds by datum with their gradients; log mean exp; the scaling of gradients by an upstream one.
//
// multi_sample_kernel, float32: recon is read from memory once (4 bytes per element; its second reading, for the
// gradient, comes from the L2 cache as long as the data in flight fit there), the gradient is written once (4).
// Recomputing in a backward would read recon again from memory: 12. Few data with many elements take three launches
// instead (values, weights, gradients), so that all of the device works.
#include "cuda/kernels/likelihood.cuh"
#include "math/weights.h"

namespace fastelbo::cuda {
namespace {

// math/weights.h by all threads of a block: thread t takes elements t, t + kThreads, ... of every loop. Loops over all
// K and over one group deal out the samples differently, so each() ends with a barrier; max() and sum() have their own.
struct Block {
  __device__ bool leads() const { return threadIdx.x == 0; }
  template <class F>
  __device__ double max(int64_t n, F f) const {
    double largest = -__builtin_huge_val();
    for (int64_t i = threadIdx.x; i < n; i += kThreads) largest = f(i) > largest ? f(i) : largest;
    return block_max(largest);
  }
  template <class F>
  __device__ double sum(int64_t n, F f) const {
    double total = 0;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) total += f(i);
    return group_sum(total, kThreads);
  }
  template <class F>
  __device__ void each(int64_t n, F f) const {
    for (int64_t i = threadIdx.x; i < n; i += kThreads) f(i);
    __syncthreads();  // the next loop may give this sample to another thread
  }
};

template <class L, int kCount, bool kGrads, bool kPlain, class T>
__global__ void __launch_bounds__(kThreads, kPlain ? 3 : 2)
    multi_sample_kernel(MultiSampleParams p, Total total, int g) {
  const int64_t K = p.fit.K, B = p.fit.B, D = p.fit.D;
  const int per_block = kThreads / g, lane = int(threadIdx.x) % g, group = int(threadIdx.x) / g;
  double losses = 0;
  for (int64_t b = blockIdx.x; b < B; b += gridDim.x) {
    for (int64_t base = 0; base < K; base += per_block) {
      const int64_t k = base + group;
      T part = 0;
      if (k < K) part = log_prob_part<L, kCount, false, kPlain>(p.fit, k, b, 0, D, T(0), lane, g);
      const double sum = double(group_sum(part, g));
      if (k < K && lane == 0) p.weights[k * B + b] = sum;
    }
    __syncthreads();  // the weights, in global memory, are this block's own
    weigh_datum<T>(p, b, Block{});
    if (threadIdx.x == 0) losses -= p.datum_weight * p.bound[b];
    if constexpr (kGrads) {
      for (int64_t k = group; k < K; k += per_block) {
        const T factor = T(-p.datum_weight * p.weights[k * B + b]);
        log_prob_part<L, kCount, true, kPlain>(p.fit, k, b, 0, D, factor, lane, g);
      }
    }
  }
  add_to_total<T>(total, losses);
}

template <class T>
__global__ void __launch_bounds__(kThreads) weigh_kernel(MultiSampleParams p, Total total) {
  const int64_t K = p.fit.K, B = p.fit.B, segs = segments(p.fit.D);
  double losses = 0;
  for (int64_t b = blockIdx.x; b < B; b += gridDim.x) {
    for (int64_t k = threadIdx.x; p.fit.log_p && k < K; k += kThreads) {
      double sum = 0;
      for (int64_t s = 0; s < segs; ++s) sum += p.fit.log_p[(k * B + b) * segs + s];
      p.weights[k * B + b] = sum;
    }
    weigh_datum<T>(p, b, Block{});
    if (threadIdx.x == 0) losses -= p.datum_weight * p.bound[b];
  }
  add_to_total<T>(total, losses);
}

// Of K numbers log_w[k * stride], by all threads of the block: their shift, and the sum of exp(log_w - shift).
template <class T>
__device__ LogMeanExp<double> accumulate(const T* log_w, int64_t stride, int64_t K) {
  const double shift =
      LogMeanExp<double>::shift_of(Block{}.max(K, [=](int64_t k) { return double(log_w[k * stride]); }));
  return {shift, Block{}.sum(K, [=](int64_t k) { return exp_full(double(log_w[k * stride]) - shift); })};
}

// A block takes a column; with a gradient, the normalized weights times it.
template <class T>
__global__ void __launch_bounds__(kThreads) log_mean_exp_kernel(LogMeanExpParams p, int64_t columns) {
  for (int64_t column = blockIdx.x; column < columns; column += gridDim.x) {
    const int64_t at = column / p.inner * p.stride_outer + column % p.inner * p.stride_inner;
    const T* log_w = static_cast<const T*>(p.log_w) + at;
    const LogMeanExp<double> total = accumulate(log_w, p.stride_k, p.K);
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

void launch_multi_sample(const MultiSampleParams& p, const Total& total, int likelihood, bool is_double,
                         cudaStream_t stream) {
  const int g = std::min(group_size(p.fit.D, p.fit.rows()), 32);
  with_rows(p.fit, likelihood, is_double, [&]<class L, int kCount, bool kGrads, bool kPlain, class T>() {
    launch(multi_sample_kernel<L, kCount, kGrads, kPlain, T>, blocks_for(p.fit.B, 1), stream, p, total, g);
  });
}

void launch_weigh(const MultiSampleParams& p, const Total& total, bool is_double, cudaStream_t stream) {
  const int64_t blocks = blocks_for(p.fit.B, 1);
  is_double ? launch(weigh_kernel<double>, blocks, stream, p, total)
            : launch(weigh_kernel<float>, blocks, stream, p, total);
}

void launch_log_mean_exp(const LogMeanExpParams& p, int64_t columns, bool is_double, cudaStream_t stream) {
  const int64_t blocks = blocks_for(columns, 1);
  is_double ? launch(log_mean_exp_kernel<double>, blocks, stream, p, columns)
            : launch(log_mean_exp_kernel<float>, blocks, stream, p, columns);
}

void launch_scale(const View& p, int64_t n, DeviceScalar factor, cudaStream_t stream) {
  const int64_t blocks = blocks_for((n + 3) / 4 + 1, kThreads);
  p.dtype == DType::f64 ? launch(scale_kernel<double>, blocks, stream, p, n, factor)
                        : launch(scale_kernel<float>, blocks, stream, p, n, factor);
}

}  // namespace fastelbo::cuda
