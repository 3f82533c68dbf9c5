// Probabilistic PCA: matrix products that never write x - b to memory.
//
// In double, since all of them cancel where sigma is small against W, and float32 would lose a digit for every factor
// of 10 in |r| / |e|, r = x - b, e = r - W m: sum r m' - W sum m m' in the moments, e itself in the residual. Squared
// norms would lose two digits, in double too: |e|^2 is a difference of them only where they leave enough of |r|^2.
// x is read once by each; D M multiply-adds per row in double, and in the residual, which is needed for the gradient of
// x alone, D M more in the compute type for the sums of e, which do not cancel.
#pragma once

#include "cpu/kernels/tile.h"

namespace fastelbo::FASTELBO_ISA {

inline constexpr int kGroupRows = kVectorBytes * 3 / 16;
template <class T>
inline constexpr int kPanel = 64 / sizeof(T);  // columns of a register block: a cache line

// c[i][0 .. kPanel) += sum_k a[i][k] b[k][0 .. kPanel), or -=, for Rows rows i. Rows x 64 bytes of sums stay in
// registers: 12 of 16 (24 of 32 with AVX-512).
template <int Rows, bool kMinus, class T>
FASTELBO_HD void multiply_block(const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_step, int64_t n, T* c,
                                int64_t c_row) {
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  typedef T Unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
  constexpr int kVectors = 64 / kVectorBytes, kLength = kVectorBytes / int(sizeof(T));
  Vector sums[Rows][kVectors] = {};
  for (int64_t k = 0; k < n; ++k) {
    Vector row[kVectors];
    FASTELBO_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) row[v] = *reinterpret_cast<const Unaligned*>(b + k * b_step + v * kLength);
    FASTELBO_UNROLL(12)
    for (int i = 0; i < Rows; ++i) {
      const T factor = a[i * a_row + k * a_step];
      FASTELBO_UNROLL(4)
      for (int v = 0; v < kVectors; ++v) sums[i][v] += factor * row[v];
    }
  }
  FASTELBO_UNROLL(12)
  for (int i = 0; i < Rows; ++i) {
    FASTELBO_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) {
      auto* to = reinterpret_cast<Unaligned*>(c + i * c_row + v * kLength);
      *to = kMinus ? *to - sums[i][v] : *to + sums[i][v];
    }
  }
}

// The same for any number of rows, and of columns in whole panels: c [rows, columns] += a [rows, n] b [n, columns].
template <bool kMinus, class T>
inline void multiply(const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_step, int64_t n, T* c,
                     int64_t c_row, int64_t rows, int64_t columns) {
  for (int64_t j = 0; j < columns; j += kPanel<T>) {
    int64_t i = 0;
    for (; i + kGroupRows <= rows; i += kGroupRows) {
      multiply_block<kGroupRows, kMinus>(a + i * a_row, a_row, a_step, b + j, b_step, n, c + i * c_row + j, c_row);
    }
    for (; i + kGroupRows / 3 <= rows; i += kGroupRows / 3) {
      multiply_block<kGroupRows / 3, kMinus>(a + i * a_row, a_row, a_step, b + j, b_step, n, c + i * c_row + j, c_row);
    }
    for (; i < rows; ++i) {
      multiply_block<1, kMinus>(a + i * a_row, a_row, a_step, b + j, b_step, n, c + i * c_row + j, c_row);
    }
  }
}

// x - b of `rows` rows and n columns into r [rows, kPpcaTile]; up to the next panel, what follows a row is 0.
// f(i, r_i) sees every row while it is in the L1 cache.
template <class F>
inline void center(const View& x, const double* __restrict b, int64_t row, int64_t rows, int64_t column, int64_t n,
                   double* r, F f) {
  alignas(64) double buffer[kPpcaTile];
  b += column;
  for (int64_t i = 0; i < rows; ++i) {
    double* __restrict to = r + i * kPpcaTile;
    if (lies_as<float>(x)) {
      const float* __restrict from = static_cast<const float*>(x.data) + (row + i) * x.stride_b + column;
#pragma omp simd
      for (int64_t d = 0; d < n; ++d) to[d] = double(from[d]) - b[d];
    } else {
      const double* __restrict from = load<double>(x, 0, row + i, column, n, buffer);
#pragma omp simd
      for (int64_t d = 0; d < n; ++d) to[d] = from[d] - b[d];
    }
    for (int64_t d = n; d < kPpcaTile && d % kPanel<double> != 0; ++d) to[d] = 0;
    f(i, to);
  }
}

