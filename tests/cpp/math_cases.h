// The elementary functions against long double over their whole range: the maximum errors that math/*.h states.
// Included once per instruction set, like the kernels.
#pragma once

#include "check.h"
#include "cpu/kernels/noise.h"
#include "cpu/kernels/tile.h"
#include "likelihoods/list.h"
#include "math/kl.h"
#include "math/log_mean_exp.h"
#include "math/philox.h"
#include "math/special.h"

namespace fastelbo::FASTELBO_ISA {

// Fewer where long double is not the processor's own, and takes 50 times as long.
constexpr int kPoints = __LDBL_MANT_DIG__ == 64 ? 400000 : 10000;

inline double relative(long double got, long double want) {
  return want == 0 ? double(fabsl(got)) : double(fabsl((got - want) / want));
}

// The largest relative error of f over kPoints points of [lo, hi], spaced evenly.
template <class T, class F, class G>
double sweep(T lo, T hi, F f, G exact) {
  double worst = 0;
  for (int i = 0; i <= kPoints; ++i) {
    const T x = T(lo + (hi - lo) * (long double)(i) / kPoints);
    const double error = relative(f(x), exact((long double)(x)));
    if (!(error <= worst)) worst = error;
  }
  return worst;
}

// The same over powers: x = +-2^(lo..hi).
template <class T, class F, class G>
double sweep_powers(double lo, double hi, T sign, F f, G exact) {
  double worst = 0;
  for (int i = 0; i <= kPoints; ++i) {
    const T x = sign * T(exp2l(lo + (hi - lo) * (long double)(i) / kPoints));
    const double error = relative(f(x), exact((long double)(x)));
    if (!(error <= worst)) worst = error;
  }
  return worst;
}

// log(1 + f) - f
inline long double curve_by_series(long double f) {
  long double sum = 0, power = -f * f;
  for (int n = 2; n < 400 && fabsl(power) > 1e-25L * fabsl(sum); ++n, power *= -f) sum += power / n;
  return sum;
}

// Stirling's series from 30 on, and the recurrence below: S(a) and D(a) of math/special.h, absolute error 1e-18.
inline Stirling<long double> exact_stirling(long double a) {
  long double tail = 0, digamma = 0;
  for (; a < 30; ++a) {
    tail += (a + 0.5L) * log1pl(1 / a) - 1;
    digamma += 0.5L * (1 / a + 1 / (a + 1)) - log1pl(1 / a);
  }
  const long double b[] = {1 / 12.0L, -1 / 360.0L, 1 / 1260.0L, -1 / 1680.0L, 1 / 1188.0L, -691 / 360360.0L};
  long double power = 1 / a;
  for (int k = 0; k < 6; ++k, power /= a * a) tail += b[k] * power, digamma += b[k] * (2 * k + 1) * power / a;
  return {tail, digamma};
}

template <class T>
void special_of(Checks& c, const char* type) {
  const auto limit = [&](double single, double twofold) { return sizeof(T) == 8 ? twofold : single; };
  std::printf("  %s\n", type);
  const auto report = [&](const char* what, double error, double bound) {
    std::printf("    %-28s %.2e (stated %.1e)\n", what, error, bound);
    c.at_most(error, bound, what);
  };
  const auto log_q = [](T q) { return log_ratio(q, q - 1); };
  const auto exact_curve = [](long double q) {
    return fabsl(q - 1) > 0.3L ? logl(q) - (q - 1) : curve_by_series(q - 1);
  };
  const double low = limit(-120, -1000), high = limit(120, 1000);
  report("log of a ratio",
         sweep_powers<T>(
             low, high, 1, [&](T q) { return log_q(q).log; }, [](long double q) { return logl(q); }),
         limit(1.2e-7, 2e-16));
  report("log q - (q - 1)",
         std::fmax(sweep_powers<T>(
                       low, high, 1, [&](T q) { return log_q(q).curve; }, exact_curve),
                   sweep<T>(
                       T(0.5), T(2), [&](T q) { return log_q(q).curve; }, exact_curve)),
         limit(6e-7, 1.2e-15));
  const auto small_f = [](long double f) { return curve_by_series(f); };
  for (const T sign : {T(1), T(-1)}) {  // 1 + f is 1: f has the digits
    report("log(1 + f) - f, tiny f",
           sweep_powers<T>(
               limit(-60, -400), -2, sign, [](T f) { return log_ratio(1 + f, f).curve; }, small_f),
           limit(3e-7, 6e-16));
  }
  double tail = 0, digamma = 0, tail_below = 0, digamma_below = 0;
  for (int i = 0; i <= kPoints / 20; ++i) {
    const T a = T(exp2l(-60 + i * (2000.0L / kPoints)));
    const Stirling<long double> exact = exact_stirling(a);
    const Stirling<T> got = stirling(a);
    // below 1 the tail is as large as the logarithm of a: absolute error by the larger of 1 and it
    double& of_tail = a < 1 ? tail_below : tail;
    double& of_digamma = a < 1 ? digamma_below : digamma;
    const double size = a < 1 ? std::fmax(1, std::fabs(double(exact.tail))) : std::fabs(double(exact.tail));
    of_tail = std::fmax(of_tail, double(fabsl(got.tail - exact.tail)) / size);
    of_digamma = std::fmax(of_digamma, relative(got.digamma, exact.digamma));
  }
  report("S(a), a >= 1", tail, limit(2e-7, 5e-16));
  report("D(a), a >= 1", digamma, limit(2.8e-7, 7e-16));
  report("S(a), a < 1, absolute", tail_below, limit(3e-7, 6e-16));
  report("D(a), a < 1", digamma_below, limit(1.5e-6, 3e-15));
  double gamma = 0, rise = 0, slope = 0;
  for (int i = 0; i <= 400; i += kPoints < 400000 ? 7 : 1) {
    const T x = i < 200 ? T(i + 1) / 201 : T(exp2l(-(i - 199) * limit(0.5, 4.0)));
    const auto exact_gamma = [](long double x) {  // by its series where x is small
      return x > 1e-3L ? lgammal(1 + x)
                       : x * (-0.577215664901532860607L +
                              x * (0.822467033424113218236L -
                                   x * (0.400685634386531428467L -
                                        x * (0.270580808427784547879L -
                                             x * (0.207385551028673985266L - x * 0.169557176997408189952L)))));
    };
    gamma = std::fmax(gamma, relative(lgamma1p_unit(x), exact_gamma(x)));
    for (int j = -60; j <= 60; ++j) {
      const T a = T(exp2l(j));
      const auto s = exact_stirling(a), t = exact_stirling((long double)(a) + x);
      const long double u = (long double)(x) / a, size = x + log1pl(u);
      const long double log1p_less = u < 1e-3L ? curve_by_series(u) : log1pl(u) - u;
      const long double value = a * log1p_less + (x - 0.5L) * log1pl(u) + (t.tail - s.tail);
      const long double by_a =
          a * (log1p_less + 0.5L * (1 / (long double)(a)-1 / (a + (long double)(x))) + s.digamma - t.digamma);
      if (x < 1e-3L) continue;  // the differences of the exact tails have lost their digits
      const Rising<T> got = rising(x, a);
      rise = std::fmax(rise, double(fabsl(got.value - value) / size));
      slope = std::fmax(slope, double(fabsl(got.slope - by_a) / size));
    }
  }
  report("lgamma(1 + x), x in [0, 1]", gamma, limit(2e-7, 1.3e-15));
  report("lgamma(a + x) - lgamma(a)", rise, limit(4e-7, 1.6e-15));
  report("its slope", slope, limit(4e-7, 1.6e-15));
  double expm1 = 0, exp = 0;
  for (int i = 0; i <= kPoints; ++i) {
    const T x = -T(exp2l(limit(-100, -900) + i * ((limit(100, 900) + 6.4L) / kPoints)));
    expm1 = std::fmax(expm1, relative(exp_and_expm1(x).expm1, expm1l(x)));
    exp = std::fmax(exp, relative(exp_and_expm1(x).exp, expl(x)));
  }
  report("exp(x) of a pair, x <= 0", exp, limit(1.2e-7, 2e-16));
  report("exp(x) - 1, x <= 0", expm1, limit(1.5e-7, 3e-16));
}

template <class T>
void math_of(Checks& c, const char* type) {
  const bool wide = sizeof(T) == 8;
  const T inf = T(__builtin_huge_val()), nan = T(__builtin_nan(""));
  const auto limit = [&](double single, double twofold) { return wide ? twofold : single; };
  std::printf("  %s\n", type);
  const auto report = [&](const char* what, double error, double bound) {
    std::printf("    %-28s %.2e (stated %.1e)\n", what, error, bound);
    c.at_most(error, bound, what);
  };

  const auto exact_exp = [](long double x) { return expl(x); };
  const auto full = [](T x) { return exp_full(x); };
  const auto nonpositive = [](T x) { return exp_nonpositive(x); };
  report("exp, x <= 0", sweep<T>(T(limit(-87.6, -708.6)), 0, nonpositive, exact_exp), limit(1.2e-7, 2.3e-16));
  report("exp", sweep<T>(T(limit(-87, -708)), T(limit(88.7, 709.7)), full, exact_exp), limit(1.2e-7, 2.3e-16));
  report("exp near 0", sweep_powers<T>(-60, 0, -1, nonpositive, exact_exp), limit(1.2e-7, 2.3e-16));
  report("log(1 + e), e in [0, 1]",
         std::fmax(
             sweep<T>(
                 0, 1, [](T x) { return log1p_unit(x); }, [](long double x) { return log1pl(x); }),
             sweep_powers<T>(
                 limit(-100, -900), 0, 1, [](T x) { return log1p_unit(x); }, [](long double x) { return log1pl(x); })),
         limit(2.2e-7, 3.3e-16));
  const auto log_p = [](T x) { return log_and_log1m(x).log_p; };
  const auto log_1mp = [](T x) { return log_and_log1m(x).log_1mp; };
  const auto exact_log = [](long double x) { return logl(x); };
  const auto exact_log1m = [](long double x) { return log1pl(-x); };
  const T below_one = 1 - (wide ? T(0x1p-53) : T(0x1p-24));
  report("log p",
         std::fmax(sweep<T>(T(1e-6), below_one, log_p, exact_log),
                   sweep_powers<T>(limit(-148, -1070), -1, 1, log_p, exact_log)),
         limit(2e-7, 3e-16));
  report(
      "log(1 - p)",
      std::fmax(sweep<T>(T(1e-6), below_one, log_1mp, exact_log1m), sweep_powers<T>(-60, -1, 1, log_1mp, exact_log1m)),
      limit(2e-7, 4e-16));
  const auto remainder = [](T t) { return expm1_of(t, exp_full(t)).remainder; };
  const auto value = [](T t) { return expm1_of(t, exp_full(t)).value; };
  // long double cancels too: near 0 the series says what is right
  const auto exact_remainder = [](long double t) {
    if (fabsl(t) > 0.5L) return expl(t) - 1 - t;
    long double term = t * t / 2, sum = 0;
    for (int n = 3; n < 24; ++n) sum += term, term *= t / n;
    return sum;
  };
  const auto exact_expm1 = [](long double t) { return expm1l(t); };
  double worst = 0, worst_value = 0;
  for (const T sign : {T(1), T(-1)}) {
    worst = std::fmax(worst, sweep_powers<T>(-40, 6, sign, remainder, exact_remainder));
    worst_value = std::fmax(worst_value, sweep_powers<T>(-40, 6, sign, value, exact_expm1));
  }
  report("exp(t) - 1 - t", worst, limit(3.8e-7, 8e-16));
  report("exp(t) - 1", worst_value, limit(3e-7, 6e-16));

  c.expect(exp_nonpositive(-inf) == 0 && exp_nonpositive(T(-1e4)) == 0, "exp(-inf) is 0", 0, 0);
  c.expect(exp_nonpositive(nan) != exp_nonpositive(nan), "exp(nan), x <= 0", 0, 0);
  c.expect(exp_full(inf) == inf && exp_full(-inf) == 0 && exp_full(T(0)) == 1, "exp of infinities and 0", 0, 0);
  c.expect(exp_full(nan) != exp_full(nan), "exp(nan)", 0, 0);
  c.expect(log_and_log1m(T(0)).log_p == -inf && log_and_log1m(T(0)).log_1mp == 0, "log at p = 0", 0, 0);
  c.expect(log_and_log1m(T(1)).log_p == 0 && log_and_log1m(T(1)).log_1mp == -inf, "log at p = 1", 0, 0);
  for (const T bad : {T(-0.1), T(1.1), nan, inf, -inf}) {
    const LogPair<T> logs = log_and_log1m(bad);
    c.expect(logs.log_p != logs.log_p && logs.log_1mp != logs.log_1mp, "log outside [0, 1] is NaN", double(bad), 0);
  }
  for (const T t : {T(0), T(1e-4), T(-1e-4), T(1e-20), T(-30), T(5)}) {
    c.expect(expm1_of(t, exp_full(t)).remainder >= 0, "KL is never negative", double(t), 0);
  }
  const Terms<T> sure = evaluate<Bernoulli>(Element<T>{{T(1e4)}, T(1)}),
                 wrong = evaluate<Bernoulli>(Element<T>{{T(-1e4)}, T(1)});
  c.expect(sure.value == 0 && sure.d.first == 0, "Bernoulli at logit 1e4, x = 1", double(sure.value), 0);
  c.expect(wrong.value == T(-1e4) && wrong.d.first == 1, "Bernoulli at logit -1e4, x = 1", double(wrong.value), 0);
}

inline void philox_cases(Checks& c) {
  // Known answers of the Random123 distribution (kat_vectors, philox4x32 10), for counters of 64 bits
  const Words zero = philox(0, 0, 0);
  c.expect(zero.w0 == 0x6627e8d5u && zero.w1 == 0xe169c58du && zero.w2 == 0xbc57ac4cu && zero.w3 == 0x9b00dbd8u,
           "Philox of zeros", zero.w0, 0);
  const Words ones = philox_rounds<10>({~0u, ~0u, ~0u, ~0u}, ~0u, ~0u);
  c.expect(ones.w0 == 0x408f276du && ones.w1 == 0x41c83b0eu && ones.w2 == 0xa20bc7c6u && ones.w3 == 0x6d5451fdu,
           "Philox of ones", ones.w0, 0);
  const Words pi = philox_rounds<10>({0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}, 0xa4093822u, 0x299f31d0u);
  c.expect(pi.w0 == 0xd16cfe09u && pi.w1 == 0x94fdccebu && pi.w2 == 0x5001e420u && pi.w3 == 0x24126ea1u, "Philox of pi",
           pi.w0, 0);
  double radius = 0, angle = 0;
  for (int i = 0; i < kPoints; ++i) {
    const Words w = philox(7, uint32_t(i), 0);
    // every size of u, both ends included
    const uint32_t a = i % 3 == 0 ? w.w0 >> (i % 32) : i % 3 == 1 ? ~(w.w0 >> (i % 32)) : w.w0;
    const long double u = ((long double)(a) + 0.5L) * 0x1p-32L, t = 2 * M_PIl * w.w1 * 0x1p-32L;
    const long double r = sqrtl(-2 * logl(u));
    const NormalPair z = box_muller(a, w.w1);
    radius =
        std::fmax(radius, relative(sqrtl((long double)(z.first) * z.first + (long double)(z.second) * z.second), r));
    angle = std::fmax(angle, double(fmaxl(fabsl(z.first / r - cosl(t)), fabsl(z.second / r - sinl(t)))));
  }
  std::printf("    %-28s %.2e (stated 4.0e-07)\n    %-28s %.2e (stated 4.0e-07)\n", "Box-Muller radius", radius,
              "Box-Muller angle", angle);
  c.at_most(radius, 4e-7, "Box-Muller radius");
  c.at_most(angle, 4e-7, "Box-Muller angle");
}

// The vectors of counters against one counter at a time, from any place in a counter and across the carry of its words.
inline void noise_cases(Checks& c) {
  NoiseBuffer buffer;
  double worst = 0;
  bool same_words = true;
  uint64_t hash = 0;
  for (const int64_t start : {int64_t(0), int64_t(1), int64_t(30), int64_t(4001), (int64_t(1) << 34) - 9}) {
    for (const int64_t n : {int64_t(1), int64_t(63), kLatentTile}) {
      const float* run = normal_run(0x123456789abcdefull, start, n, buffer);
      for (int64_t i = 0; i < n; ++i) {
        const uint64_t counter = uint64_t(start + i) >> 2;
        const Words w = philox(0x123456789abcdefull, uint32_t(counter), uint32_t(counter >> 32));
        const uint32_t words[] = {w.w0, w.w1, w.w2, w.w3};
        for (int j = 0; j < 4; ++j) {
          same_words &= buffer.words[j][(start % 4 + i) / 4] == words[j];
          hash = (hash ^ words[j]) * 0x100000001b3u;
        }
        const bool second = (start + i) & 2;
        const NormalPair z = box_muller(second ? w.w2 : w.w0, second ? w.w3 : w.w1);
        const double error = std::fabs(double(run[i]) - double((start + i) & 1 ? z.second : z.first));
        if (!(error <= worst)) worst = error;
      }
    }
  }
  c.expect(same_words, "words of Philox by vectors of counters", 0, 0);
  c.expect(hash == 0x940ea2e1a6f20b4bu, "words of Philox, the same on every machine", 0, 0);
  c.at_most(worst, 2e-6, "noise by vectors of counters");  // the compiler may fuse other multiplications and additions
}

// All numbers of half precision, and those halfway between two of them, against torch's portable conversions.
inline void half_cases(Checks& c) {
  constexpr int kHalves = 1 << 16;
  static uint16_t halves[kHalves], back[kHalves];
  static float floats[kHalves];
  View from, to;
  from.data = halves, from.dtype = DType::f16, from.size[0] = kHalves, from.stride[0] = 1;
  to = from, to.data = back;
  for (int i = 0; i < kHalves; ++i) halves[i] = uint16_t(i);
  read(from, 0, 0, kHalves, floats);
  bool same = true;
  for (int i = 0; i < kHalves; ++i) {
    const float f = c10::detail::fp16_ieee_to_fp32_value(halves[i]);
    same &= f == f ? bits_to<uint32_t>(floats[i]) == bits_to<uint32_t>(f) : floats[i] != floats[i];
  }
  c.expect(same, "halves to floats", 0, 0);
  for (const int step : {0, 1}) {
    for (int i = 0; i + step < kHalves; ++i) {
      const float f = c10::detail::fp16_ieee_to_fp32_value(uint16_t(i + step));
      floats[i] = step ? 0.5f * (floats[i] + f) : f;
    }
    write(to, 0, 0, kHalves, floats);
    for (int i = 0; i < kHalves; ++i) {
      const uint16_t want = c10::detail::fp16_ieee_from_fp32_value(floats[i]);
      const bool nan = floats[i] != floats[i];
      same &= nan ? (back[i] & 0x7fff) > 0x7c00 : back[i] == want;
    }
  }
  c.expect(same, "floats to halves", 0, 0);
}

inline void math_cases(Checks& c, const char* isa) {
  std::printf("maths, %s\n", isa);
  math_of<float>(c, "float");
  math_of<double>(c, "double");
  special_of<float>(c, "float, counts");
  special_of<double>(c, "double, counts");
  philox_cases(c);
  noise_cases(c);
  half_cases(c);
}

}  // namespace fastelbo::FASTELBO_ISA

void FASTELBO_RUN(Checks& c) { fastelbo::FASTELBO_ISA::math_cases(c, FASTELBO_NAME); }
