// Mixtures of diagonal Gaussians on the device: cpu/kernels/mixture.h has the formulas.
//
// A thread takes a row; components come through shared memory, kComponents of them at a time, kDepth dimensions of
// each. The gradients of z take the same way again, for kWide dimensions at a time; those of the components take a
// block for each component, whose threads share out the rows. No array of all pairs is written, and sums have one
// order.
#include "cuda/kernels/device.cuh"
#include "math/log_mean_exp.h"

namespace fastelbo::cuda {
namespace {

constexpr int kComponents = 8;
constexpr int kDepth = kThreads / kComponents;
constexpr int kWide = 8;
constexpr int kTogether = 16;  // terms that are added in T, before they are in double
static_assert(kWide <= kDepth);

template <class T>
constexpr T kInfinity = T(__builtin_huge_val());

template <class T>
struct ComponentTile {
  T mu[kComponents][kDepth], inv_std[kComponents][kDepth];

  // Dimensions [m, end) of the components from c on; 0 where there are none, which adds nothing to a distance.
  __device__ void load(const MixtureParams& p, int64_t c, int64_t m, int64_t end) {
    __syncthreads();  // until all have read the tile before
    const int j = int(threadIdx.x) / kDepth, k = int(threadIdx.x) % kDepth;
    const bool inside = c + j < p.C && m + k < end;
    const int64_t at = inside ? (c + j) * p.M + m + k : 0;
    mu[j][k] = inside ? static_cast<const T*>(p.mu)[at] : T(0);
    inv_std[j][k] = inside ? static_cast<const T*>(p.inv_std)[at] : T(0);
    __syncthreads();
  }
};

// Where a row lies in the views, and what the backward reads of it.
template <class T>
struct MixtureRow {
  int64_t z, weights;

  __device__ MixtureRow(const MixtureParams& p, int64_t row)
      : z(offset_of(p.z, row)), weights(p.weights ? offset_of(p.weights, row / p.weight_rows) : 0) {}
  __device__ T at(const MixtureParams& p, int64_t m) const { return load_at<T>(p.z, z + m * p.z.stride_b); }
  __device__ T constant(const MixtureParams& p, int64_t group, int64_t c) const {
    const T base = static_cast<const T*>(p.base)[p.per_dimension ? c * p.M + group : c];
    return p.weights ? static_cast<const T*>(p.weights.data)[weights + c * p.weights.stride_b] + base : base;
  }
};

// The upstream gradient of a row, and its log density; a row without any passes nothing on.
template <class T>
struct RowUpstream {
  T grad, log_prob;

