// What the CUDA kernels take beyond params.h, and how they are launched. No torch header here or in the .cu files.
//
// All pointers are device memory; "T" is the compute type, float or double. Every launch goes to the stream that is
// given, and nothing waits. Sums run in an order that depends on shapes alone: no atomics on floating-point numbers.
#pragma once

#include <cuda_runtime.h>

#include "estimator.h"
#include "kernels/params.h"

namespace fastelbo::cuda {

inline constexpr int kThreads = 256;         // of every block
inline constexpr int64_t kMaxBlocks = 4096;  // beyond them, a block takes several work items

// What a kernel whose blocks add up one number needs: the last block to finish adds the others' sums, in order.
struct Total {
  void* out = nullptr;           // T, or null: nothing is added up
  double* block_sums = nullptr;  // [kMaxBlocks]
  unsigned* ticket = nullptr;    // 0
};

// A float or double on the device, in any floating dtype; the constant 1 where data is null.
struct DeviceScalar {
  const void* data = nullptr;
  DType dtype = DType::f32;
};

// log p of rows with its gradient, then KL of rows with its gradient (none where kl.B is 0), in one launch:
//   total = fit_share sum log p + kl_share beta sum KL
struct RowsParams {
  LogProbParams fit;        // its out: [K, B, segments(D)] partial sums, or null
  KlParams kl;              // its out and charged are not used
  void* log_p = nullptr;    // T [K, B], or null; only where segments(D) is 1, else add_segments()
  void* kl_out = nullptr;   // T [B]: KL, without free bits
  void* charged = nullptr;  // T [B]: KL with free bits, or null
  DeviceScalar beta;        // multiplies kl_share and the gradient of the KL
  double fit_share = 0, kl_share = 0;
  Total total;
};
void launch_rows(const RowsParams& p, int likelihood, bool scale, bool wide, cudaStream_t stream);

// [K, B, segments] partial sums, in double, to T [K, B].
void launch_add_segments(const double* parts, int64_t segments, int64_t rows, void* out, bool wide,
                         cudaStream_t stream);

// A K-sample bound with its gradient (estimator.h), by datum.
struct MultiSampleParams {
  LogProbParams fit;  // its grad is not used
  Estimator estimator;
  RowScalars log_ratio;            // [K, B]
  bool given = false;              // fit.out holds the partial sums of log p already, and the gradients come later
  void* log_p = nullptr;           // T [K, B]
  double* weights = nullptr;       // [K, B] scratch: log w, then the weights a
  void* bound = nullptr;           // T [B]: minus the bound, or null
  void* grad_log_ratio = nullptr;  // T [K, B], or null: -share a
  void* grad_gates = nullptr;      // T [2, K, B], or null
  void* row_grad = nullptr;        // T [K, B], or null: -share a, for the gradients that come later
  double share = 1;                // of a datum's loss in the total
  Total total;
};
void launch_multi_sample(const MultiSampleParams& p, int likelihood, bool scale, bool wide, cudaStream_t stream);

// The samples; also the KL of every row, where kl is not null.
struct SamplesParams {
  SampleParams p;  // its seed and log_ratio are not used
  const int64_t* seed = nullptr;
  void* log_ratio = nullptr;  // T [K, B]
  void* kl = nullptr;         // T [B]
};
void launch_samples(const SamplesParams& p, bool wide, cudaStream_t stream);

struct SamplesBackwardParams {
  SampleBackwardParams p;  // its seed is not used
  const int64_t* seed = nullptr;
};
void launch_samples_backward(const SamplesBackwardParams& p, bool wide, cudaStream_t stream);

// Batch means of every dimension's KL, for free bits: out [D].
void launch_kl_dims(const KlDimsParams& p, bool wide, cudaStream_t stream);

void launch_log_mean_exp(const LogMeanExpParams& p, int64_t columns, bool wide, cudaStream_t stream);

// Every row's projections on the columns of W, unpadded, and squared norm.
void launch_ppca_project(const PpcaProjectParams& p, cudaStream_t stream);

void launch_ppca_rest(const PpcaRestParams& p, cudaStream_t stream);

// p[i] *= factor, which is on the device: reads nothing but the factor where that is 1.
void launch_scale(const View& p, int64_t n, DeviceScalar factor, cudaStream_t stream);

}  // namespace fastelbo::cuda
