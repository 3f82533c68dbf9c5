// Mixtures of diagonal Gaussians and their gradients, in one pass over all pairs of a row and a component.
//
// The rows of a block are the lanes of vectors, so that nothing is summed across lanes but the gradients of a
// component, once per block. With d_m = (z_m - mu_cm) exp(-lv_cm / 2), which cancels nothing that z - mu has not lost,
//   t_c = log w_c - 1/2 sum_m [d_m^2 + lv_cm + log 2 pi],  log p = log sum_c exp t_c,  r_c = upstream exp(t_c - log p)
//   d/dz_m = -sum_c r_c d_m exp(-lv_cm / 2),  d/dmu_cm = exp(-lv_cm / 2) sum_n r_c d_m,
//   d/dlv_cm = 1/2 sum_n r_c (d_m^2 - 1),  d/dlog w_c = sum_n r_c
//
// Per dimension the same holds for each m apart. The backward computes t_c again, by the same code: exp(t_c - log p) is
// then never above 1, however large t_c and its rounding are.
#pragma once

#include "cpu/kernels/tile.h"
#include "math/log_mean_exp.h"

namespace fastelbo::FASTELBO_ISA {

// Memory whose size depends on M: of one call, not of one work item.
template <class T>
class Lines {
  T* data_;

 public:
  explicit Lines(int64_t lines)
      : data_(static_cast<T*>(::operator new(size_t(lines* kMixtureRows) * sizeof(T), std::align_val_t(64)))) {}
  Lines(const Lines&) = delete;
  ~Lines() { ::operator delete(data_, std::align_val_t(64)); }
  T* operator[](int64_t line) { return data_ + line * kMixtureRows; }
  const T* operator[](int64_t line) const { return data_ + line * kMixtureRows; }
};

template <class T>
struct Lane {
  typedef T Vector __attribute__((vector_size(kVectorBytes), may_alias));
  typedef typename Float<T>::Int Integers __attribute__((vector_size(kVectorBytes), may_alias));
  static constexpr int kLength = kVectorBytes / int(sizeof(T));
  using Indices = std::make_integer_sequence<int, kLength>;
};

// Of lanes whose index has not the bit `step` the sums of a's lanes that differ in it, of the others those of b's.
template <class T, int step, class Vector, int... i>
FASTELBO_HD Vector joined(Vector a, Vector b, std::integer_sequence<int, i...>) {
  constexpr int n = sizeof...(i);
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (i & step ? n + i : i)...) +
         __builtin_shufflevector(a, b, ((i & step ? n : 0) + (i ^ step))...);
#else  // g++ has that from version 12 on
  using Integers = typename Lane<T>::Integers;
  const Integers own = {(i & step ? n + i : i)...}, other = {((i & step ? n : 0) + (i ^ step))...};
  return __builtin_shuffle(a, b, own) + __builtin_shuffle(a, b, other);
#endif
}

// The sums of kCount vectors over their lanes, that of the first in the first lane, and so on, kLength / kCount apart.
template <class T, int kCount, int step = Lane<T>::kLength / 2, class Vector>
FASTELBO_HD Vector lane_sums(const Vector (&v)[kCount]) {
  constexpr int kLeft = kCount > 1 ? kCount / 2 : 1;
  Vector half[kLeft];
  FASTELBO_UNROLL(4)
  for (int k = 0; k < kLeft; ++k) {
    half[k] = joined<T, step>(v[k], v[kCount > 1 ? k + kLeft : k], typename Lane<T>::Indices());
  }
  if constexpr (step > 1) {
    return lane_sums<T, kLeft, step / 2>(half);
  } else {
    return half[0];
  }
}

// The sum of n numbers in whole vectors, and whether any of them is not 0.
template <class T>
struct SumOfAny {
  T sum = 0;
  bool any = false;

  SumOfAny() = default;
  FASTELBO_HD SumOfAny(const T* p, int64_t n) {
    typename Lane<T>::Vector sums[1] = {};
    typename Lane<T>::Integers bits = {};
    for (int64_t i = 0; i < n; i += Lane<T>::kLength) {
      sums[0] += *reinterpret_cast<const typename Lane<T>::Vector*>(p + i);
      bits |= *reinterpret_cast<const typename Lane<T>::Integers*>(p + i);
    }
    sum = lane_sums<T>(sums)[0];
    uint64_t words[kVectorBytes / 8], all = 0;
    memcpy(words, &bits, sizeof(words));
    for (uint64_t word : words) all |= word;
    constexpr uint64_t kSigns = sizeof(T) == 4 ? 0x8000000080000000u : 0x8000000000000000u;
    any = (all & ~kSigns) != 0;
  }
};

