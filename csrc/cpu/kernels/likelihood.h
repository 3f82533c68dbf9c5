// log p(x | recon) of rows, with its gradient: one pass over recon and x.
#pragma once

#include "cpu/kernels/tile.h"
#include "likelihoods/list.h"

namespace fastelbo::FASTELBO_ISA {

enum class Grads { none, parameters, all };

template <class T>
struct Elements {
  const T *parameter[kMaxParameters], *x, *weight;
  T *grad[kMaxParameters], *grad_x;
  const uint8_t* bytes;  // x as it lies, where it is bytes in a row: converted in registers
  ByteScale<T> byte_scale;
  T added;

  // of floats, from element i on
  Elements from(int64_t i) const {
    Elements e = *this;
    const auto move = [i](auto*& p) { p = p ? p + i : p; };
    for (int j = 0; j < kMaxParameters; ++j) move(e.parameter[j]), move(e.grad[j]);
    move(e.x), move(e.weight), move(e.grad_x);
    return e;
  }
};

// A tile is done in several short loops instead of a long one: what limits a long one is not the number of its
// instructions but how few elements fit the processor's window while each waits for the one before (a chain of some 90
// cycles in the Bernoulli). docs/performance.md has times of both.
//
// Sums are of kGroup numbers in the compute type, then kTile / kGroup of these in vector lanes, then in double: their
// order depends on D and the instruction set alone, never on threads.
inline constexpr int64_t kGroup = 8;
inline constexpr int64_t kPadded = kGroup * kLanes;  // a tile is padded with zeros to a multiple of this
static_assert(kTile % kPadded == 0);

template <class T>
struct TileSums {
  alignas(64) T value[kTile], shared[kTile], product[kTile / kGroup];
};

// Whether bytes are converted in registers: beside float64 they are rare, and loaded like any other dtype.
template <class T>
inline constexpr bool kReadsBytes = sizeof(T) == 4;

// The weights of counts that are not masked: their formulas are long, and compiled once, with a weight.
template <class T>
struct Ones {
  alignas(64) T values[kTile];
  constexpr Ones() : values() {
    for (T& value : values) value = 1;
  }
};
template <class T>
inline constexpr Ones<T> kOnes;

// The values of n elements and their gradients times factor, from kCount parameters. An element of weight 0 counts for
// nothing, whatever it holds. Not inlined: log_prob_elements() calls it twice.
template <class L, int kCount, Grads kGrads, bool kWeighted, bool kBytes, class T>
[[gnu::noinline]] void log_prob_tile(const Elements<T>& e, T factor, int64_t n, T* __restrict value,
                                     T* __restrict shared) {
  constexpr bool kShares = L::kShares && kCount == kParameters<L>;  // else it is a constant, or short
  // by name, since gcc 12 vectorizes no loop over an array of pointers
  const T* __restrict first = e.parameter[0], * __restrict second = e.parameter[1], * __restrict third = e.parameter[2], * __restrict fourth = e.parameter[3], * __restrict x = e.x, * __restrict weight = e.weight;
  T* __restrict d_first = e.grad[0], * __restrict d_second = e.grad[1], * __restrict d_third = e.grad[2], * __restrict d_fourth = e.grad[3], * __restrict d_x = e.grad_x;
  const uint8_t* __restrict bytes = e.bytes;
  const ByteScale<T> byte_scale = e.byte_scale;
  const T added = e.added;
  if constexpr (kShares) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      shared[i] = shared_of<L>(first[i], kCount > 1 ? second[i] : T(0), kCount > 2 ? third[i] : T(0),
                               kCount > 3 ? fourth[i] : T(0));
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    // one const value: gcc keeps a struct that is assigned in pieces in memory, and then does not vectorize
    const T b = kCount > 1 ? second[i] : T(0), c = kCount > 2 ? third[i] : T(0), d = kCount > 3 ? fourth[i] : T(0);
    const T s = kShares ? shared[i] : shared_of<L>(first[i], b, c, d);
    const T x_i = kBytes ? scaled_byte(T(bytes[i]), byte_scale) : x[i];
    const Terms<T> t = terms_of<L>(first[i], b, c, d, x_i, s, added);
    const T m = kWeighted ? weight[i] : T(1);
    const bool seen = !kWeighted || m != 0;
    const T v = kWeighted && L::kSoftplus ? t.value - log1p_unit(s) : t.value;
    value[i] = seen ? m * v : T(0);
    // the factor comes last: a K-sample bound multiplies by it later
    if constexpr (kGrads != Grads::none) {
      d_first[i] = seen ? factor * (m * t.d.first) : T(0);
      if constexpr (kCount > 1) d_second[i] = seen ? factor * (m * t.d.second) : T(0);
      if constexpr (kCount > 2) d_third[i] = seen ? factor * (m * t.d.third) : T(0);
      if constexpr (kCount > 3) d_fourth[i] = seen ? factor * (m * t.d.fourth) : T(0);
    }
    if constexpr (kGrads == Grads::all) d_x[i] = seen ? factor * (m * t.d_x) : T(0);
  }
}