  __device__ RowUpstream(const MixtureBackwardParams& p, int64_t group, int64_t row)
      : grad(load_at<T>(p.grad, group * p.grad.stride_b + offset_of(p.grad, row))),
        log_prob(load_at<T>(p.of.log_prob, group * p.of.log_prob.stride_b + offset_of(p.of.log_prob, row))) {}
  __device__ T responsibility(T t) const { return log_prob == -kInfinity<T> ? T(0) : grad * exp_full(t - log_prob); }
};

// t of the components from c on, of this thread's row. All threads of the block call this.
template <class T>
__device__ void log_terms(const MixtureParams& p, ComponentTile<T>& tile, const MixtureRow<T>& row, int64_t group,
                          int64_t c, T* t) {
  const int64_t end = group + p.dims();
  T squares[kComponents] = {};
  for (int64_t m = group; m < end; m += kDepth) {
    tile.load(p, c, m, end);
    T sums[kComponents] = {};
    for (int k = 0; k < kDepth && m + k < end; ++k) {
      const T z = row.at(p, m + k);
#pragma unroll
      for (int j = 0; j < kComponents; ++j) {
        const T d = (z - tile.mu[j][k]) * tile.inv_std[j][k];
        sums[j] += d * d;
      }
    }
#pragma unroll
    for (int j = 0; j < kComponents; ++j) squares[j] += sums[j];
  }
#pragma unroll
  for (int j = 0; j < kComponents; ++j) {
    t[j] = c + j < p.C ? row.constant(p, group, c + j) - T(0.5) * squares[j] : -kInfinity<T>;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) components_kernel(MixtureComponentsParams p) {
  constexpr double kHalfLog2Pi = 0.91893853320467274178;
  const T largest = sizeof(T) == 4 ? T(0x1.fffffep127) : T(0x1.fffffffffffffp1023);
  for (int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x; c < p.C; c += int64_t(gridDim.x) * kThreads) {
    const double log_w = p.weights ? double(static_cast<const T*>(p.weights)[c * p.stride_weights]) : p.log_weight;
    double at_mu = 0;
    for (int64_t m = 0; m < p.M; ++m) {
      const T logvar = load_at<T>(p.logvar, row_of(p.logvar, 0, c) + offset_of(p.logvar, m));
      const T scale = exp_full(T(-0.5) * logvar);
      static_cast<T*>(p.inv_std)[c * p.M + m] = scale > largest ? largest : scale;
      const double term = 0.5 * double(logvar) + kHalfLog2Pi;
      at_mu -= term;
      if (p.per_dimension) static_cast<T*>(p.base)[c * p.M + m] = T(log_w - term);
      if (p.copied_mu) {
        static_cast<T*>(p.copied_mu)[c * p.M + m] = load_at<T>(p.mu, row_of(p.mu, 0, c) + offset_of(p.mu, m));
      }
    }
    if (!p.per_dimension) static_cast<T*>(p.base)[c] = T(log_w + at_mu);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) mixture_kernel(MixtureParams p) {
  __shared__ ComponentTile<T> tile;
  const int64_t groups = p.groups(), items = (p.N + kThreads - 1) / kThreads * groups;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t group = item % groups, wanted = item / groups * kThreads + threadIdx.x;
    const int64_t n = wanted < p.N ? wanted : p.N - 1;  // threads without a row come along
    const MixtureRow<T> row(p, n);
    T largest = -kInfinity<T>, t[kComponents];
    double sum = 0;
    for (int64_t c = 0; c < p.C; c += kComponents) {
      log_terms(p, tile, row, group, c, t);
      T top = largest, part = 0;
#pragma unroll
      for (int j = 0; j < kComponents; ++j) top = t[j] > top ? t[j] : top;
      const T shift = LogMeanExp<T>::shift_of(top);
#pragma unroll
      for (int j = 0; j < kComponents; ++j) part += exp_full(t[j] - shift);
      sum = sum * double(exp_full(largest - shift)) + double(part);
      largest = top;
    }
    if (wanted >= p.N) continue;  // no barrier follows before all threads are back at the top
    const T value = T(double(LogMeanExp<T>::shift_of(largest)) + __builtin_log(sum));
    store_at<T>(p.log_prob, group * p.log_prob.stride_b + offset_of(p.log_prob, n),
                largest == kInfinity<T> ? largest : value);
  }
}

// kWide dimensions of the gradient of a row.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) mixture_grad_z_kernel(MixtureBackwardParams p) {
  __shared__ ComponentTile<T> tile;
  const MixtureParams& of = p.of;
  const int64_t groups = of.groups(), chunks = (of.dims() + kWide - 1) / kWide;
  const int64_t items = (of.N + kThreads - 1) / kThreads * groups * chunks;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t group = item / chunks % groups, first = group + item % chunks * kWide;
    const int64_t wanted = item / chunks / groups * kThreads + threadIdx.x, n = wanted < of.N ? wanted : of.N - 1;
    const int wide = group + of.dims() - first < kWide ? int(group + of.dims() - first) : kWide;
    const MixtureRow<T> row(of, n);
    const RowUpstream<T> up(p, group, n);
    double total[kWide] = {};
    T t[kComponents];
    for (int64_t c = 0; c < of.C; c += kComponents) {
      log_terms(of, tile, row, group, c, t);
#pragma unroll
      for (int j = 0; j < kComponents; ++j) t[j] = up.responsibility(t[j]);
      tile.load(of, c, first, first + wide);
#pragma unroll
      for (int k = 0; k < kWide; ++k) {
        if (k >= wide) continue;
        const T z = row.at(of, first + k);
        T sum = 0;
#pragma unroll
        for (int j = 0; j < kComponents; ++j) {
          const T d = (z - tile.mu[j][k]) * tile.inv_std[j][k];
          sum -= zero_if(t[j] == 0, t[j] * d * tile.inv_std[j][k]);
        }
        total[k] += double(sum);
      }
    }
    if (wanted >= of.N) continue;
#pragma unroll
    for (int k = 0; k < kWide; ++k) {
      if (k < wide) {
        store_at<T>(p.grad_z, (first + k) * p.grad_z.stride_b + offset_of(p.grad_z, n), T(total[k]));
      }
    }
  }
}

// The gradients of weights that differ from row to row: a thread takes the rows of one set of weights.
template <class T>
__global__ void __launch_bounds__(kThreads) mixture_grad_weights_kernel(MixtureBackwardParams p) {
  __shared__ ComponentTile<T> tile;
  const MixtureParams& of = p.of;
  const int64_t sets = of.N / of.weight_rows, tiles = (of.C + kComponents - 1) / kComponents;
  const int64_t items = (sets + kThreads - 1) / kThreads * tiles;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t c = item % tiles * kComponents, wanted = item / tiles * kThreads + threadIdx.x;
    const int64_t set = wanted < sets ? wanted : sets - 1;
    double total[kComponents] = {};
    T t[kComponents];
    for (int64_t i = 0; i < of.weight_rows; ++i) {
      const int64_t n = set * of.weight_rows + i;
      const MixtureRow<T> row(of, n);
      for (int64_t group = 0; group < of.groups(); ++group) {
        const RowUpstream<T> up(p, group, n);
        log_terms(of, tile, row, group, c, t);
#pragma unroll
        for (int j = 0; j < kComponents; ++j) total[j] += double(up.responsibility(t[j]));
      }
    }
    if (wanted >= sets) continue;
#pragma unroll
    for (int j = 0; j < kComponents; ++j) {
      if (c + j >= of.C) continue;
      const int64_t at = (c + j) * p.grad_weights.stride_b + offset_of(p.grad_weights, set);
      of.weight_rows > 1 ? store_at<double>(p.grad_weights, at, total[j])
                         : store_at<T>(p.grad_weights, at, T(total[j]));
    }
  }
}