// sum_m ((z_m - mu_m) inv_std_m)^2 of kVectors vectors of rows; z [M][kMixtureRows].
template <int kVectors, class T>
FASTELBO_HD void squared_distances(const T* z, const T* mu, const T* inv_std, int64_t M, T* to) {
  using Vector = typename Lane<T>::Vector;
  constexpr int64_t kTogether = 16;  // dimensions in a sum of their own: fewer roundings add up
  Vector totals[kVectors] = {};
  for (int64_t begin = 0; begin < M; begin += kTogether) {
    const int64_t end = M - begin < kTogether ? M : begin + kTogether;
    Vector sums[kVectors] = {};
    for (int64_t m = begin; m < end; ++m) {
      const Vector* row = reinterpret_cast<const Vector*>(z + m * kMixtureRows);
      FASTELBO_UNROLL(4)
      for (int v = 0; v < kVectors; ++v) {
        const Vector d = (row[v] - mu[m]) * inv_std[m];
        sums[v] += d * d;
      }
    }
    FASTELBO_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) totals[v] += sums[v];
  }
  FASTELBO_UNROLL(4)
  for (int v = 0; v < kVectors; ++v) reinterpret_cast<Vector*>(to)[v] = totals[v];
}

// A block of rows. What lies beyond them, up to whole vectors, is z = 0.
template <class T>
struct MixtureBlock {
  static constexpr int kLength = Lane<T>::kLength;

  const MixtureParams& p;
  const T* const mu = static_cast<const T*>(p.mu);
  const T* const inv_std = static_cast<const T*>(p.inv_std);
  const T* const base = static_cast<const T*>(p.base);
  int64_t first = 0, rows = 0, padded = 0;
  Lines<T> z{p.M};
  int64_t weights_at[kMixtureRows];  // the offset of a row in p.weights
  alignas(64) T tile[kMixtureTile][kMixtureRows];

  explicit MixtureBlock(const MixtureParams& params) : p(params) {}

  void read(int64_t block) {
    const int64_t most = mixture_rows(p.N);
    first = block * most, rows = p.N - first < most ? p.N - first : most;
    padded = (rows + kLength - 1) / kLength * kLength;
    for (int64_t m = 0; m < p.M; ++m) {
      const T* from = load(p.z, 0, m, first, rows, z[m]);
      if (from != z[m]) memcpy(z[m], from, sizeof(T) * rows);
      for (int64_t i = rows; i < padded; ++i) z[m][i] = 0;
    }
    for (int64_t i = 0; p.weights && i < rows; ++i) weights_at[i] = weight_offset(p.weights, i);
  }

  // Of this row's weights in a view [C, N / weight_rows].
  int64_t weight_offset(const View& v, int64_t row) const {
    int64_t index = (first + row) / p.weight_rows, offset = 0;
    for (int d = v.ndim - 1; d > 0; --d) {
      offset += index % v.size[d] * v.stride[d];
      index /= v.size[d];
    }
    return offset + index * v.stride[0];
  }

  // t of n components, from c on, in a group. Not inlined: forward and backward must find the same bits.
  [[gnu::noinline]] void log_terms(int64_t group, int64_t c, int64_t n) {
    const int64_t dims = p.dims();
    alignas(64) T squares[kMixtureRows];
    for (int64_t i = 0; p.weights && i < rows; ++i) {
      const T* from = static_cast<const T*>(p.weights.data) + weights_at[i] + c * p.weights.stride_b;
      for (int64_t j = 0; j < n; ++j) tile[j][i] = from[j * p.weights.stride_b];
    }
    for (int64_t j = 0; j < n; ++j) {
      const int64_t at = (c + j) * p.M + group;
      int64_t i = 0;
      for (; i + 4 * kLength <= padded; i += 4 * kLength) {
        squared_distances<4>(z[group] + i, mu + at, inv_std + at, dims, squares + i);
      }
      for (; i < padded; i += kLength) squared_distances<1>(z[group] + i, mu + at, inv_std + at, dims, squares + i);
      const T constant = base[p.per_dimension ? at : c + j];
      T* __restrict t = tile[j];
      if (p.weights) {
        for (int64_t k = rows; k < padded; ++k) t[k] = 0;
#pragma omp simd
        for (int64_t k = 0; k < padded; ++k) t[k] = (t[k] + constant) - T(0.5) * squares[k];
      } else {
#pragma omp simd
        for (int64_t k = 0; k < padded; ++k) t[k] = constant - T(0.5) * squares[k];
      }
    }
  }