inline double dot(const double* __restrict a, const double* __restrict b, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// Columns [m, n], in rows of memory, become orthonormal: columns = basis R, R [m, m] upper.
//
// Gram-Schmidt, again where the norm fell by more than half: what is left then holds rounding errors that are not
// orthogonal. A column that depends on those before it becomes 0, which adds nothing to basis R.
inline void orthonormalize(double* columns, int64_t m, int64_t n, double* R) {
  constexpr int kTogether = 4;
  for (int64_t j = 0; j < m; ++j) {
    double* __restrict w = columns + j * n;
    const double whole = std::sqrt(dot(w, w, n));
    double before = whole, norm = whole;
    for (int64_t i = 0; i < m; ++i) R[i * m + j] = 0;
    do {
      before = norm;
      int64_t i = 0;
      for (; i + kTogether <= j; i += kTogether) {
        const double* __restrict q0 = columns + i * n, * __restrict q1 = q0 + n, * __restrict q2 = q1 + n, * __restrict q3 = q2 + n;
        double s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
        for (int64_t d = 0; d < n; ++d) s0 += q0[d] * w[d], s1 += q1[d] * w[d], s2 += q2[d] * w[d], s3 += q3[d] * w[d];
#pragma omp simd
        for (int64_t d = 0; d < n; ++d) w[d] -= (s0 * q0[d] + s1 * q1[d]) + (s2 * q2[d] + s3 * q3[d]);
        R[i * m + j] += s0, R[(i + 1) * m + j] += s1, R[(i + 2) * m + j] += s2, R[(i + 3) * m + j] += s3;
      }
      for (; i < j; ++i) {
        const double* __restrict q = columns + i * n;
        const double s = dot(q, w, n);
#pragma omp simd
        for (int64_t d = 0; d < n; ++d) w[d] -= s * q[d];
        R[i * m + j] += s;
      }
      norm = std::sqrt(dot(w, w, n));
    } while (norm < 0.5 * before && norm > 4 * 0x1p-53 * whole);
    if (norm <= 4 * 0x1p-53 * whole) norm = 0;
    const double scale = norm == 0 ? 0 : 1 / norm;
    for (int64_t d = 0; d < n; ++d) w[d] *= scale;
    R[j * m + j] = norm;
  }
}

// R [m, m] upper -> its inverse.
inline void invert_upper(const double* R, int64_t m, double* inverse) {
  for (int64_t i = m - 1; i >= 0; --i) {
    double* __restrict row = inverse + i * m;
    for (int64_t j = 0; j < m; ++j) row[j] = i == j;
    for (int64_t k = i + 1; k < m; ++k) {
      const double* __restrict from = inverse + k * m;
      const double factor = R[i * m + k];
#pragma omp simd
      for (int64_t j = k; j < m; ++j) row[j] -= factor * from[j];
    }
    for (int64_t j = i; j < m; ++j) row[j] /= R[i * m + i];
  }
}

inline void ppca_factor_kernel(const PpcaFactorParams& p, int64_t begin, int64_t end) {
  if (begin == end) return;
  orthonormalize(p.columns, p.M, p.D, p.triangle);
  for (int64_t j = 0; j < p.M; ++j) {
    double* column = p.stacked + j * 2 * p.M;
    std::memcpy(column, p.triangle + j * p.M, size_t(p.M) * sizeof(double));
    for (int64_t i = 0; i < p.M; ++i) column[p.M + i] = i == j ? p.sigma : 0;
  }
  orthonormalize(p.stacked, p.M, 2 * p.M, p.factor);
  invert_upper(p.factor, p.M, p.whiten);
}

// By Cholesky's L: A = L L', then L^-1 in place of L, then L^-T L^-1 in place of that.
inline void ppca_invert_kernel(const PpcaInvertParams& p, int64_t begin, int64_t end) {
  const int64_t m = p.M;
  for (int64_t item = begin; item < end; ++item) {
    double *a = p.inverses + item * m * m, *__restrict copy = p.scratch + item * m;
    std::memcpy(a, p.matrices + item * m * m, size_t(m * m) * sizeof(double));
    double log_det = 0;
    for (int64_t i = 0; i < m; ++i) {
      double* row = a + i * m;
      for (int64_t j = 0; j < i; ++j) row[j] = (row[j] - dot(row, a + j * m, j)) / a[j * m + j];
      const double pivot = row[i] - dot(row, row, i);
      log_det += std::log(pivot > 0 ? pivot : NAN);
      row[i] = std::sqrt(pivot);
    }
    p.log_det[item] = log_det;
    for (int64_t i = 0; i < m; ++i) {
      double* __restrict row = a + i * m;
      const double scale = 1 / row[i];
      for (int64_t k = 0; k < i; ++k) copy[k] = row[k] * scale, row[k] = 0;
      for (int64_t k = 0; k < i; ++k) {
        const double factor = copy[k];
        const double* __restrict from = a + k * m;
#pragma omp simd
        for (int64_t j = 0; j <= k; ++j) row[j] -= factor * from[j];
      }
      row[i] = scale;
    }
    for (int64_t k = 0; k < m; ++k) {
      std::memcpy(copy, a + k * m, size_t(k + 1) * sizeof(double));
      std::memset(a + k * m, 0, size_t(k + 1) * sizeof(double));
      for (int64_t i = 0; i <= k; ++i) {
        double* __restrict row = a + i * m;
        const double factor = copy[i];
#pragma omp simd
        for (int64_t j = 0; j <= i; ++j) row[j] += factor * copy[j];
      }
    }
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = i + 1; j < m; ++j) a[i * m + j] = a[j * m + i];
    }
  }
}

