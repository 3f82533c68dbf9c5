// The latent side: KL of rows, reparameterized samples with their log ratio, and the gradients of all of it.
#pragma once

#include "cpu/kernels/noise.h"
#include "cpu/kernels/tile.h"
#include "math/half.h"
#include "math/kl.h"
#include "math/latent.h"

namespace fastelbo::FASTELBO_ISA {

// Whether `rows` rows of `columns` elements lie one behind the other, as numbers of the compute type.
template <class T>
FASTELBO_HD bool lies_flat(const View& v, int64_t rows, int64_t columns) {
  return lies_as<T>(v) && (rows == 1 || v.stride_b == columns);
}

// A block of rows of sample k: in place where it lies flat, else in the buffer.
template <class T>
inline const T* load_rows(const View& v, int64_t k, int64_t b, int64_t column, int64_t rows, int64_t columns, T* to) {
  if (lies_flat<T>(v, rows, columns)) return load(v, k, b, column, columns, to);
  for (int64_t r = 0; r < rows; ++r) {
    T* row = to + r * columns;
    const T* from = load(v, k, b + r, column, columns, row);
    if (from != row) memcpy(row, from, sizeof(T) * columns);
  }
  return to;
}

// One tile of q and of the prior: [rows of a block, columns] of the views, side by side.
template <class T>
struct LatentTile {
  int64_t rows, columns, n;  // n = rows * columns
  alignas(64) T mu[kLatentTile], logvar[kLatentTile];
  alignas(64) T delta[kLatentTile], t[kLatentTile];        // mu - mu_p, lv - lv_p
  alignas(64) T std[kLatentTile], inv_std_p[kLatentTile];  // exp(lv / 2), exp(-lv_p / 2)

  void load_view(const View& v, int64_t b, int64_t column, T* to) {
    const T* from = load_rows(v, 0, b, column, rows, columns, to);
    if (from != to) memcpy(to, from, sizeof(T) * n);
  }

  template <bool kStd>
  void read(const Latents& p, int64_t b, int64_t row_count, int64_t column, int64_t column_count) {
    rows = row_count, columns = column_count, n = rows * columns;
    load_view(p.mu, b, column, mu);
    load_view(p.logvar, b, column, logvar);
    if (p.prior_mu) {
      load_view(p.prior_mu, b, column, delta);
      for (int64_t i = 0; i < n; ++i) delta[i] = mu[i] - delta[i];
    } else {
      memcpy(delta, mu, sizeof(T) * n);
    }
    if (p.prior_logvar) {
      load_view(p.prior_logvar, b, column, inv_std_p);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        t[i] = logvar[i] - inv_std_p[i];
        inv_std_p[i] = exp_full(T(-0.5) * inv_std_p[i]);
      }
    } else {
      memcpy(t, logvar, sizeof(T) * n);
      for (int64_t i = 0; i < n; ++i) inv_std_p[i] = 1;
    }
    if constexpr (kStd) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) std[i] = exp_full(T(0.5) * logvar[i]);
    }
  }

  // KL terms take exp(t), in a loop of its own: see log_prob_tile.
  alignas(64) T exp_t[kLatentTile];
  void prepare_kl() {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) exp_t[i] = exp_full(t[i]);
  }
  KlTerm<T> kl(int64_t i) const { return kl_term(delta[i], t[i], exp_t[i], inv_std_p[i]); }
};

// All columns of the rows [b, b + rows): f(tile, column).
template <bool kStd, class T, class F>
inline void for_columns(const Latents& p, int64_t b, int64_t rows, LatentTile<T>& tile, F f) {
  for (int64_t column = 0; column < p.D; column += kLatentTile) {
    const int64_t columns = p.D - column < kLatentTile ? p.D - column : kLatentTile;
    tile.template read<kStd>(p, b, rows, column, columns);
    f(tile, column);
  }
}

