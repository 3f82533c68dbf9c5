// Elementary functions: branch-free, so that a loop over them is vectorized, and the same on host and device.
//
// Coefficients: scripts/minimax.py (Remez, relative error). The maximum errors stated are over the whole stated range,
// measured against long double by tests/cpp/math_cases.h. NaN in gives NaN out; infinities go to the limits.
#pragma once

#include <cstdint>

#include "math/isa.h"

namespace fastelbo::FASTELBO_ISA {

template <class To, class From>
FASTELBO_HD To bits_to(From from) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, from);
}

// c0 + c1 x + c2 x^2 + ...
template <class T>
FASTELBO_HD T poly(T, T c0) {
  return c0;
}
template <class T, class... C>
FASTELBO_HD T poly(T x, T c0, C... c) {
  return c0 + x * poly<T>(x, c...);
}

template <class T>
struct Float;  // layout and reduction constants of an IEEE type

template <>
struct Float<float> {
  using Int = int32_t;
  using UInt = uint32_t;
  static constexpr int kMantissa = 23, kBias = 127;
  // 1.5 * 2^23 + bias: adding it to n rounds it to an integer and leaves n + bias in the low bits
  static constexpr float kMagic = 12583039.0f;
  static constexpr float kLog2e = 1.44269504f, kLn2Hi = 0.693145752f, kLn2Lo = 1.42860677e-6f;
  static constexpr float kZeroExp = -88.0f;                    // exp there has exponent bits 0: exactly 0
  static constexpr float kLowest = -104.0f, kHighest = 89.0f;  // exp is 0 and infinity beyond
  static constexpr UInt kSqrtHalf = 0x3f3504f3u;
  static constexpr float kMinNormal = 1.17549435e-38f, kTwoMantissa = 8388608.0f;
};

template <>
struct Float<double> {
  using Int = int64_t;
  using UInt = uint64_t;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kMagic = 6755399441056767.0;  // 1.5 * 2^52 + bias
  static constexpr double kLog2e = 1.4426950408889634074, kLn2Hi = 0.693147180369123816490,
                          kLn2Lo = 1.90821492927058770002e-10;
  static constexpr double kZeroExp = -709.2;
  static constexpr double kLowest = -746.0, kHighest = 710.0;
  static constexpr UInt kSqrtHalf = 0x3fe6a09e667f3bcdull;
  static constexpr double kMinNormal = 2.2250738585072014e-308, kTwoMantissa = 4503599627370496.0;
};

// By the sign bit, without a comparison, which would be control flow to the compiler.
template <class T>
constexpr typename Float<T>::UInt kSignBit = typename Float<T>::UInt(1) << (8 * sizeof(T) - 1);

template <class T>
FASTELBO_HD T abs_of(T x) {
  return bits_to<T>(bits_to<typename Float<T>::UInt>(x) & ~kSignBit<T>);
}
template <class T>
FASTELBO_HD T minus_abs(T x) {
  return bits_to<T>(bits_to<typename Float<T>::UInt>(x) | kSignBit<T>);
}
// y >= 0 with the sign of x
template <class T>
FASTELBO_HD T with_sign_of(T x, T y) {
  using U = typename Float<T>::UInt;
  return bits_to<T>(bits_to<U>(y) | (bits_to<U>(x) & kSignBit<T>));
}
// 0 where x has the sign bit, else 1
template <class T>
FASTELBO_HD T one_unless_negative(T x) {
  using F = Float<T>;
  using U = typename F::UInt;
  const U negative = U(bits_to<typename F::Int>(x) >> (8 * sizeof(T) - 1));  // all bits or none
  return bits_to<T>(bits_to<U>(T(1)) & ~negative);
}

// 0 where the condition holds, else y: by bits, as above
template <class T>
FASTELBO_HD T zero_if(bool condition, T y) {
  using U = typename Float<T>::UInt;
  return bits_to<T>(bits_to<U>(y) & (U(condition) - 1));
}
template <class T>
FASTELBO_HD bool is_zero(T x) {
  using U = typename Float<T>::UInt;
  return U(bits_to<U>(x) << 1) == 0;
}