  template <class F>
  void for_tiles(int64_t begin, int64_t end, F f) const {
    for (int64_t c = begin; c < end; c += kMixtureTile) f(c, end - c < kMixtureTile ? end - c : kMixtureTile);
  }
};

template <class T>
void mixture_components_kernel(const MixtureComponentsParams& p, int64_t begin, int64_t end) {
  constexpr double kHalfLog2Pi = 0.91893853320467274178;
  constexpr T kLargest = sizeof(T) == 4 ? T(0x1.fffffep127) : T(0x1.fffffffffffffp1023);
  alignas(64) T mu_buffer[kTile], logvar_buffer[kTile];
  for (int64_t c = begin; c < end; ++c) {
    const double log_w = p.weights ? double(static_cast<const T*>(p.weights)[c * p.stride_weights]) : p.log_weight;
    double at_mu = 0;
    for (int64_t m = 0; m < p.M; m += kTile) {
      const int64_t n = p.M - m < kTile ? p.M - m : kTile;
      const T* __restrict logvar = load(p.logvar, 0, c, m, n, logvar_buffer);
      T* __restrict inv_std = static_cast<T*>(p.inv_std) + c * p.M + m;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const T scale = exp_full(T(-0.5) * logvar[i]);
        inv_std[i] = scale > kLargest ? kLargest : scale;  // a difference of 0 is 0, as in math/latent.h
      }
      for (int64_t i = 0; i < n; ++i) {
        const double term = 0.5 * double(logvar[i]) + kHalfLog2Pi;
        at_mu -= term;
        if (p.per_dimension) static_cast<T*>(p.base)[c * p.M + m + i] = T(log_w - term);
      }
      if (p.copied_mu) {
        const T* mu = load(p.mu, 0, c, m, n, mu_buffer);
        memcpy(static_cast<T*>(p.copied_mu) + c * p.M + m, mu, sizeof(T) * n);
      }
    }
    if (!p.per_dimension) static_cast<T*>(p.base)[c] = T(log_w + at_mu);
  }
}

template <class T>
void mixture_kernel(const MixtureParams& p, int64_t begin, int64_t end) {
  MixtureBlock<T> block(p);
  alignas(64) T largest[kMixtureRows], shift[kMixtureRows], part[kMixtureRows], exps[kMixtureRows];
  alignas(64) double sum[kMixtureRows];
  for (int64_t item = begin; item < end; ++item) {
    block.read(item);
    const int64_t padded = block.padded;
    for (int64_t group = 0; group < p.groups(); ++group) {
      for (int64_t i = 0; i < padded; ++i) largest[i] = -T(__builtin_huge_val()), sum[i] = 0;
      block.for_tiles(0, p.C, [&](int64_t c, int64_t n) {
        block.log_terms(group, c, n);
        memcpy(shift, largest, sizeof(T) * padded);
        for (int64_t j = 0; j < n; ++j) {
          const T* __restrict t = block.tile[j];
#pragma omp simd
          for (int64_t i = 0; i < padded; ++i) shift[i] = t[i] > shift[i] ? t[i] : shift[i];
        }
#pragma omp simd
        for (int64_t i = 0; i < padded; ++i) {
          const T before = largest[i];
          largest[i] = shift[i];
          shift[i] = LogMeanExp<T>::shift_of(shift[i]);
          exps[i] = exp_nonpositive(before - shift[i]);  // of -inf, before the first finite term: 0
          part[i] = 0;
        }
        for (int64_t j = 0; j < n; ++j) {
          const T* __restrict t = block.tile[j];
#pragma omp simd
          for (int64_t i = 0; i < padded; ++i) part[i] += exp_nonpositive(t[i] - shift[i]);
        }
#pragma omp simd
        for (int64_t i = 0; i < padded; ++i) sum[i] = sum[i] * double(exps[i]) + double(part[i]);
      });
      T* log_prob = target(p.log_prob, 0, group, block.first, part);
      for (int64_t i = 0; i < block.rows; ++i) {
        const T top = largest[i];
        log_prob[i] =
            top == T(__builtin_huge_val()) ? top : T(double(LogMeanExp<T>::shift_of(top)) + __builtin_log(sum[i]));
      }
      store(p.log_prob, 0, group, block.first, block.rows, log_prob);
    }
  }
}