// Work items cover rows [b, b + rows) and all columns: f(tile, b, column).
template <class T, bool kStd, class F>
inline void for_latent_tiles(const Latents& p, int64_t block, F f) {
  const int64_t per_block = rows_per_block(p.D), b = block * per_block;
  const int64_t rows = p.B - b < per_block ? p.B - b : per_block;
  LatentTile<T> tile;
  for_columns<kStd>(p, b, rows, tile, [&](LatentTile<T>& t, int64_t column) { f(t, b, column); });
}

// Where a tile is to be written: in place where its rows lie flat, else in the buffer, which store_rows() copies out.
template <class T>
inline T* target_rows(const View& v, int64_t k, int64_t b, int64_t column, const LatentTile<T>& tile, T* buffer) {
  return v && lies_flat<T>(v, tile.rows, tile.columns) ? target(v, k, b, column, buffer) : buffer;
}
template <class T>
inline void store_rows(const View& v, int64_t k, int64_t b, int64_t column, const LatentTile<T>& tile, T* from) {
  if (!v) return;
  if (lies_flat<T>(v, tile.rows, tile.columns)) {
    T* to = target(v, k, b, column, from);
    if (to != from) memcpy(to, from, sizeof(T) * tile.n);
    return;
  }
  for (int64_t r = 0; r < tile.rows; ++r) {
    T* row = from + r * tile.columns;
    T* to = target(v, k, b + r, column, row);
    if (to != row) memcpy(to, row, sizeof(T) * tile.columns);
    store(v, k, b + r, column, tile.columns, row);
  }
}

// The gradients of a tile, before they are stored.
template <class T>
struct TileGrads {
  alignas(64) T mu[kLatentTile], logvar[kLatentTile], prior_mu[kLatentTile], prior_logvar[kLatentTile];

  void store_to(const LatentGrads& to, int64_t b, int64_t column, const LatentTile<T>& tile) {
    store_rows(to.mu, 0, b, column, tile, mu);
    store_rows(to.logvar, 0, b, column, tile, logvar);
    store_rows(to.prior_mu, 0, b, column, tile, prior_mu);
    store_rows(to.prior_logvar, 0, b, column, tile, prior_logvar);
  }
};

template <class T>
void kl_kernel(const KlParams& p, int64_t begin, int64_t end) {
  alignas(64) T value[kLatentTile], up[kLatentTile];
  TileGrads<T> g;
  const bool prior = p.grad.prior(), grads = p.grad.any();
  const double free_bits = read(p.free_bits);
  for (int64_t block = begin; block < end; ++block) {
    for_latent_tiles<T, false>(p.q, block, [&](LatentTile<T>& tile, int64_t b, int64_t column) {
      const int64_t columns = tile.columns;
      tile.prepare_kl();
      for (int64_t r = 0; r < tile.rows; ++r) {
        const T row = row_number<T>(p.factor, 0, b + r);
        for (int64_t i = 0; i < columns; ++i) up[r * columns + i] = row;
      }
#pragma omp simd
      for (int64_t i = 0; i < tile.n; ++i) {
        const KlTerm<T> k = tile.kl(i);
        value[i] = k.value;
        g.mu[i] = times(up[i], k.d_mu);
        g.logvar[i] = times(up[i], k.d_logvar);
      }
      if (prior) {
#pragma omp simd
        for (int64_t i = 0; i < tile.n; ++i) {
          const KlTerm<T> k = tile.kl(i);
          g.prior_mu[i] = times(up[i], k.d_prior_mu);
          g.prior_logvar[i] = times(up[i], k.d_prior_logvar);
        }
      }
      // the first column starts a row's sum: the outputs need no zeroing
      const auto add_rows = [&](double* out, double floors) {
        for (int64_t r = 0; out && r < tile.rows; ++r) {
          out[b + r] = (column ? out[b + r] : 0) + floors + double(sum_of(value + r * columns, columns));
        }
      };
      add_rows(p.kl, 0);
      if (p.dim_means) {
        const double* means = p.dim_means + column;
        int64_t below = 0;  // floors are counted: the roundings of a sum of equal numbers all go the same way
        for (int64_t i = 0; i < columns; ++i) {
          if (!(means[i] < free_bits)) continue;  // NaN is not below the floor
          ++below;
          for (int64_t at = i; at < tile.n; at += columns) {
            value[at] = g.mu[at] = g.logvar[at] = g.prior_mu[at] = g.prior_logvar[at] = 0;
          }
        }
        add_rows(p.floored_kl, free_bits * double(below));
      }
      if (grads) g.store_to(p.grad, b, column, tile);
    });
  }
}