// kWide dimensions of the sums of one component over the rows of a segment; all dimensions where each is a group.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) mixture_grad_sums_kernel(MixtureBackwardParams p) {
  const MixtureParams& of = p.of;
  const T *mu = static_cast<const T*>(of.mu), *inv_std = static_cast<const T*>(of.inv_std);
  const int64_t chunks = of.per_dimension ? 1 : (of.M + kWide - 1) / kWide;
  for (int64_t item = blockIdx.x; item < p.segments * of.C * chunks; item += gridDim.x) {
    const int64_t segment = item / chunks / of.C, c = item / chunks % of.C, chunk = item % chunks;
    const int64_t begin = segment * p.segment, end = begin + p.segment < of.N ? begin + p.segment : of.N;
    double weight = 0;
    for (int64_t group = 0; group < of.groups(); ++group) {
      const int64_t first = group + chunk * kWide, last = group + of.dims();
      const int wide = last - first < kWide ? int(last - first) : kWide;
      double by_mu[kWide] = {}, by_logvar[kWide] = {};
      T part[2][kWide] = {}, part_weight = 0;
      int pending = 0;
      const auto to_double = [&] {
#pragma unroll
        for (int k = 0; k < kWide; ++k) {
          by_mu[k] += double(part[0][k]), by_logvar[k] += double(part[1][k]);
          part[0][k] = part[1][k] = 0;
        }
        weight += double(part_weight);
        part_weight = 0, pending = 0;
      };
      for (int64_t n = begin + threadIdx.x; n < end; n += kThreads) {
        const MixtureRow<T> row(of, n);
        T squares = 0;
        for (int64_t m = group; m < last; m += kDepth) {
          T sum = 0;
          for (int64_t k = m; k < m + kDepth && k < last; ++k) {
            const T d = (row.at(of, k) - mu[c * of.M + k]) * inv_std[c * of.M + k];
            sum += d * d;
          }
          squares += sum;
        }
        const T t = row.constant(of, group, c) - T(0.5) * squares;
        const T r = RowUpstream<T>(p, group, n).responsibility(t);
        if (r == 0) continue;
        part_weight += r;
#pragma unroll
        for (int k = 0; k < kWide; ++k) {
          if (k >= wide) continue;
          const int64_t at = c * of.M + first + k;
          const T d = (row.at(of, first + k) - mu[at]) * inv_std[at];
          part[0][k] += r * d, part[1][k] += r * (d * d - 1);
        }
        if (++pending == kTogether) to_double();
      }
      to_double();
#pragma unroll
      for (int k = 0; k < kWide; ++k) {
        const double sum = group_sum(by_mu[k], kThreads), sum_logvar = group_sum(by_logvar[k], kThreads);
        if (!p.sums || k >= wide || threadIdx.x != 0) continue;
        double* to = p.sums + (segment * 2 * of.C + c) * of.M + first + k;
        to[0] = sum, to[of.C * of.M] = sum_logvar;
      }
    }
    weight = group_sum(weight, kThreads);
    if (p.weight_sums && chunk == 0 && threadIdx.x == 0) p.weight_sums[segment * of.C + c] = weight;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) mixture_sums_kernel(MixtureSumsParams p) {
  const int64_t pairs = p.C * p.M, step = int64_t(gridDim.x) * kThreads;
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t i = thread; p.sums && i < pairs; i += step) {
    double by_mu = 0, by_logvar = 0;
    for (int64_t s = 0; s < p.segments; ++s)
      by_mu += p.sums[s * 2 * pairs + i], by_logvar += p.sums[(s * 2 + 1) * pairs + i];
    const int64_t c = i / p.M, m = i % p.M;
    const auto put = [c, m](const View& to, double value) {
      if (to) store_at<T>(to, row_of(to, 0, c) + offset_of(to, m), T(value));
    };
    put(p.grad_mu, by_mu * double(static_cast<const T*>(p.inv_std)[i]));
    put(p.grad_logvar, 0.5 * by_logvar);
  }
  for (int64_t c = thread; p.grad_weights && c < p.C; c += step) {
    double total = 0;
    for (int64_t s = 0; s < p.segments; ++s) total += p.weight_sums[s * p.C + c];
    store_at<T>(p.grad_weights, row_of(p.grad_weights, 0, c), T(total));
  }
}

}  // namespace

