// What the kernels take: plain structs of pointers and sizes.
//
// Shapes: K samples, B batch, D event elements (data or latent dimensions, flattened). "Row" is (k, b), at k * B + b.
// "T" is the compute type: float, or double where the inputs are double.
#pragma once

#include <cstdint>

#include "likelihoods/info.h"
#include "math/estimator.h"

namespace fastelbo {

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

// One number of type T for every row, or the same for all: upstream gradients.
struct RowScalars {
  const void* data = nullptr;  // null: the constant
  double constant = 0;
  int64_t stride_k = 0, stride_b = 0;
};

template <class T>
constexpr T row_number(const RowScalars& s, int64_t k, int64_t b) {
  return s.data ? static_cast<const T*>(s.data)[k * s.stride_k + b * s.stride_b] : T(s.constant);
}

inline constexpr int64_t kSegment = 4096;                  // of a row, in one work item
inline constexpr int64_t kTile = 1024, kLatentTile = 512;  // what is in the L1 cache at a time
inline constexpr int64_t segments(int64_t d) { return d <= kSegment ? 1 : (d + kSegment - 1) / kSegment; }

// The gradient of a parameter that rows share, [*event] or 0-d: its sums over the rows of every chunk.
struct SharedGrad {
  void* sums = nullptr;  // T [chunks, size], or null: not wanted
  bool scalar = false;   // a 0-d one: its sums are over the columns of a segment, too
  int64_t size = 0;      // D, or segments(D) of a 0-d one
};

// log p(x | parameters) of every row, its gradient, or both. Work items: chunks of rows x segments(D).
struct LogProbParams {
  int64_t K = 1, B = 0, D = 0;
  int count = 1;                      // parameters that are given
  View parameter[kMaxParameters];     // [K, B, D]; of one that rows share, the strides over rows are 0
  View x, mask;                       // [B, D]; mask may be empty, and is [K, B, D] where it is an upstream gradient
  double added = 0;                   // to a mean and to theta
  View grad[kMaxParameters], grad_x;  // written where not empty: row factor x d log p
  SharedGrad shared_grad[kMaxParameters];
  RowScalars factor;        // [K, B]
  int64_t chunk = 1;        // rows of a work item; more than 1 only where rows share a gradient
  double* log_p = nullptr;  // [K, B, segments] partial sums, or null
  View value;               // [K, B, D]: log p of every element, written where not empty

  // whether a gradient of full size is wanted
  constexpr bool any_grad() const {
    bool any = bool(grad_x);
    for (const View& g : grad) any |= bool(g);
    return any;
  }
  constexpr int64_t rows() const { return K * B; }
  constexpr int64_t chunks() const { return (rows() + chunk - 1) / chunk; }
};

// A K-sample bound and its gradient, by datum: math/estimator.h.
struct MultiSampleParams {
  LogProbParams fit;  // log p and its gradients of full size; the weights are in place of its factor
  Estimator estimator;
  RowScalars log_ratio;        // [K, B]
  double datum_weight = 1;     // of a datum's loss in the returned one
  double* weights = nullptr;   // [K, B]: log w, then the weights a
  double* bound = nullptr;     // [B]
  void* log_p = nullptr;       // T [K, B], or null
  void* row_factor = nullptr;  // T [K, B], or null: -datum_weight a, the gradient of the loss by log w
  void* gates = nullptr;       // T [2, K, B], or null: b / a - 1 and c / a - 1
  double* slopes = nullptr;    // [2, B], or null: of the bound by elbo_weight and by alpha
};

// What reaches a sample in the backward: the gradient of z; those of log p(z) and log q(z) too; and an estimator's
// share of each.
enum class Upstream { z, densities, gated };

// N(mu, diag exp(logvar)) and its prior, N(0, I) where that is empty.
struct Latents {
  int64_t B = 0, D = 0;
  View mu, logvar, prior_mu, prior_logvar;  // [B, D]
};

struct LatentGrads {
  View mu, logvar, prior_mu, prior_logvar;  // [B, D], written where not empty

  constexpr bool prior() const { return prior_mu || prior_logvar; }
  constexpr bool any() const { return mu || logvar || prior(); }
};

// KL of every row and its gradient. Work items: blocks of rows.
struct KlParams {
  Latents q;
  LatentGrads grad;
  RowScalars factor;                  // [B]
  const double* dim_means = nullptr;  // [D]: batch mean of every dimension's KL; null without free bits
  Number free_bits;
  double* kl = nullptr;          // [B], or null
  double* floored_kl = nullptr;  // [B]: KL with free bits, or null
};

// Batch sums of every dimension's KL, for free bits. Work items: tiles of D.
struct KlDimsParams {
  Latents q;
  double* out = nullptr;  // [D]
};

// Samples of q and their log densities. Work items: blocks of rows x blocks of samples, see sample_blocks(); of chosen
// samples, the rows.
struct SampleParams {
  Latents q;
  int64_t K = 1, first_sample = 0;
  const int64_t* seed = nullptr;  // on the device of the tensors; null with eps
  View eps;                       // [K, B, D], or empty: from the seed
  int64_t n = 0;
  const int64_t *sample = nullptr, *datum = nullptr;  // [n], or null: row i is sample[i] of datum[i], in place of all
  View z;                                             // [K, B, D] or [n, D]
  double *log_ratio = nullptr, *log_q = nullptr;      // [K, B] or [n], zeroed
};

// Their gradients. Work items: blocks of rows; of chosen samples, the data: the rows of datum b are order[i] for i in
// [starts[b], starts[b + 1]).
struct SampleBackwardParams {
  Latents q;
  int64_t K = 1, first_sample = 0;
  const int64_t* seed = nullptr;
  View eps, grad_z;                                   // [K, B, D] or [n, D], may be empty
  const int64_t *sample = nullptr, *order = nullptr;  // [n], or null
  const int64_t* starts = nullptr;                    // [B + 1]
  RowScalars grad_log_ratio, grad_log_q;              // [K, B] or [n]; no data: 0
  RowScalars gate_path, gate_score;                   // likewise, see math/estimator.h
  RowScalars grad_kl;                                 // [B]
  LatentGrads grad;
  View grad_eps;  // [K, B, D], may be empty