// a b, where 0 times infinity is 0: of a difference that is exactly 0 and a scale that overflows. NaN stays NaN.
template <class T>
FASTELBO_HD T times(T a, T b) {
  using U = typename Float<T>::UInt;
  const bool infinite = U(bits_to<U>(b) << 1) == U(bits_to<U>(T(__builtin_huge_val())) << 1);
  return zero_if(is_zero(a) & infinite, a * b);
}

template <class T>
FASTELBO_HD T clamped(T low, T x, T high) {  // NaN stays
  const T below = x > high ? high : x;
  return below < low ? low : below;
}

// exp(r) - 1 for |r| <= ln(2)/2
FASTELBO_HD float expm1_reduced(float r) {
  return r + r * r * poly(r, 4.999999345e-1f, 1.666652063e-1f, 4.16683881e-2f, 8.368716853e-3f, 1.38145956e-3f);
}
FASTELBO_HD double expm1_reduced(double r) {
  return r + r * r *
                 poly(r, 5.000000000000010627e-1, 1.66666666666664125e-1, 4.166666666653016034e-2,
                      8.333333333494473217e-3, 1.388888894362980222e-3, 1.984126950655585459e-4,
                      2.480149309912995776e-5, 2.755758639329493309e-6, 2.763024832412274166e-7,
                      2.500005559962514668e-8);
}
template <class T>
FASTELBO_HD T exp_reduced(T r) {
  return 1 + expm1_reduced(r);
}

// 2^n for an integer n given as n + kMagic; n in [-bias, bias], and 0 at n = -bias
template <class T>
FASTELBO_HD T exp2_of(T shifted) {
  using U = typename Float<T>::UInt;
  return bits_to<T>(bits_to<U>(shifted) << Float<T>::kMantissa);
}

// x = n ln 2 + r with an integer n, and 2^n, for n in [-bias, bias]
template <class T>
struct Reduced {
  T r, power;
};
template <class T>
FASTELBO_HD Reduced<T> reduce_exp(T x) {
  using F = Float<T>;
  const T shifted = x * F::kLog2e + F::kMagic;
  const T n = shifted - F::kMagic;
  return {(x - n * F::kLn2Hi) - n * F::kLn2Lo, exp2_of(shifted)};
}

// exp(x) for |x| <= 87 (float), 708 (double). Relative error 1.2e-7 (float), 2.3e-16 (double).
template <class T>
FASTELBO_HD T exp_within(T x) {
  const Reduced<T> x_of = reduce_exp(x);
  return exp_reduced(x_of.r) * x_of.power;
}

// exp(x) for x <= 0. Relative error 1.2e-7 (float), 2.3e-16 (double); 0 below -87.7 and -708.7.
template <class T>
FASTELBO_HD T exp_nonpositive(T x) {
  return exp_within(x < Float<T>::kZeroExp ? Float<T>::kZeroExp : x);
}

template <class T>
struct ExpPair {
  T exp, expm1;
};

// exp(x) and exp(x) - 1 for x <= 0. Relative errors 1.2e-7 and 1.5e-7 (float), 2e-16 and 3e-16 (double).
template <class T>
FASTELBO_HD ExpPair<T> exp_and_expm1(T x) {
  const Reduced<T> x_of = reduce_exp(x < Float<T>::kZeroExp ? Float<T>::kZeroExp : x);
  const T p = expm1_reduced(x_of.r);
  return {x_of.power * p + x_of.power, x_of.power * p + (x_of.power - 1)};
}

// exp(x) for any x, denormal results included. Relative error 1.2e-7 (float), 2.3e-16 (double) of normal results.
template <class T>
FASTELBO_HD T exp_full(T x) {
  using F = Float<T>;
  x = x < F::kLowest ? F::kLowest : x;
  x = x > F::kHighest ? F::kHighest : x;
  const T n = (x * F::kLog2e + F::kMagic) - F::kMagic;
  const T r = (x - n * F::kLn2Hi) - n * F::kLn2Lo;
  const T half = n * T(0.5) + F::kMagic;  // 2^n in two steps: n may pass the exponent's range
  const T rest = (n - (half - F::kMagic)) + F::kMagic;
  return exp_reduced(r) * exp2_of(half) * exp2_of(rest);
}