void launch_mixture_components(const MixtureComponentsParams& p, bool is_double, cudaStream_t stream) {
  const int64_t blocks = blocks_for(p.C, kThreads);
  is_double ? launch(components_kernel<double>, blocks, stream, p)
            : launch(components_kernel<float>, blocks, stream, p);
}

void launch_mixture(const MixtureParams& p, bool is_double, cudaStream_t stream) {
  const int64_t blocks = blocks_for((p.N + kThreads - 1) / kThreads * p.groups(), 1);
  is_double ? launch(mixture_kernel<double>, blocks, stream, p) : launch(mixture_kernel<float>, blocks, stream, p);
}

void launch_mixture_backward(const MixtureBackwardParams& p, bool is_double, cudaStream_t stream) {
  const MixtureParams& of = p.of;
  const auto with = [&](auto kernel_float, auto kernel_double, int64_t items) {
    const int64_t blocks = blocks_for(items, 1);
    is_double ? launch(kernel_double, blocks, stream, p) : launch(kernel_float, blocks, stream, p);
  };
  const auto row_blocks = [](int64_t rows) { return (rows + kThreads - 1) / kThreads; };
  if (p.grad_z) {
    with(mixture_grad_z_kernel<float>, mixture_grad_z_kernel<double>,
         row_blocks(of.N) * of.groups() * ((of.dims() + kWide - 1) / kWide));
  }
  if (p.grad_weights) {
    with(mixture_grad_weights_kernel<float>, mixture_grad_weights_kernel<double>,
         row_blocks(of.N / of.weight_rows) * ((of.C + kComponents - 1) / kComponents));
  }
  if (p.sums || p.weight_sums) {
    with(mixture_grad_sums_kernel<float>, mixture_grad_sums_kernel<double>,
         p.segments * of.C * (of.per_dimension ? 1 : (of.M + kWide - 1) / kWide));
  }
}

void launch_mixture_sums(const MixtureSumsParams& p, bool is_double, cudaStream_t stream) {
  const int64_t blocks = blocks_for(p.C * (p.sums ? p.M : 1), kThreads);
  is_double ? launch(mixture_sums_kernel<double>, blocks, stream, p)
            : launch(mixture_sums_kernel<float>, blocks, stream, p);
}

}  // namespace fastelbo::cuda