inline constexpr int64_t kBlock = 128;  // elements that a formula in steps takes at a time

// The same of up to kBlock elements by a formula of likelihoods/counts.h.
template <class Formula, int kCount, Grads kGrads, class T>
[[gnu::noinline]] void formula_tile(const Elements<T>& e, T factor, int64_t n, T* __restrict value) {
  constexpr int kWork = Formula::kWork;
  const T* __restrict first = e.parameter[0], * __restrict second = e.parameter[1], * __restrict third = e.parameter[2], * __restrict fourth = e.parameter[3], * __restrict x = e.x, * __restrict weight = e.weight;
  T* __restrict d_first = e.grad[0], * __restrict d_second = e.grad[1], * __restrict d_third = e.grad[2], * __restrict d_fourth = e.grad[3];
  const T added = e.added;
  const auto of = [=](int64_t i) {
    return OfParameters<T>{first[i], kCount > 1 ? second[i] : T(0), kCount > 2 ? third[i] : T(0),
                           kCount > 3 ? fourth[i] : T(0)};
  };
  alignas(64) T work[kWork][kBlock];
  const auto element = [=](int64_t i) { return Element<T>{of(i), x[i], added}; };
  // ivdep, not omp simd: that keeps w, whose address is taken, in memory
  const auto run_step = [&]<int kStep, int... j>(std::integer_sequence<int, j...>) {
    FASTELBO_IVDEP
    for (int64_t i = 0; i < n; ++i) {
      T w[kWork] = {work[j][i]...};
      Formula::template step<kStep>(element(i), w);
      ((work[j][i] = w[j]), ...);
    }
  };
  const auto slots = std::make_integer_sequence<int, kWork>();
  [&]<int... kStep>(std::integer_sequence<int, kStep...>) {
    (run_step.template operator()<kStep>(slots), ...);
  }(std::make_integer_sequence<int, Formula::kSteps>());
  const auto last = [&]<int... j>(int64_t i, std::integer_sequence<int, j...>) FASTELBO_INLINED {
    const T w[kWork] = {work[j][i]...};
    return Formula::terms(element(i), w);
  };
  FASTELBO_IVDEP
  for (int64_t i = 0; i < n; ++i) {
    const Terms<T> t = last(i, slots);
    const T m = weight[i];
    const bool seen = m != 0;
    value[i] = seen ? m * t.value : T(0);
    if constexpr (kGrads != Grads::none) {
      d_first[i] = seen ? factor * (m * t.d.first) : T(0);
      if constexpr (kCount > 1) d_second[i] = seen ? factor * (m * t.d.second) : T(0);
      if constexpr (kCount > 2) d_third[i] = seen ? factor * (m * t.d.third) : T(0);
      if constexpr (kCount > 3) d_fourth[i] = seen ? factor * (m * t.d.fourth) : T(0);
    }
  }
}

// f over n numbers that lie `step` apart, as a tree.
template <int64_t n, class T, class F>
FASTELBO_HD T tree(const T* p, int64_t step, F f) {
  if constexpr (n == 1) {
    return *p;
  } else {
    return f(tree<n / 2>(p, step, f), tree<n / 2>(p + n / 2 * step, step, f));
  }
}

