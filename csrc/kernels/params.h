// What the kernels take: plain structs of pointers and sizes, and the table of kernels of one instruction set.
//
// Shapes: K samples, B batch, D event elements (data or latent dimensions, flattened). "Row" is (k, b), at k * B + b.
#pragma once

#include <cstdint>

namespace fastelbo {

enum class DType : uint8_t { f32, f64, bf16, f16, u8, b8 };

// A strided view of [K, B, D]. D is walked through up to kMaxDims collapsed dimensions; all strides are in elements.
struct View {
  static constexpr int kMaxDims = 6;
  void* data = nullptr;
  DType dtype = DType::f32;
  bool unit = false;  // uint8 that is read as value / 255
  int64_t stride_k = 0, stride_b = 0;
  int ndim = 1;
  int64_t size[kMaxDims] = {1}, stride[kMaxDims] = {1};

  constexpr explicit operator bool() const { return data != nullptr; }
};

// One number for every row, or the same for all: upstream gradients. Type: the kernel's compute type.
struct RowScalars {
  const void* data = nullptr;  // null: the constant
  double constant = 0;
  int64_t stride_k = 0, stride_b = 0;
};

inline constexpr int64_t kSegment = 4096;                  // a row's unit of work: the same for any number of threads
inline constexpr int64_t kTile = 1024, kLatentTile = 512;  // what is in the L1 cache at a time
inline constexpr int64_t segments(int64_t d) { return d <= kSegment ? 1 : (d + kSegment - 1) / kSegment; }

// log p(x | recon) of every row, its gradient, or both. Work items: rows x segments(D).
struct LogProbParams {
  int64_t K = 1, B = 0, D = 0;
  View recon, scale, x, mask;           // scale, mask: may be empty
  View grad_recon, grad_scale, grad_x;  // written where not empty: row gradient x d log p
  RowScalars grad;
  double* out = nullptr;  // [K, B, segments] partial sums, or null
};

// KL of every row and its gradient. Work items: rows (B). K = 1.
struct KlParams {
  int64_t B = 0, D = 0;
  View mu, logvar, prior_mu, prior_logvar;  // priors may be empty: N(0, I)
  View grad_mu, grad_logvar, grad_prior_mu, grad_prior_logvar;
  RowScalars grad;
  const double* dim_means = nullptr;  // [D]: batch mean of every dimension's KL; null without free bits
  double free_bits = 0;
  double* out = nullptr;      // [B]: KL
  double* charged = nullptr;  // [B]: KL with free bits, or null
};

// Batch sums of every dimension's KL, for free bits. Work items: tiles of D.
struct KlDimsParams {
  int64_t B = 0, D = 0;
  View mu, logvar, prior_mu, prior_logvar;
  double* out = nullptr;  // [D]
};

// Samples of q and their log ratio. Work items: blocks of rows x blocks of samples, see sample_blocks().
struct SampleParams {
  int64_t K = 1, B = 0, D = 0;
  View mu, logvar, prior_mu, prior_logvar;  // [B, D]
  uint64_t seed = 0;
  int64_t first_sample = 0;
  View eps;                     // [K, B, D], or empty: from the seed
  View z;                       // [K, B, D]
  double* log_ratio = nullptr;  // [K, B], zeroed
};

// Gradients of the samples and of their log ratio. Work items: blocks of rows.
struct SampleBackwardParams {
  int64_t K = 1, B = 0, D = 0;
  View mu, logvar, prior_mu, prior_logvar;
  uint64_t seed = 0;
  int64_t first_sample = 0;
  View eps, grad_z;                                             // [K, B, D], may be empty
  RowScalars grad_log_ratio;                                    // [K, B]
  RowScalars gate_path, gate_score;                             // [K, B], see estimator.h; no data: 0
  RowScalars grad_kl;                                           // [B]
  View grad_mu, grad_logvar, grad_prior_mu, grad_prior_logvar;  // [B, D], may be empty
  View grad_eps;                                                // [K, B, D], may be empty
};

inline constexpr int64_t kSampleBlock = 64;  // samples in one work item of the forward
inline constexpr int64_t rows_per_block(int64_t d) {
  return d >= kLatentTile ? 1 : (d < 1 ? kLatentTile : kLatentTile / d);
}
inline constexpr int64_t row_blocks(int64_t b, int64_t d) { return (b + rows_per_block(d) - 1) / rows_per_block(d); }
inline constexpr int64_t sample_blocks(int64_t k) { return (k + kSampleBlock - 1) / kSampleBlock; }

// log mean exp of columns, and its gradient. Work items: columns = outer x inner; strides in elements.
struct LogMeanExpParams {
  int64_t K = 0, inner = 1;
  const void* log_w = nullptr;  // compute type
  int64_t stride_outer = 0, stride_k = 0, stride_inner = 0;
  void* out = nullptr;         // [outer, inner], forward
  const void* grad = nullptr;  // [outer, inner], backward
  void* grad_log_w = nullptr;  // the layout of log_w, backward
};

// Probabilistic PCA. M is padded to lanes, a multiple of kPpcaPanel; what lies beyond M is 0.
inline constexpr int64_t kPpcaPanel = 16, kPpcaRows = 48;
inline constexpr int64_t kPpcaTile = 240;  // of D; a multiple of 16 and of 12, as the kernels' register blocks are

// W = basis triangle by Gram-Schmidt, and whiten, the inverse of the R of a QR of [triangle'; sigma I]. One work item.
struct PpcaFactorParams {
  int64_t D = 0, M = 0;
  double sigma = 0;
  double* columns = nullptr;   // [M, D]: the columns of W, then those of the basis
  double* triangle = nullptr;  // [M, M], upper
  double* stacked = nullptr;   // [M, 2 M] scratch
  double* factor = nullptr;    // [M, M] scratch
  double* whiten = nullptr;    // [M, M], upper
};

// Projections of x - b on the columns of W, and its squared norm. Work items: blocks of kPpcaRows rows.
struct PpcaProjectParams {
  int64_t N = 0, D = 0, lanes = 0;
  View x;                     // [N, D]
  const double* b = nullptr;  // [D]
  const double* W = nullptr;  // [D, lanes]
  double* proj = nullptr;     // [N, lanes]
  double* square = nullptr;   // [N]
};

// Of every row, |x - b - basis coords|^2, the basis orthonormal: |x - b|^2 - |coords|^2 where that leaves more than
// `share` of |x - b|^2. Work items: blocks of kPpcaRows rows.
struct PpcaRestParams {
  int64_t N = 0, D = 0, M = 0;
  double share = 0;
  View x;                          // [N, D]
  const double* b = nullptr;       // [D]
  const double* Wt = nullptr;      // [M, stride_m]: the basis, 0 beyond D
  int64_t stride_m = 0;            // D, padded to a multiple of kPpcaPanel
  const double* coords = nullptr;  // [N, M]
  const double* square = nullptr;  // [N]: |x - b|^2
  double* rest = nullptr;          // [N]
};

// Sums over rows, of every chunk of them. Work items: chunks x tiles of D.
//   moments:  cross = sum of (x - b) mean', sum = sum of weight (x - b); in double
//   residual: the same of e = weight (x - b - W coords), in T, the compute type; e is made in double
struct PpcaSumsParams {
  int64_t N = 0, D = 0, M = 0, lanes = 0;
  int64_t chunk = kPpcaRows;       // rows in a chunk: a multiple of kPpcaRows
  View x;                          // [N, D]
  const double* b = nullptr;       // [D]
  const double* mean = nullptr;    // [N, lanes]
  const double* weight = nullptr;  // [N]
  void* cross = nullptr;           // [chunks, D, lanes]
  void* sum = nullptr;             // [chunks, D]
  // of the residual alone
  const double* coords = nullptr;      // [N, M]
  const double* Wt = nullptr;          // [M, stride_m], 0 beyond D
  int64_t stride_m = 0;                // D, padded to a multiple of kPpcaPanel
  const void* rounded_mean = nullptr;  // T [N, lanes]
  void* residual = nullptr;            // T [N, D]: e
};

template <class Params>
using Kernel = void (*)(const Params&, int64_t begin, int64_t end);

inline constexpr int kMaxLikelihoods = 32;

struct KernelTable {
  // [float or double]
  Kernel<KlParams> kl[2];
  Kernel<KlDimsParams> kl_dims[2];
  Kernel<SampleParams> sample[2];
  Kernel<SampleBackwardParams> sample_backward[2];
  Kernel<LogMeanExpParams> log_mean_exp[2], log_mean_exp_backward[2];
  // p[i] *= factor
  void (*scale_row[2])(void* p, int64_t n, double factor);
  Kernel<PpcaFactorParams> ppca_factor;
  Kernel<PpcaProjectParams> ppca_project;
  Kernel<PpcaRestParams> ppca_rest;
  Kernel<PpcaSumsParams> ppca_moments;
  Kernel<PpcaSumsParams> ppca_residual[2];
  // [likelihood][scale given][float or double]
  Kernel<LogProbParams> log_prob[kMaxLikelihoods][2][2];
};

// The table of the instruction set in use: the best that the CPU has, or FASTELBO_CPU_CAPABILITY. Chosen once.
const KernelTable& kernels();

struct LikelihoodInfo {
  const char* name;
  bool takes_scale;
};
struct IsaInfo {
  const char* name;
  bool supported;  // by this CPU
  const KernelTable& (*table)();
};

int likelihood_count();
const LikelihoodInfo& likelihood_info(int index);
int isa_count();
const IsaInfo& isa_info(int index);
const IsaInfo& isa_in_use();

}  // namespace fastelbo
