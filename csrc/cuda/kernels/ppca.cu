// Probabilistic PCA on CUDA devices: projections of x - b on the columns of W, and its squared norm, in double.
//
// x is read once for every kColumns columns of W, W once for every kSide rows of x; x - b is never written. Where the
// difference of squares that is the norm of x - b - W coords would cancel, x is read once more. The residual's products
// are plain matrix products, which cuBLAS does (cuda/ppca.cpp).
#include "cuda/kernels/device.cuh"

namespace fastelbo::cuda {
namespace {

constexpr int kSide = 16;      // threads of a block: kSide rows x kSide columns
constexpr int kDepth = 32;     // of D, in shared memory at a time
constexpr int kPerThread = 4;  // columns of one thread, kSide apart
constexpr int kColumns = kSide * kPerThread;
static_assert(kSide * kSide == kThreads);

__global__ void __launch_bounds__(kThreads) ppca_project_kernel(PpcaProjectParams p) {
  __shared__ double r[kSide][kDepth + 1], w[kDepth][kColumns];
  const int column = int(threadIdx.x) % kSide, line = int(threadIdx.x) / kSide;
  const int64_t panels = (p.lanes + kColumns - 1) / kColumns, items = (p.N + kSide - 1) / kSide * panels;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t row = item / panels * kSide + line, first = item % panels * kColumns;
    double sums[kPerThread] = {}, square = 0;
    for (int64_t d = 0; d < p.D; d += kDepth) {
      __syncthreads();  // until all have read the tiles before
      for (int64_t i = column; i < kDepth; i += kSide) {
        const bool inside = row < p.N && d + i < p.D;
        r[line][i] = inside ? load_at<double>(p.x, row * p.x.stride_b + offset_of(p.x, d + i)) - p.b[d + i] : 0;
        square += r[line][i] * r[line][i];
      }
      for (int64_t i = threadIdx.x; i < kDepth * kColumns; i += kThreads) {
        const int64_t at = d + i / kColumns, to = first + i % kColumns;
        w[i / kColumns][i % kColumns] = at < p.D && to < p.lanes ? p.W[at * p.lanes + to] : 0;
      }
      __syncthreads();
      for (int i = 0; i < kDepth; ++i) {
#pragma unroll
        for (int j = 0; j < kPerThread; ++j) sums[j] += r[line][i] * w[i][column + j * kSide];
      }
    }
    square = group_sum(square, kSide);
    if (row >= p.N) continue;  // no barrier follows before all threads are back at the top
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      const int64_t to = first + column + j * kSide;
      if (to < p.lanes) p.proj[row * p.lanes + to] = sums[j];
    }
    if (column == 0 && first == 0) p.square[row] = square;
  }
}

__global__ void __launch_bounds__(kThreads) ppca_rest_kernel(PpcaRestParams p) {
  __shared__ double c[kSide][kDepth + 1], w[kDepth][kColumns];
  __shared__ int any;  // whether a row of the block needs its residual
  const int column = int(threadIdx.x) % kSide, line = int(threadIdx.x) / kSide;
  for (int64_t item = blockIdx.x; item < (p.N + kSide - 1) / kSide; item += gridDim.x) {
    const int64_t row = item * kSide + line;
    const bool inside = row < p.N;
    double square = 0;
    for (int64_t j = column; inside && j < p.M; j += kSide) square += p.coords[row * p.M + j] * p.coords[row * p.M + j];
    square = group_sum(square, kSide);
    const double whole = inside ? p.square[row] : 0, rest = whole - square;
    const bool cancels = inside && !(rest > p.share * whole);
    if (inside && column == 0 && !cancels) p.rest[row] = rest;
    __syncthreads();  // until all have read the flag before
    if (threadIdx.x == 0) any = 0;
    __syncthreads();
    if (cancels && column == 0) any = 1;
    __syncthreads();
    if (any == 0) continue;
    double norm = 0;
    for (int64_t d = 0; d < p.D; d += kColumns) {
      double e[kPerThread];
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) {
        const int64_t at = d + column + j * kSide;
        e[j] = inside && at < p.D ? load_at<double>(p.x, row * p.x.stride_b + offset_of(p.x, at)) - p.b[at] : 0;
      }
      for (int64_t m = 0; m < p.M; m += kDepth) {
        __syncthreads();  // until all have read the tiles before
        for (int64_t i = column; i < kDepth; i += kSide) {
          c[line][i] = inside && m + i < p.M ? p.coords[row * p.M + m + i] : 0;
        }
        for (int64_t i = threadIdx.x; i < kDepth * kColumns; i += kThreads) {
          const int64_t from = m + i / kColumns, at = d + i % kColumns;
          w[i / kColumns][i % kColumns] = from < p.M && at < p.D ? p.Wt[from * p.stride_m + at] : 0;
        }
        __syncthreads();
        for (int i = 0; i < kDepth; ++i) {
#pragma unroll
          for (int j = 0; j < kPerThread; ++j) e[j] -= c[line][i] * w[i][column + j * kSide];
        }
      }
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) norm += e[j] * e[j];
    }
    norm = group_sum(norm, kSide);
    if (cancels && column == 0) p.rest[row] = norm;
  }
}

}  // namespace

void launch_ppca_project(const PpcaProjectParams& p, cudaStream_t stream) {
  const int64_t panels = (p.lanes + kColumns - 1) / kColumns;
  launch(ppca_project_kernel, blocks_for((p.N + kSide - 1) / kSide * panels, 1), stream, p);
}

void launch_ppca_rest(const PpcaRestParams& p, cudaStream_t stream) {
  launch(ppca_rest_kernel, blocks_for((p.N + kSide - 1) / kSide, 1), stream, p);
}

}  // namespace fastelbo::cuda