template <class T>
void kl_dims_kernel(const KlDimsParams& p, int64_t begin, int64_t end) {
  LatentTile<T> tile;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t column = item * kLatentTile;
    const int64_t columns = p.q.D - column < kLatentTile ? p.q.D - column : kLatentTile;
    for (int64_t i = 0; i < columns; ++i) p.out[column + i] = 0;
    for (int64_t b = 0; b < p.q.B; ++b) {
      tile.template read<false>(p.q, b, 1, column, columns);
      tile.prepare_kl();
      for (int64_t i = 0; i < columns; ++i) p.out[column + i] += double(tile.kl(i).value);
    }
  }
}

// The noise of the tile's elements in sample k of the data from b on, in the compute type.
template <class T, class Params>
inline const T* noise_of(const Params& p, int64_t k, int64_t b, int64_t column, const LatentTile<T>& tile, T* to,
                         NoiseBuffer& noise) {
  if (p.eps) return load_rows(p.eps, k, b, column, tile.rows, tile.columns, to);
  // a tile is whole rows, or part of one row: its indices in [K, B, D] are contiguous
  const int64_t first = ((p.first_sample + k) * p.q.B + b) * p.q.D + column;
  const float* e = normal_run(uint64_t(*p.seed), first, tile.n, noise);
  if constexpr (sizeof(T) == 4) {
    return e;
  } else {
    for (int64_t i = 0; i < tile.n; ++i) to[i] = e[i];
    return to;
  }
}

template <class T>
void sample_kernel(const SampleParams& p, int64_t begin, int64_t end) {
  constexpr double kHalfLog2Pi = 0.91893853320467274178;
  const int64_t blocks_k = sample_blocks(p.K);
  alignas(64) T eps_buffer[kLatentTile], z_buffer[kLatentTile], ratio[kLatentTile], density[kLatentTile];
  NoiseBuffer noise;
  // sample k of the tile's data, from b on; to the rows (to_k, to_b) and the next ones
  const auto draw = [&](const LatentTile<T>& tile, int64_t k, int64_t b, int64_t column, int64_t to_k, int64_t to_b) {
    const T* __restrict eps = noise_of(p, k, b, column, tile, eps_buffer, noise);
    T* __restrict z = target_rows(p.z, to_k, to_b, column, tile, z_buffer);
#pragma omp simd
    for (int64_t i = 0; i < tile.n; ++i) {
      const Sample<T> s =
          sample(tile.mu[i], tile.logvar[i], tile.delta[i], tile.t[i], tile.std[i], tile.inv_std_p[i], eps[i]);
      z[i] = s.z;
      ratio[i] = s.log_ratio;
      density[i] = s.log_q;
    }
    store_rows(p.z, to_k, to_b, column, tile, z);
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t row = to_k * p.q.B + to_b + r, first = r * tile.columns;
      p.log_ratio[row] += double(sum_of(ratio + first, tile.columns));
      p.log_q[row] += double(sum_of(density + first, tile.columns)) - kHalfLog2Pi * double(tile.columns);
    }
  };
  LatentTile<T> row_tile;
  for (int64_t item = begin; item < end; ++item) {
    if (p.sample) {
      const int64_t b = p.datum[item];
      for_columns<true>(p.q, b, 1, row_tile, [&](const LatentTile<T>& tile, int64_t column) {
        draw(tile, p.sample[item], b, column, 0, item);
      });
      continue;
    }
    const int64_t first = item % blocks_k * kSampleBlock;
    const int64_t last = first + kSampleBlock < p.K ? first + kSampleBlock : p.K;
    for_latent_tiles<T, true>(p.q, item / blocks_k, [&](const LatentTile<T>& tile, int64_t b, int64_t column) {
      for (int64_t k = first; k < last; ++k) draw(tile, k, b, column, k, b);
    });
  }
}

