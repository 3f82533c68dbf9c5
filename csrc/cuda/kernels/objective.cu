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

// kColumns columns by a block, each by the threads whose number is the same modulo kColumns: those of a warp read
// neighbouring columns.
template <int kColumns>
struct Columns {
  static constexpr int kStep = kThreads / kColumns;  // threads of a column
  __device__ int column() const { return int(threadIdx.x) % kColumns; }
  __device__ int first() const { return int(threadIdx.x) / kColumns; }
  template <class F>
  __device__ double max(int64_t n, F f) const {
    double largest = -__builtin_huge_val();
    for (int64_t i = first(); i < n; i += kStep) largest = f(i) > largest ? f(i) : largest;
    if constexpr (kColumns == 1) return block_max(largest);
    return combined(largest, [](double a, double b) { return b > a ? b : a; });
  }
  template <class F>
  __device__ double sum(int64_t n, F f) const {
    double total = 0;
    for (int64_t i = first(); i < n; i += kStep) total += f(i);
    if constexpr (kColumns == 1) return group_sum(total, kThreads);
    return combined(total, [](double a, double b) { return a + b; });
  }
  template <class F>
  __device__ double combined(double value, F with) const {
    __shared__ double parts[kThreads];
    parts[threadIdx.x] = value;
    __syncthreads();
    value = parts[column()];
    for (int s = 1; s < kStep; ++s) value = with(value, parts[s * kColumns + column()]);
    __syncthreads();
    return value;
  }
};

// math/weights.h by all threads of a block: thread t takes elements t, t + kThreads, ... of every loop. Loops over all
// K and over one group deal out the samples differently, so each() ends with a barrier; max() and sum() have their own.
struct Block : Columns<1> {
  __device__ bool leads() const { return threadIdx.x == 0; }
  template <class F>
  __device__ void each(int64_t n, F f) const {
    for (int64_t i = threadIdx.x; i < n; i += kThreads) f(i);
    __syncthreads();  // the next loop may give this sample to another thread
  }
};

template <class L, int kCount, bool kGrads, bool kPlain, class T>
__global__ void __launch_bounds__(kThreads, (kBlocks<L, kCount, kPlain>))
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
    weigh_datum<T, false>(p, b, Block{});
    if (threadIdx.x == 0) losses -= p.datum_weight * p.bound[b];
    if (kGrads && p.fit.any_grad()) {
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

// With a gradient, the normalized weights times it.
template <class T, int kColumns>
__global__ void __launch_bounds__(kThreads) log_mean_exp_kernel(LogMeanExpParams p, int64_t columns) {
  const Columns<kColumns> team;
  for (int64_t base = int64_t(blockIdx.x) * kColumns; base < columns; base += int64_t(gridDim.x) * kColumns) {
    const int64_t column = base + team.column(), K = column < columns ? p.K : 0;
    const int64_t at = column / p.inner * p.stride_outer + column % p.inner * p.stride_inner;
    const T* log_w = static_cast<const T*>(p.log_w) + at;
    const double largest = team.max(K, [=](int64_t k) { return double(log_w[k * p.stride_k]); });
    const double shift = LogMeanExp<double>::shift_of(largest);
    const LogMeanExp<double> total{
        shift, team.sum(K, [=](int64_t k) { return exp_full(double(log_w[k * p.stride_k]) - shift); })};
    if (p.out && K && team.first() == 0) static_cast<T*>(p.out)[column] = T(total.value(p.K));
    if (!p.grad_log_w || !K) continue;
    const double factor = double(static_cast<const T*>(p.grad)[column]) * total.weight_factor();
    for (int64_t k = team.first(); k < K; k += team.kStep) {
      const double w = exp_full(double(log_w[k * p.stride_k]) - total.shift);
      static_cast<T*>(p.grad_log_w)[at + k * p.stride_k] = T(factor * w);
    }
  }
}

// 8 bytes per float32 element; 4 in all where the factor is 1.
template <class T>
__global__ void __launch_bounds__(kThreads) scale_kernel(View p, int64_t n, Number factor) {
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
    if constexpr (!L::kByElement) {
      launch(multi_sample_kernel<L, kCount, kGrads, kPlain, T>, blocks_for(p.fit.B, 1), stream, p, total, g);
    }
  });
}

void launch_weigh(const MultiSampleParams& p, const Total& total, bool is_double, cudaStream_t stream) {
  const int64_t blocks = blocks_for(p.fit.B, 1);
  is_double ? launch(weigh_kernel<double>, blocks, stream, p, total)
            : launch(weigh_kernel<float>, blocks, stream, p, total);
}

void launch_log_mean_exp(const LogMeanExpParams& p, int64_t columns, bool is_double, cudaStream_t stream) {
  const auto with = [&]<int kColumns>() {
    const int64_t blocks = blocks_for(columns, kColumns);
    is_double ? launch(log_mean_exp_kernel<double, kColumns>, blocks, stream, p, columns)
              : launch(log_mean_exp_kernel<float, kColumns>, blocks, stream, p, columns);
  };
  // neighbours in memory are columns: a warp reads 32 of them, unless that leaves most of the device without work
  const bool side_by_side = p.stride_inner == 1 && p.inner >= 32 && (p.K <= kThreads || columns >= 16 * kBusy);
  side_by_side ? with.template operator()<32>() : with.template operator()<1>();
}

void launch_scale(const View& p, int64_t n, Number factor, cudaStream_t stream) {
  const int64_t blocks = blocks_for((n + 3) / 4 + 1, kThreads);
  p.dtype == DType::f64 ? launch(scale_kernel<double>, blocks, stream, p, n, factor)
                        : launch(scale_kernel<float>, blocks, stream, p, n, factor);
}

}  // namespace fastelbo::cuda