inline void ppca_project_kernel(const PpcaProjectParams& p, int64_t begin, int64_t end) {
  alignas(64) double r[kPpcaRows * kPpcaTile];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item * kPpcaRows, rows = p.N - row < kPpcaRows ? p.N - row : kPpcaRows;
    double* proj = p.proj + row * p.lanes;
    std::memset(proj, 0, size_t(rows * p.lanes) * sizeof(double));
    for (int64_t i = 0; i < rows; ++i) p.square[row + i] = 0;
    for (int64_t d = 0; d < p.D; d += kPpcaTile) {
      const int64_t n = p.D - d < kPpcaTile ? p.D - d : kPpcaTile;
      center(p.x, p.b, row, rows, d, n, r, [&](int64_t i, const double* __restrict e) {
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < n; ++j) sum += e[j] * e[j];
        p.square[row + i] += sum;
      });
      multiply<false>(r, kPpcaTile, 1, p.W + d * p.lanes, p.lanes, n, proj, p.lanes, rows, p.lanes);
    }
  }
}

inline void ppca_rest_kernel(const PpcaRestParams& p, int64_t begin, int64_t end) {
  alignas(64) double r[kPpcaRows * kPpcaTile];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item * kPpcaRows, rows = p.N - row < kPpcaRows ? p.N - row : kPpcaRows;
    bool cancels[kPpcaRows], any = false;
    for (int64_t i = 0; i < rows; ++i) {
      const double* coords = p.coords + (row + i) * p.M;
      const double square = p.square[row + i], rest = square - dot(coords, coords, p.M);
      cancels[i] = !(rest > p.share * square);
      any |= cancels[i];
      p.rest[row + i] = cancels[i] ? 0 : rest;
    }
    if (!any) continue;
    for (int64_t d = 0; d < p.D; d += kPpcaTile) {
      const int64_t n = p.D - d < kPpcaTile ? p.D - d : kPpcaTile;
      center(p.x, p.b, row, rows, d, n, r, [](int64_t, const double*) {});
      multiply<true>(p.coords + row * p.M, p.M, 1, p.Wt + d, p.stride_m, p.M, r, kPpcaTile, rows, n);
      for (int64_t i = 0; i < rows; ++i) {
        if (cancels[i]) p.rest[row + i] += dot(r + i * kPpcaTile, r + i * kPpcaTile, n);
      }
    }
  }
}