// The gradients of kDims dimensions of one component, from r of a block of rows. total: the sum of r.
// sums: those by mu, and `apart` behind them those by logvar.
template <int kDims, bool kZ, bool kSums, class T>
FASTELBO_HD void mixture_gradients(const T* z, const T* mu, const T* inv_std, const T* r, int64_t padded, T* grad_z,
                                   double* sums, int64_t apart, double total) {
  using Vector = typename Lane<T>::Vector;
  Vector first[kDims] = {}, second[kDims] = {};
  for (int64_t i = 0; i < padded; i += Lane<T>::kLength) {
    const Vector weight = *reinterpret_cast<const Vector*>(r + i);
    FASTELBO_UNROLL(4)
    for (int j = 0; j < kDims; ++j) {
      const Vector d = (*reinterpret_cast<const Vector*>(z + j * kMixtureRows + i) - mu[j]) * inv_std[j];
      const Vector pull = weight * d;
      if (kSums) first[j] += pull, second[j] += pull * d;
      if (kZ) *reinterpret_cast<Vector*>(grad_z + j * kMixtureRows + i) -= pull * inv_std[j];
    }
  }
  if (!kSums) return;
  constexpr int kApart = Lane<T>::kLength / kDims;
  const Vector by_mu = lane_sums<T>(first), by_logvar = lane_sums<T>(second);
  FASTELBO_UNROLL(4)
  for (int j = 0; j < kDims; ++j) {
    sums[j] += double(by_mu[j * kApart]);
    sums[apart + j] += double(by_logvar[j * kApart]) - total;
  }
}

// The gradients of n components, from c on, in all dimensions of a group; r is in the tile. A few dimensions of z and
// of its gradient stay in the L1 cache, for all of these components, however many dimensions there are.
template <bool kZ, bool kSums, class T>
inline void mixture_tile(const MixtureBlock<T>& block, int64_t group, int64_t c, int64_t n, const SumOfAny<T>* totals,
                         Lines<T>& grad_z, double* sums) {
  constexpr int kMost = kVectorBytes >= 64 ? 4 : 2;  // dimensions whose sums are in registers, of at most all lanes
  const MixtureParams& p = block.p;
  const int64_t end = group + p.dims();
  const auto of = [&]<int kDims>(int64_t m) {
    for (int64_t j = 0; j < n; ++j) {
      if (!totals[j].any) continue;  // most components are far from most rows; nor is 0 times infinity wanted
      const int64_t at = (c + j) * p.M + m;
      mixture_gradients<kDims, kZ, kSums>(block.z[m], block.mu + at, block.inv_std + at, block.tile[j], block.padded,
                                          grad_z[m], kSums ? sums + at : nullptr, p.C * p.M, double(totals[j].sum));
    }
  };
  int64_t m = group;
  for (; m + kMost <= end; m += kMost) of.template operator()<kMost>(m);
  for (; m + 2 <= end; m += 2) of.template operator()<2>(m);
  if (m < end) of.template operator()<1>(m);
}