  constexpr Upstream upstream() const {
    return gate_path.data                           ? Upstream::gated
           : grad_log_ratio.data || grad_log_q.data ? Upstream::densities
                                                    : Upstream::z;
  }
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

// Inverses of symmetric positive definite matrices. Work items: matrices.
struct PpcaInvertParams {
  int64_t M = 0;
  const double* matrices = nullptr;  // [N, M, M]
  double* inverses = nullptr;        // [N, M, M]
  double* scratch = nullptr;         // [N, M]
  double* log_det = nullptr;         // [N]; NaN of a matrix that is not positive definite
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

// Products of a sparse matrix X [N, D], by rows, with a dense one: X A [N, lanes] of A [D, lanes], or X' A [D, lanes]
// of A [N, lanes]; lanes is a multiple of kCsrPanel.
inline constexpr int64_t kCsrPanel = 16, kCsrRows = 64;

struct CsrParams {
  int64_t N = 0, D = 0, lanes = 0;
  int64_t block = 0;                // columns of X that are taken together
  const int64_t* starts = nullptr;  // [N + 1]: row i has the numbers from starts[i] to starts[i + 1]
  const void* columns = nullptr;    // of the numbers, rising in every row: int64 where `wide`, else int32
  bool wide = false;
  View values;                   // [numbers]
  const void* matrix = nullptr;  // T: A
  void* product = nullptr;       // T
};

// Mixtures of C diagonal Gaussians in M dimensions: log sum_c w_c N(z; mu_c, exp lv_c) of N rows z, or of each of their
// dimensions apart. "Group" is a mixture that shares its rows and weights with others: there is one, or one per
// dimension.
inline constexpr int64_t kMixtureRows = 128;  // of a block, at most: the rows are lanes of vectors
inline constexpr int64_t kMixtureTile = 32;   // components whose log densities of a block are in the L1 cache at a time
inline constexpr int64_t mixture_rows(int64_t n) { return n < 1024 ? kMixtureRows / 2 : kMixtureRows; }
inline constexpr int64_t mixture_blocks(int64_t n) { return (n + mixture_rows(n) - 1) / mixture_rows(n); }

// What depends on the components alone. Work items: components.
struct MixtureComponentsParams {
  int64_t C = 0, M = 0;
  bool per_dimension = false;
  View mu, logvar;                // [C, M]
  const void* weights = nullptr;  // T, the log weights that all rows share, or null: log_weight
  int64_t stride_weights = 0;
  double log_weight = 0;
  void* copied_mu = nullptr;  // T [C, M], or null
  void* inv_std = nullptr;    // T [C, M]: exp(-lv / 2)
  void* base = nullptr;       // T [C], per dimension [C, M]: the weighted log density at mu
};

// Work items: blocks of rows.
struct MixtureParams {
  int64_t N = 0, C = 0, M = 0;
  bool per_dimension = false;
  View z;                                                         // [M, N]
  const void *mu = nullptr, *inv_std = nullptr, *base = nullptr;  // as above
  View weights;             // T [C, N / weight_rows]: added to base; empty where that has them
  int64_t weight_rows = 1;  // neighbours that share their weights
  View log_prob;            // [groups, N]

  constexpr int64_t groups() const { return per_dimension ? M : 1; }
  constexpr int64_t dims() const { return per_dimension ? 1 : M; }  // of a group
};

// Work items: segments of blocks x ranges of components.
struct MixtureBackwardParams {
  MixtureParams of;                   // its log_prob is read
  View grad;                          // T [groups, N]
  View grad_z;                        // [M, N], or empty; only where there is one range
  int64_t segments = 1, segment = 1;  // how many, and the blocks (on CUDA devices the rows) of one
  int64_t ranges = 1, range = 1;      // how many, and the components of one
  // With r the upstream gradient times the responsibility and d = (z - mu) exp(-lv / 2), the sums of every segment:
  double* sums = nullptr;         // [segments, 2, C, M]: of r d and of r (d^2 - 1), or null
  double* weight_sums = nullptr;  // [segments, C]: of r, or null
  View grad_weights;  // [C, N / weight_rows], or empty: T of r where weight_rows is 1, else double, added to
};

// The sums of all segments as gradients. Work items: components.
struct MixtureSumsParams {
  int64_t C = 0, M = 0, segments = 1;
  const void* inv_std = nullptr;  // T [C, M]
  const double *sums = nullptr, *weight_sums = nullptr;
  View grad_mu, grad_logvar, grad_weights;  // [C, M], [C, M], [C, 1], written where not empty
};

}  // namespace fastelbo