// The rows and columns of a work item of the two kernels below.
struct PpcaBlock {
  int64_t chunk, first, last, d, n;

  PpcaBlock(const PpcaSumsParams& p, int64_t item) {
    const int64_t tiles = (p.D + kPpcaTile - 1) / kPpcaTile;
    chunk = item / tiles, d = item % tiles * kPpcaTile;
    n = p.D - d < kPpcaTile ? p.D - d : kPpcaTile;
    first = chunk * p.chunk, last = first + p.chunk < p.N ? first + p.chunk : p.N;
  }
};

inline void ppca_moments_kernel(const PpcaSumsParams& p, int64_t begin, int64_t end) {
  alignas(64) double r[kPpcaRows * kPpcaTile];
  for (int64_t item = begin; item < end; ++item) {
    const PpcaBlock block(p, item);
    double* cross = static_cast<double*>(p.cross) + (block.chunk * p.D + block.d) * p.lanes;
    double* __restrict sum = static_cast<double*>(p.sum) + block.chunk * p.D + block.d;
    std::memset(cross, 0, size_t(block.n * p.lanes) * sizeof(double));
    std::memset(sum, 0, size_t(block.n) * sizeof(double));
    for (int64_t row = block.first; row < block.last; row += kPpcaRows) {
      const int64_t rows = block.last - row < kPpcaRows ? block.last - row : kPpcaRows;
      center(p.x, p.b, row, rows, block.d, block.n, r, [&](int64_t i, const double* __restrict e) {
        const double weight = p.weight[row + i];
#pragma omp simd
        for (int64_t j = 0; j < block.n; ++j) sum[j] += weight * e[j];
      });
      multiply<false>(r, 1, kPpcaTile, p.mean + row * p.lanes, p.lanes, rows, cross, p.lanes, block.n, p.lanes);
    }
  }
}

template <class T>
void ppca_residual_kernel(const PpcaSumsParams& p, int64_t begin, int64_t end) {
  alignas(64) double r[kPpcaRows * kPpcaTile];
  alignas(64) T e[kPpcaRows * kPpcaTile];
  const T* means = static_cast<const T*>(p.rounded_mean);
  for (int64_t item = begin; item < end; ++item) {
    const PpcaBlock block(p, item);
    const int64_t d = block.d, n = block.n;
    T* cross = static_cast<T*>(p.cross) + (block.chunk * p.D + d) * p.lanes;
    T* __restrict sum = static_cast<T*>(p.sum) + block.chunk * p.D + d;
    std::memset(cross, 0, size_t(n * p.lanes) * sizeof(T));
    std::memset(sum, 0, size_t(n) * sizeof(T));
    for (int64_t row = block.first; row < block.last; row += kPpcaRows) {
      const int64_t rows = block.last - row < kPpcaRows ? block.last - row : kPpcaRows;
      center(p.x, p.b, row, rows, d, n, r, [](int64_t, const double*) {});
      multiply<true>(p.coords + row * p.M, p.M, 1, p.Wt + d, p.stride_m, p.M, r, kPpcaTile, rows, n);
      for (int64_t i = 0; i < rows; ++i) {
        const double* __restrict from = r + i * kPpcaTile;
        T* __restrict to = e + i * kPpcaTile;
        const double weight = p.weight[row + i];
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) to[j] = T(weight * from[j]);
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) sum[j] += to[j];
        std::memcpy(static_cast<T*>(p.residual) + (row + i) * p.D + d, to, size_t(n) * sizeof(T));
      }
      multiply<false>(e, 1, kPpcaTile, means + row * p.lanes, p.lanes, rows, cross, p.lanes, n, p.lanes);
    }
  }
}

}  // namespace fastelbo::FASTELBO_ISA