// The gradients of math/latent.h, summed over samples: kInner in the compute type, then in double.
template <class T>
class SampleSums {
  static constexpr int64_t kInner = 16;
  alignas(64) double total_[4][kLatentTile];
  TileGrads<T> part_;
  T* parts_[4] = {part_.mu, part_.logvar, part_.prior_mu, part_.prior_logvar};
  const bool prior_;
  const int sums_;
  int64_t pending_ = 0;

  void to_double(int64_t n) {
    for (int s = 0; s < sums_; ++s) {
      T* __restrict from = parts_[s];
      double* __restrict to = total_[s];
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) to[i] += double(from[i]), from[i] = 0;
    }
    pending_ = 0;
  }

 public:
  alignas(64) T grad_eps[kLatentTile];  // of the sample that was added last

  explicit SampleSums(bool prior) : prior_(prior), sums_(prior ? 4 : 2) {}

  void start(int64_t n) {
    for (int s = 0; s < sums_; ++s) {
      for (int64_t i = 0; i < n; ++i) total_[s][i] = 0, parts_[s][i] = 0;
    }
    pending_ = 0;
  }

  // The upstream gradients of one sample, by element; only what `kind` reads of them need be there.
  struct UpstreamTile {
    alignas(64) T log_p[kLatentTile], minus_log_q[kLatentTile], path[kLatentTile], score[kLatentTile];
  };

  template <Upstream kind>
  void add(const LatentTile<T>& tile, const T* __restrict grad_z, const UpstreamTile& up, const T* __restrict eps) {
    const auto of = [&](int64_t i) {
      constexpr bool kDensities = kind != Upstream::z, kGated = kind == Upstream::gated;
      const SampleUpstream<T> one{grad_z[i], kDensities ? up.log_p[i] : T(0), kDensities ? up.minus_log_q[i] : T(0),
                                  kGated ? up.path[i] : T(1), kGated ? up.score[i] : T(1)};
      return sample_grad(kind, one, tile.delta[i], tile.std[i], tile.inv_std_p[i], eps[i]);
    };
#pragma omp simd
    for (int64_t i = 0; i < tile.n; ++i) {
      const SampleGrad<T> g = of(i);
      part_.mu[i] += g.mu;
      part_.logvar[i] += g.logvar;
      grad_eps[i] = g.eps;
    }
    if (kind != Upstream::z && prior_) {
#pragma omp simd
      for (int64_t i = 0; i < tile.n; ++i) {
        const SampleGrad<T> g = of(i);
        part_.prior_mu[i] += g.prior_mu;
        part_.prior_logvar[i] += g.prior_logvar;
      }
    }
    if (++pending_ == kInner) to_double(tile.n);
  }

  // The sums in the compute type; total() has them in double.
  TileGrads<T>& finish(int64_t n) {
    to_double(n);
    for (int s = 0; s < sums_; ++s) {
      for (int64_t i = 0; i < n; ++i) parts_[s][i] = T(total_[s][i]);
    }
    return part_;
  }
  double total(int s, int64_t i) const { return total_[s][i]; }
};

