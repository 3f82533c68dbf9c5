// What the CUDA kernels take beyond params.h, and how they are launched. No torch header here or in the .cu files.
//
// All pointers are device memory; "T" is the compute type, float or double. Every launch goes to the stream that is
// given, and nothing waits. Sums run in an order that depends on shapes alone: no atomics on floating-point numbers.
#pragma once

#include <cuda_runtime.h>

#include "likelihoods/info.h"
#include "params.h"

namespace fastelbo::cuda {

inline constexpr int kThreads = 256;         // of every block
inline constexpr int kRowBlocks = 3;         // that a multiprocessor holds at a time, of a kernel on plain rows
inline constexpr int64_t kBusy = 264;        // blocks that keep a large device busy: two for each of an H100's 132
inline constexpr int64_t kMaxBlocks = 4096;  // beyond them, a block takes several work items

// What a kernel whose blocks add up one number needs: the last block to finish adds the others' sums, in order.
struct Total {
  void* out = nullptr;           // T, or null: nothing is added up
  double* block_sums = nullptr;  // [kMaxBlocks]
  unsigned* ticket = nullptr;    // 0
};

// log p of rows with its gradient, then KL of rows with its gradient (none where kl.q.B is 0), in one launch:
//   total = fit_weight sum log p + kl_weight beta sum KL
struct RowsParams {
  LogProbParams fit;           // its log_p: [K, B, segments(D)] partial sums, or null
  KlParams kl;                 // its kl and floored_kl are not used
  void* log_p = nullptr;       // T [K, B], or null; only where segments(D) is 1, else add_segments()
  void* kl_out = nullptr;      // T [B]: KL, without free bits
  void* floored_kl = nullptr;  // T [B]: KL with free bits, or null
  Number beta;                 // multiplies kl_weight and the gradient of the KL
  double fit_weight = 0, kl_weight = 0;
  Total total;
};
void launch_rows(const RowsParams& p, int likelihood, bool is_double, cudaStream_t stream);

// The gradients of parameters that rows share, summed over the rows of every chunk: shared_grad of p. Reads recon and x
// once more (8 bytes per element in float32); nothing of full size is written.
void launch_shared_grads(const LogProbParams& p, int likelihood, bool is_double, cudaStream_t stream);

// KL of rows with its gradient alone. kl_out, floored_kl: T [B], or null.
void launch_kl(const KlParams& p, void* kl_out, void* floored_kl, bool is_double, cudaStream_t stream);

// [K, B, segments] partial sums, in double, to T [K, B].
void launch_add_segments(const double* parts, int64_t segments, int64_t rows, void* out, bool is_double,
                         cudaStream_t stream);

// A K-sample bound with alpha = 0 and its gradient, by datum. total: minus datum_weight times the bounds.
void launch_multi_sample(const MultiSampleParams& p, const Total& total, int likelihood, bool is_double,
                         cudaStream_t stream);
// The same without the gradients of the likelihood, from the partial sums [K, B, segments] of log p in p.fit.log_p, or
// from p.weights where that is null.
void launch_weigh(const MultiSampleParams& p, const Total& total, bool is_double, cudaStream_t stream);

// The samples, and the KL of every row.
struct SampleOutputs {
  void *log_ratio = nullptr, *log_q = nullptr;  // T [K, B] or [n], in place of those of the SampleParams
  void* kl = nullptr;                           // T [B]
};
void launch_samples(const SampleParams& p, const SampleOutputs& out, bool is_double, cudaStream_t stream);
void launch_samples_backward(const SampleBackwardParams& p, bool is_double, cudaStream_t stream);

// Batch means of every dimension's KL, for free bits: out [D].
void launch_kl_dims(const KlDimsParams& p, bool is_double, cudaStream_t stream);

void launch_log_mean_exp(const LogMeanExpParams& p, int64_t columns, bool is_double, cudaStream_t stream);

// What depends on the components alone; then log densities, or gradients: those of z and of weights that differ by row,
// and the sums of the others, in segments of p.segment rows; then these sums as gradients.
void launch_mixture_components(const MixtureComponentsParams& p, bool is_double, cudaStream_t stream);
void launch_mixture(const MixtureParams& p, bool is_double, cudaStream_t stream);
void launch_mixture_backward(const MixtureBackwardParams& p, bool is_double, cudaStream_t stream);
void launch_mixture_sums(const MixtureSumsParams& p, bool is_double, cudaStream_t stream);

// Every row's projections on the columns of W, unpadded, and squared norm.
void launch_ppca_project(const PpcaProjectParams& p, cudaStream_t stream);

void launch_ppca_rest(const PpcaRestParams& p, cudaStream_t stream);

// p[i] *= factor, which is on the device: reads nothing but the factor where that is 1.
void launch_scale(const View& p, int64_t n, Number factor, cudaStream_t stream);

}  // namespace fastelbo::cuda