// log(1 + e) for 0 <= e <= 1. Relative error 2.2e-7 (float), 3.3e-16 (double).
FASTELBO_HD float log1p_unit(float e) {
  return e * poly(e, 9.9999997e-1f, -4.999949428e-1f, 3.331911332e-1f, -2.484307123e-1f, 1.91062286e-1f,
                  -1.36635056e-1f, 7.822699378e-2f, -2.950485418e-2f, 5.232383629e-3f);
}
FASTELBO_HD double log1p_unit(double e) {
  const double s = e / (2 + e), w = s * s;
  return 2 * s + s * w *
                     poly(w, 6.666666666666667832e-1, 3.999999999999397722e-1, 2.857142857251007204e-1,
                          2.222222212546818729e-1, 1.818182320299821091e-1, 1.538445193050054789e-1,
                          1.333680584355733307e-1, 1.171595041912239573e-1, 1.097256843529979674e-1,
                          6.994241021426049788e-2, 1.646764420638307815e-1);
}

// log(1 + f) - f for f in [sqrt(1/2) - 1, sqrt(2) - 1]
FASTELBO_HD float log1p_curve(float f) {
  const float p = poly(f, 3.333331672e-1f, -2.500081034e-1f, 2.000228691e-1f, -1.662455597e-1f, 1.418117895e-1f,
                       -1.312872896e-1f, 1.28817239e-1f, -7.859759908e-2f);
  return f * f * (f * p - 0.5f);
}
FASTELBO_HD double log1p_curve(double f) {  // 2 atanh(s) = log(1 + f), and 2 s = f - f s
  const double s = f / (2 + f), w = s * s;
  const double p =
      poly(w, 6.666666666666666093e-1, 4.000000000000628704e-1, 2.857142856907298424e-1, 2.222222264874744995e-1,
           1.818177550875788698e-1, 1.538709764114281472e-1, 1.324996223619122087e-1, 1.325275299187761007e-1);
  return s * (w * p - f);
}

// exponent * ln 2 + log(1 + f), given curve = log1p_curve(f)
template <class T>
FASTELBO_HD T log_joined(T exponent, T f, T curve) {
  return exponent * Float<T>::kLn2Hi + (f + (curve + exponent * Float<T>::kLn2Lo));
}
template <class T>
FASTELBO_HD T log_split(T exponent, T f) {
  return log_joined(exponent, f, log1p_curve(f));
}

// u = 2^exponent (1 + f), u > 0 and normal, f in [sqrt(1/2) - 1, sqrt(2) - 1)
template <class T>
struct Split {
  T exponent, f;
};
template <class T>
FASTELBO_HD Split<T> split_log(T u) {
  using F = Float<T>;
  using U = typename F::UInt;
  const U bits = bits_to<U>(u) - F::kSqrtHalf + (U(F::kBias + 1) << F::kMantissa);  // biased, so that it stays positive
  const U exponent = bits >> F::kMantissa;
  const U mantissa = (bits & ((U(1) << F::kMantissa) - 1)) + F::kSqrtHalf;
  return {T(typename F::Int(exponent) - (F::kBias + 1)), bits_to<T>(mantissa) - 1};
}

// log(u) for u > 0 and normal. Relative error 2e-7 (float), 3e-16 (double).
template <class T>
FASTELBO_HD T log_positive(T u) {
  const Split<T> s = split_log(u);
  return log_split(s.exponent, s.f);
}

template <class T>
struct LogRatio {
  T log;    // log q
  T curve;  // log q - (q - 1), never positive
};