// The sum of the first n values of a tile, less log(1 + shared) where kSoftplus: by products of kGroup factors, of
// which q holds what is beyond 1. So no digit is lost where all factors are near 1.
template <bool kSoftplus, class T>
[[gnu::noinline]] double sum_tile(TileSums<T>& tile, int64_t n) {
  const int64_t padded = (n + kPadded - 1) / kPadded * kPadded, part = padded / kGroup;
  for (int64_t i = n; i < padded; ++i) tile.value[i] = 0;
  for (int64_t i = n; kSoftplus && i < padded; ++i) tile.shared[i] = 0;
  const T* __restrict v = tile.value;
  const T* __restrict q = tile.shared;
  T* __restrict product = tile.product;
  if constexpr (kSoftplus) {
#pragma omp simd
    for (int64_t i = 0; i < part; ++i) {
      product[i] = tree<kGroup>(q + i, part, [](T a, T b) { return a * b + (a + b); });
    }
  }
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < part; ++i) {
    T total = tree<kGroup>(v + i, part, [](T a, T b) { return a + b; });
    if constexpr (kSoftplus) total -= log_ratio(1 + product[i], product[i]).log;
    sum += total;
  }
  return sum;
}

// The values of a tile's n elements to where log p of every element is wanted.
template <bool kSoftplus, class T>
[[gnu::noinline]] void store_values(const View& v, int64_t k, int64_t b, int64_t begin, int64_t n, TileSums<T>& tile) {
  const T* __restrict value = tile.value;
  const T* __restrict q = tile.shared;
  T buffer[kTile];
  T* __restrict to = target(v, k, b, begin, buffer);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = kSoftplus ? value[i] - log1p_unit(q[i]) : value[i];
  store(v, k, b, begin, n, to);
}

// The sums over a chunk's rows of the gradients of parameters that rows share, for one segment of the columns.
template <class T>
class SharedSums {
  T* event_[kMaxParameters] = {};   // [D], of a parameter [*event]
  T* scalar_[kMaxParameters] = {};  // where that of a 0-d one goes
  double total_[kMaxParameters] = {};

 public:
  SharedSums() = default;
  SharedSums(const LogProbParams& p, int64_t chunk, int64_t segment, int64_t begin, int64_t end) {
    for (int i = 0; i < p.count; ++i) {
      if (!p.shared_grad[i].sums) continue;
      T* sums = static_cast<T*>(p.shared_grad[i].sums) + chunk * p.shared_grad[i].size;
      if (p.shared_grad[i].scalar) {
        scalar_[i] = sums + segment;
      } else {
        event_[i] = sums;
        for (int64_t d = begin; d < end; ++d) sums[d] = 0;
      }
    }
  }
  ~SharedSums() {
    for (int i = 0; i < kMaxParameters; ++i) {
      if (scalar_[i]) *scalar_[i] = T(total_[i]);
    }
  }

  // n gradients of parameter i from column `column` on
  [[gnu::noinline]] void add(int i, int64_t column, int64_t n, const T* __restrict grad) {
    if (scalar_[i]) total_[i] += double(sum_of(grad, n));
    if (!event_[i]) return;
    T* __restrict to = event_[i] + column;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) to[j] += grad[j];
  }
};

// The n elements e with `value` of each, in whole vectors: the last one is padded, so that there is no scalar loop.
template <class L, int kCount, Grads kGrads, class T>
inline void log_prob_elements(const Elements<T>& e, T factor, int64_t n, T* value, T* shared) {
  const int64_t whole = n - n % kLanes, tail = n - whole;
  const auto evaluate_part = [&](const Elements<T>& part, int64_t count, int64_t at) {
    if constexpr (requires { L::kSteps; }) {
      formula_tile<L, kCount, kGrads>(part, factor, count, value + at);
    } else if constexpr (L::kZeros) {
      log_prob_tile<L, kCount, kGrads, true, false>(part, factor, count, value + at, shared + at);
    } else if (part.bytes) {
      log_prob_tile<L, kCount, kGrads, false, kReadsBytes<T>>(part, factor, count, value + at, shared + at);
    } else {
      part.weight ? log_prob_tile<L, kCount, kGrads, true, false>(part, factor, count, value + at, shared + at)
                  : log_prob_tile<L, kCount, kGrads, false, false>(part, factor, count, value + at, shared + at);
    }
  };
  evaluate_part(e, whole, 0);
  if (!tail) return;
  alignas(64) T in[kMaxParameters + 2][kLanes], out[kMaxParameters + 1][kLanes];
  T *x = in[kMaxParameters], *weight = in[kMaxParameters + 1];
  Elements<T> last = {};
  for (int c = 0; c < kCount; ++c) {
    last.parameter[c] = in[c], last.grad[c] = out[c];
    for (int64_t j = 0; j < kLanes; ++j) in[c][j] = j < tail ? e.parameter[c][whole + j] : T(0.5);
  }
  for (int64_t j = 0; j < kLanes; ++j) {
    x[j] = j >= tail ? T(0.5) : e.bytes ? scaled_byte(T(e.bytes[whole + j]), e.byte_scale) : e.x[whole + j];
    weight[j] = j < tail && e.weight ? e.weight[whole + j] : T(0);
  }
  last.added = e.added;
  last.x = x, last.weight = e.weight ? weight : nullptr, last.grad_x = out[kMaxParameters];
  evaluate_part(last, kLanes, whole);
  for (int64_t j = 0; j < tail; ++j) {
    for (int c = 0; kGrads != Grads::none && c < kCount; ++c) e.grad[c][whole + j] = out[c][j];
    if constexpr (kGrads == Grads::all) e.grad_x[whole + j] = last.grad_x[j];
  }
}