// The gradients of the samples, and the KL's own.
template <class T>
void sample_backward_kernel(const SampleBackwardParams& p, int64_t begin, int64_t end) {
  alignas(64) T eps_buffer[kLatentTile], z_buffer[kLatentTile], zeros[kLatentTile] = {};
  NoiseBuffer noise;
  const bool prior = p.grad.prior();
  const Upstream kind = p.upstream();
  SampleSums<T> sums(prior);
  typename SampleSums<T>::UpstreamTile up;
  // sample k of the tile's data, from b on, whose upstream gradients are in the rows (up_k, up_b) and the next ones
  const auto add = [&](const LatentTile<T>& tile, int64_t k, int64_t b, int64_t column, int64_t up_k, int64_t up_b) {
    const T* eps = noise_of(p, k, b, column, tile, eps_buffer, noise);
    const T* grad_z = p.grad_z ? load_rows(p.grad_z, up_k, up_b, column, tile.rows, tile.columns, z_buffer) : zeros;
    for (int64_t r = 0; kind != Upstream::z && r < tile.rows; ++r) {
      const auto row = [&](const RowScalars& s) { return row_number<T>(s, up_k, up_b + r); };
      const T log_p = row(p.grad_log_ratio), minus_log_q = log_p - row(p.grad_log_q);
      const T path = 1 + row(p.gate_path), score = 1 + row(p.gate_score);
      for (int64_t i = r * tile.columns; i < (r + 1) * tile.columns; ++i) {
        up.log_p[i] = log_p, up.minus_log_q[i] = minus_log_q, up.path[i] = path, up.score[i] = score;
      }
    }
    switch (kind) {
      case Upstream::z: sums.template add<Upstream::z>(tile, grad_z, up, eps); break;
      case Upstream::densities: sums.template add<Upstream::densities>(tile, grad_z, up, eps); break;
      case Upstream::gated: sums.template add<Upstream::gated>(tile, grad_z, up, eps); break;
    }
  };
  const auto finish = [&](const LatentTile<T>& tile, int64_t b, int64_t column) {
    TileGrads<T>& part = sums.finish(tile.n);
    for (int64_t r = 0; p.grad_kl.data && r < tile.rows; ++r) {
      const T g = row_number<T>(p.grad_kl, 0, b + r);
      for (int64_t i = r * tile.columns; i < (r + 1) * tile.columns; ++i) {
        const KlTerm<T> kl = tile.kl(i);
        part.mu[i] = T(sums.total(0, i) + double(times(g, kl.d_mu)));
        part.logvar[i] = T(sums.total(1, i) + double(times(g, kl.d_logvar)));
        if (!prior) continue;
        part.prior_mu[i] = T(sums.total(2, i) + double(times(g, kl.d_prior_mu)));
        part.prior_logvar[i] = T(sums.total(3, i) + double(times(g, kl.d_prior_logvar)));
      }
    }
    part.store_to(p.grad, b, column, tile);
  };
  LatentTile<T> row_tile;
  for (int64_t item = begin; item < end; ++item) {
    const auto tile_of = [&](LatentTile<T>& tile, int64_t b, int64_t column) {
      if (p.grad_kl.data) tile.prepare_kl();
      sums.start(tile.n);
      if (p.sample) {
        for (int64_t at = p.starts[b]; at < p.starts[b + 1]; ++at) {
          add(tile, p.sample[p.order[at]], b, column, 0, p.order[at]);
        }
      } else {
        for (int64_t k = 0; k < p.K; ++k) {
          add(tile, k, b, column, k, b);
          store_rows(p.grad_eps, k, b, column, tile, sums.grad_eps);
        }
      }
      finish(tile, b, column);
    };
    if (p.sample) {
      for_columns<true>(p.q, item, 1, row_tile,
                        [&](LatentTile<T>& tile, int64_t column) { tile_of(tile, item, column); });
    } else {
      for_latent_tiles<T, true>(p.q, item, tile_of);
    }
  }
}

}  // namespace fastelbo::FASTELBO_ISA