// Of a ratio q = 1 + f > 0 whose two forms have all their digits: near q = 1 those of f are lost in q. Relative error
// 1.2e-7 (float), 2e-16 (double) of the logarithm; 6e-7, 1.2e-15 of the curve, 3e-7, 6e-16 where |f| < 1/4.
template <class T>
FASTELBO_HD LogRatio<T> log_ratio(T q, T f) {
  const Split<T> s = split_log(q);
  const bool near = s.exponent == 0;
  const T t = near ? f : s.f;
  const T curve = log1p_curve(t), log = log_joined(s.exponent, t, curve);
  return {f == f ? log : f, near ? curve : log - f};  // the bits of a NaN q say nothing
}

template <class T>
struct LogPair {
  T log_p, log_1mp;
};

// log(p) and log(1 - p) for p in [0, 1]; -inf at 0 and 1; NaN outside. Relative error 2e-7 (float), 4e-16 (double).
template <class T>
FASTELBO_HD LogPair<T> log_and_log1m(T p) {
  using F = Float<T>;
  const T inf = T(__builtin_huge_val());
  const bool tiny = p < F::kMinNormal;
  const Split<T> a = split_log(tiny ? p * F::kTwoMantissa : p);
  T log_p = log_split(a.exponent - (tiny ? T(F::kMantissa) : T(0)), a.f);
  log_p = p > 0 ? log_p : -inf;
  const T q = 1 - p, log_1mp = q > 0 ? log_ratio(q, -p).log : -inf;
  const bool inside = p >= 0 && p <= 1;
  const T poison = inside ? T(0) : T(__builtin_nan(""));
  return {log_p + poison, log_1mp + poison};
}

// (exp(t) - 1 - t) / t^2 for |t| <= 1
FASTELBO_HD float expm1_series(float t) {
  return poly(t, 4.999999979e-1f, 1.666666701e-1f, 4.166673454e-2f, 8.333310276e-3f, 1.388545197e-3f, 1.984402348e-4f,
              2.535483001e-5f, 2.772284194e-6f);
}
FASTELBO_HD double expm1_series(double t) {
  return poly(t, 5.0e-1, 1.666666666666666691e-1, 4.16666666666666622e-2, 8.33333333333323991e-3,
              1.388888888888957838e-3, 1.984126984137175136e-4, 2.480158730119719182e-5, 2.755731917507854581e-6,
              2.75573193248905321e-7, 2.505212041301949043e-8, 2.087674483141534883e-9, 1.605746226135608097e-10,
              1.147124044684971758e-11, 7.752866502969100035e-13, 4.798865299379369583e-14);
}
// What a byte counts for: itself, or a 255th of itself.
template <class T>
struct ByteScale {
  T hi, lo;
};

// 1/255 as hi + lo, where 255 hi is exact: hi has 9 bits in float and 41 in double.
FASTELBO_HD ByteScale<float> byte_scale(bool unit, float) {
  return unit ? ByteScale<float>{0x1.01p-8f, 0x1.010102p-24f} : ByteScale<float>{1, 0};
}
FASTELBO_HD ByteScale<double> byte_scale(bool unit, double) {
  return unit ? ByteScale<double>{0x1.010101010100p-8, 0x1.010101010101p-56} : ByteScale<double>{1, 0};
}

// byte or byte / 255, rounded to nearest for all 256 bytes. The result is a sum: a compiler fuses a product, such as
// byte * (1/255), with the subtraction that follows, and x - 1 is then not 0 at 255.
template <class T>
FASTELBO_HD T scaled_byte(T byte, ByteScale<T> scale) {
  return byte * scale.hi + byte * scale.lo;
}

template <class T>
struct Expm1 {
  T value;      // exp(t) - 1
  T remainder;  // exp(t) - 1 - t, never negative
};

// exp(t) - 1 and exp(t) - 1 - t from t and exp(t), by series where the closed form cancels (|t| < 1).
// Relative error of both 3.8e-7 (float), 8e-16 (double).
template <class T>
FASTELBO_HD Expm1<T> expm1_of(T t, T exp_t) {
  const T tail = t * t * expm1_series(t);
  const bool small = t < 1 && t > -1;
  return {small ? t + tail : exp_t - 1, small ? tail : exp_t - (1 + t)};
}

}  // namespace fastelbo::FASTELBO_ISA