// The same for counts, most of which are 0: all elements as if x were 0, then those where it is not, side by side.
// docs/performance.md has what this gains.
template <class L, int kCount, Grads kGrads, class T>
inline void log_prob_counts(const Elements<T>& e, T factor, int64_t n, T* value, T* shared) {
  using Zero = typename L::Zero;
  using Large = typename L::Large;
  using Other = typename L::Other;
  // by the formula of large counts where it takes all of them
  const auto evaluate_block = [&](const Elements<T>& block, int64_t count, T* to) {
    int others = 0;
    for (int64_t j = 0; j < count; ++j) {
      others += !(takes<Large>(Element<T>{.x = block.x[j]}) && block.x[j] < T(__builtin_huge_val()));
    }
    others ? log_prob_elements<Other, kCount, kGrads>(block, factor, count, to, shared)
           : log_prob_elements<Large, kCount, kGrads>(block, factor, count, to, shared);
  };
  if constexpr (std::is_same_v<Zero, Large>) {
    for (int64_t i = 0; i < n; i += kBlock) evaluate_block(e.from(i), n - i < kBlock ? n - i : kBlock, value + i);
    return;
  }
  const T* __restrict x = e.x;
  uint8_t other[kTile];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) other[i] = x[i] != 0;  // NaN too
  uint16_t index[kTile];
  int64_t m = 0;
  for (int64_t i = 0; i < n; ++i) {
    index[m] = uint16_t(i);
    m += other[i];
  }
  for (int64_t i = 0; i < n; i += kBlock) {
    log_prob_elements<Zero, kCount, kGrads>(e.from(i), factor, n - i < kBlock ? n - i : kBlock, value + i, shared);
  }
  alignas(64) T in[kMaxParameters + 2][kBlock], out[kMaxParameters][kBlock], values[kBlock];
  T *packed_x = in[kMaxParameters], *packed_weight = in[kMaxParameters + 1];
  for (int64_t i = 0; i < m; i += kBlock) {
    const int64_t count = m - i < kBlock ? m - i : kBlock;
    const uint16_t* at = index + i;
    const auto pack = [&](const T* from, T* to) {
      for (int64_t j = 0; j < count; ++j) to[j] = from[at[j]];
    };
    const auto unpack = [&](const T* from, T* to) {
      for (int64_t j = 0; j < count; ++j) to[at[j]] = from[j];
    };
    Elements<T> packed = {};
    for (int c = 0; c < kCount; ++c) pack(e.parameter[c], in[c]), packed.parameter[c] = in[c], packed.grad[c] = out[c];
    pack(e.x, packed_x);
    const bool weighted = e.weight != kOnes<T>.values;
    if (weighted) pack(e.weight, packed_weight);
    packed.added = e.added;
    packed.x = packed_x, packed.weight = weighted ? packed_weight : kOnes<T>.values;
    evaluate_block(packed, count, values);
    unpack(values, value);
    for (int c = 0; kGrads != Grads::none && c < kCount; ++c) unpack(out[c], e.grad[c]);
  }
}