template <class T>
void mixture_backward_kernel(const MixtureBackwardParams& p, int64_t begin, int64_t end) {
  constexpr int64_t kInner = 8;  // tiles whose gradients of z are added in T, before they are in double
  const int64_t C = p.of.C, M = p.of.M, dims = p.of.dims(), blocks = mixture_blocks(p.of.N);
  MixtureBlock<T> block(p.of);
  Lines<T> grad_z(p.grad_z ? M : 0);
  Lines<double> total_z(p.grad_z ? M : 0);
  alignas(64) T up[kMixtureRows], log_prob[kMixtureRows];
  SumOfAny<T> totals[kMixtureTile];
  const auto add_grad_z = [&](int64_t group) {
    for (int64_t m = group; m < group + dims; ++m) {
      T* __restrict from = grad_z[m];
      double* __restrict to = total_z[m];
#pragma omp simd
      for (int64_t i = 0; i < block.padded; ++i) to[i] += double(from[i]), from[i] = 0;
    }
  };
  // r of n components, from c on, into the gradient of the weights of their own rows
  const auto add_weights = [&](int64_t group, int64_t c, int64_t n) {
    const int64_t stride = p.grad_weights.stride_b;
    for (int64_t i = 0; i < block.rows; ++i) {
      const int64_t at = block.weight_offset(p.grad_weights, i) + c * stride;
      if (p.of.weight_rows > 1) {
        double* to = static_cast<double*>(p.grad_weights.data) + at;
        for (int64_t j = 0; j < n; ++j) to[j * stride] += double(block.tile[j][i]);
      } else {
        T* to = static_cast<T*>(p.grad_weights.data) + at;
        for (int64_t j = 0; j < n; ++j) to[j * stride] = block.tile[j][i] + (group ? to[j * stride] : T(0));
      }
    }
  };
  for (int64_t item = begin; item < end; ++item) {
    const int64_t segment = item / p.ranges, c0 = item % p.ranges * p.range;
    const int64_t c1 = C - c0 < p.range ? C : c0 + p.range;
    const int64_t b0 = segment * p.segment, b1 = blocks - b0 < p.segment ? blocks : b0 + p.segment;
    double* sums = p.sums ? p.sums + segment * 2 * C * M : nullptr;
    double* weight_sums = p.weight_sums ? p.weight_sums + segment * C : nullptr;
    for (int64_t i = c0 * M; sums && i < c1 * M; ++i) sums[i] = sums[C * M + i] = 0;
    for (int64_t c = c0; weight_sums && c < c1; ++c) weight_sums[c] = 0;
    for (int64_t b = b0; b < b1; ++b) {
      block.read(b);
      const int64_t padded = block.padded;
      for (int64_t group = 0; group < p.of.groups(); ++group) {
        const T* from = load(p.grad, 0, group, block.first, block.rows, up);
        if (from != up) memcpy(up, from, sizeof(T) * block.rows);
        from = load(p.of.log_prob, 0, group, block.first, block.rows, log_prob);
        if (from != log_prob) memcpy(log_prob, from, sizeof(T) * block.rows);
        // a row without any density passes nothing on, also where it lies at infinity
        for (int64_t i = 0; i < padded; ++i) {
          if (i < block.rows && log_prob[i] != -T(__builtin_huge_val())) continue;
          up[i] = 0, log_prob[i] = T(__builtin_huge_val());
          for (int64_t m = group; m < group + dims; ++m) block.z[m][i] = 0;
        }
        for (int64_t m = group; p.grad_z && m < group + dims; ++m) {
          for (int64_t i = 0; i < padded; ++i) grad_z[m][i] = 0, total_z[m][i] = 0;
        }
        int64_t pending = 0;
        block.for_tiles(c0, c1, [&](int64_t c, int64_t n) {
          block.log_terms(group, c, n);
          for (int64_t j = 0; j < n; ++j) {
            T* __restrict r = block.tile[j];
#pragma omp simd
            for (int64_t i = 0; i < padded; ++i) r[i] = up[i] * exp_nonpositive(r[i] - log_prob[i]);
            totals[j] = SumOfAny<T>(r, padded);
            if (weight_sums) weight_sums[c + j] += double(totals[j].sum);
          }
          if (p.grad_z) {
            sums ? mixture_tile<true, true>(block, group, c, n, totals, grad_z, sums)
                 : mixture_tile<true, false>(block, group, c, n, totals, grad_z, sums);
          } else if (sums) {
            mixture_tile<false, true>(block, group, c, n, totals, grad_z, sums);
          }
          if (p.grad_weights) add_weights(group, c, n);
          if (p.grad_z && ++pending % kInner == 0) add_grad_z(group);
        });
        if (!p.grad_z) continue;
        add_grad_z(group);
        for (int64_t m = group; m < group + dims; ++m) {
          T* to = target(p.grad_z, 0, m, block.first, grad_z[m]);
          for (int64_t i = 0; i < block.rows; ++i) to[i] = T(total_z[m][i]);
          store(p.grad_z, 0, m, block.first, block.rows, to);
        }
      }
    }
  }
}

template <class T>
void mixture_sums_kernel(const MixtureSumsParams& p, int64_t begin, int64_t end) {
  alignas(64) T buffer[kTile];
  alignas(64) double total[kTile];
  for (int64_t c = begin; c < end; ++c) {
    const T* inv_std = static_cast<const T*>(p.inv_std) + c * p.M;
    for (int which = 0; which < 2; ++which) {
      const View& to = which == 0 ? p.grad_mu : p.grad_logvar;
      for (int64_t m = 0; to && m < p.M; m += kTile) {
        const int64_t n = p.M - m < kTile ? p.M - m : kTile;
        for (int64_t i = 0; i < n; ++i) total[i] = 0;
        for (int64_t s = 0; s < p.segments; ++s) {
          const double* __restrict from = p.sums + ((s * 2 + which) * p.C + c) * p.M + m;
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) total[i] += from[i];
        }
        T* __restrict grad = target(to, 0, c, m, buffer);
        for (int64_t i = 0; i < n; ++i) grad[i] = T(total[i] * (which == 0 ? double(inv_std[m + i]) : 0.5));
        store(to, 0, c, m, n, grad);
      }
    }
    if (!p.grad_weights) continue;
    T* grad = target(p.grad_weights, 0, c, 0, buffer);
    total[0] = 0;
    for (int64_t s = 0; s < p.segments; ++s) total[0] += p.weight_sums[s * p.C + c];
    *grad = T(total[0]);
    store(p.grad_weights, 0, c, 0, 1, grad);
  }
}

}  // namespace fastelbo::FASTELBO_ISA
