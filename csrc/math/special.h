// Special functions of counts: the logarithm of a ratio, and what Stirling's series leaves of lgamma and digamma.
//
// Coefficients: scripts/minimax.py. The maximum errors stated are measured against long double by
// tests/cpp/math_cases.h.
#pragma once

#include "math/elementary.h"

namespace fastelbo::FASTELBO_ISA {

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

// v P(v) and v^2 Q(v), the two tails below as functions of v = 1 / a
FASTELBO_HD float stirling_series(float v) {
  return v * poly(v, 8.333333541e-2f, -3.000971558e-7f, -2.770664437e-3f, -6.447705729e-5f, 1.080920687e-3f,
                  -6.792428791e-4f, 1.712652404e-4f, -9.368051301e-6f);
}
FASTELBO_HD float digamma_series(float v) {
  return v * v *
         poly(v, 8.333333771e-2f, -7.494708036e-7f, -8.31223745e-3f, -2.266999382e-4f, 5.160150312e-3f,
              -3.282271647e-3f, -7.07711712e-5f, 9.163804469e-4f, -3.014779366e-4f);
}
FASTELBO_HD double stirling_series(double v) {
  return v * poly(v - 0.5, 8.268139191081858746e-2, -2.460020129812058293e-3, -1.940417552403306257e-3,
                  8.061463950606696244e-4, -2.019462900616151219e-5, -2.049293641723523451e-4, 1.630314497157395914e-4,
                  -5.47076880617247952e-5, -2.999674028391253367e-5, 6.653892806096739134e-5, -6.131096571463121796e-5,
                  3.172991798047837115e-5, 4.843246568496950486e-6, -3.66316777714162203e-5, 5.051319412048888636e-5,
                  -3.062456764314487967e-5, 1.387667547102892912e-5, -6.10698859699650413e-5, 2.149250868935360157e-5,
                  2.296568541568550223e-4, -2.332220915404523131e-4, -1.570463721964579734e-4, 2.158204364442332694e-4);
}
FASTELBO_HD double digamma_series(double v) {
  return v * v *
         poly(v - 0.5, 8.145138184591267463e-2, -6.860457812027702241e-3, -4.612033064744680078e-3,
              3.184196322166496829e-3, -6.132965331499271523e-4, -7.404818123514964641e-4, 9.497417040218044543e-4,
              -5.576504073920793602e-4, 2.950855760423991725e-5, 3.589079160247514302e-4, -5.010145647203146908e-4,
              4.082680231092241032e-4, -1.609410981422739112e-4, -1.393266761496005419e-4, 4.104163878402726067e-4,
              -5.41030065563998222e-4, 3.508332921025606589e-4, -6.759257988942107524e-5, 4.065919551194346499e-4,
              -4.11646780093820752e-4, -2.009640722044385812e-3, 3.70690169743458188e-3, -2.168859192656739577e-5,
              -3.68699043307758441e-3, 2.029456857172259838e-3);
}

template <class T>
struct Stirling {
  T tail;     // S(a) = lgamma(a) - (a - 1/2) log a + a - 1/2 log 2 pi = 1/(12 a) - 1/(360 a^3) + ...
  T digamma;  // D(a) = log a - 1/(2 a) - digamma(a) = -S'(a) = 1/(12 a^2) - 1/(120 a^4) + ...
};

// Of a >= 1, where the series hold. Relative error 2e-7 (float), 5e-16 (double) of the tail, 2.8e-7, 7e-16 of digamma.
template <class T>
FASTELBO_HD Stirling<T> stirling_from_one(T a) {
  const T v = 1 / a;
  return {stirling_series(v), digamma_series(v)};
}

// Of a > 0: below 1, by a step of the recurrence. Error there 3e-7 (float), 6e-16 (double) of the larger of the tail
// and 1, and relative 1.5e-6, 3e-15 of digamma.
template <class T>
FASTELBO_HD Stirling<T> stirling(T a) {
  const bool small = a < 1;
  const T v = 1 / (small ? a + 1 : a), u = 1 / a;
  const T tail = stirling_series(v), digamma = digamma_series(v);
  const T step = log_ratio(1 + u, u).log;  // log((a + 1) / a)
  return {small ? tail + ((a + T(0.5)) * step - 1) : tail, small ? digamma + (T(0.5) * (u + v) - step) : digamma};
}

}  // namespace fastelbo::FASTELBO_ISA