// Columns [begin, end) of row (k, b): the sum of log p; the gradients are times factor.
template <class L, int kCount, Grads kGrads, class T>
__attribute__((noinline)) double log_prob_segment(const LogProbParams& p, int64_t k, int64_t b, int64_t begin,
                                                  int64_t end, T factor, SharedSums<T>& shared) {
  alignas(64) T in[kMaxParameters + 2][kTile], out[kMaxParameters + 1][kTile];
  TileSums<T> tile;
  double sum = 0;
  for (int64_t i = begin; i < end; i += kTile) {
    const int64_t n = end - i < kTile ? end - i : kTile;
    Elements<T> e = {};
    e.added = T(p.added);
    for (int c = 0; c < kCount; ++c) {
      e.parameter[c] = load(p.parameter[c], k, b, i, n, in[c]), e.grad[c] = target(p.grad[c], k, b, i, out[c]);
    }
    e.bytes = p.mask || L::kZeros || !kReadsBytes<T> ? nullptr : bytes_of(p.x, k, b, i);
    e.byte_scale = byte_scale(p.x.unit, T());
    e.x = e.bytes ? nullptr : load(p.x, k, b, i, n, in[kMaxParameters]);
    e.weight = p.mask ? load(p.mask, k, b, i, n, in[kMaxParameters + 1]) : L::kZeros ? kOnes<T>.values : nullptr;
    e.grad_x = target(p.grad_x, k, b, i, out[kMaxParameters]);
    if constexpr (L::kZeros && kGrads != Grads::all) {
      log_prob_counts<L, kCount, kGrads>(e, factor, n, tile.value, tile.shared);
    } else {
      log_prob_elements<L, kCount, kGrads>(e, factor, n, tile.value, tile.shared);
    }
    if (p.value) {
      e.weight ? store_values<false>(p.value, k, b, i, n, tile) : store_values<L::kSoftplus>(p.value, k, b, i, n, tile);
    } else {
      sum += e.weight ? sum_tile<false>(tile, n) : sum_tile<L::kSoftplus>(tile, n);
    }
    for (int c = 0; kGrads != Grads::none && c < kCount; ++c) {
      store(p.grad[c], k, b, i, n, e.grad[c]);
      shared.add(c, i, n, e.grad[c]);
    }
    if constexpr (kGrads == Grads::all) store(p.grad_x, k, b, i, n, e.grad_x);
  }
  return sum;
}

// Which gradients are wanted.
inline Grads grads_of(const LogProbParams& p) {
  if (p.grad_x) return Grads::all;
  for (int i = 0; i < p.count; ++i) {
    if (p.grad[i] || p.shared_grad[i].sums) return Grads::parameters;
  }
  return Grads::none;
}

template <class L, int kCount, class T>
inline double log_prob_segment(Grads grads, const LogProbParams& p, int64_t k, int64_t b, int64_t begin, int64_t end,
                               T factor, SharedSums<T>& shared) {
  switch (grads) {
    case Grads::all: return log_prob_segment<L, kCount, Grads::all>(p, k, b, begin, end, factor, shared);
    case Grads::parameters: return log_prob_segment<L, kCount, Grads::parameters>(p, k, b, begin, end, factor, shared);
    default: return log_prob_segment<L, kCount, Grads::none>(p, k, b, begin, end, factor, shared);
  }
}

template <class L, int kCount, class T>
void log_prob_kernel(const LogProbParams& p, int64_t begin, int64_t end) {
  const int64_t per_row = segments(p.D), rows = p.rows();
  const Grads grads = grads_of(p);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t chunk = item / per_row, segment = item % per_row, first = segment * kSegment;
    const int64_t last = first + kSegment < p.D ? first + kSegment : p.D;
    SharedSums<T> shared(p, chunk, segment, first, last);
    for (int64_t row = chunk * p.chunk; row < (chunk + 1) * p.chunk && row < rows; ++row) {
      const int64_t k = row / p.B, b = row % p.B;
      const double sum =
          log_prob_segment<L, kCount>(grads, p, k, b, first, last, row_number<T>(p.factor, k, b), shared);
      if (p.log_p) p.log_p[row * per_row + segment] = sum;
    }
  }
}

}  // namespace fastelbo::FASTELBO_ISA
