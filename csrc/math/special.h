// Special functions of counts: the logarithm of a ratio, what Stirling's series leaves of lgamma and digamma, and
// lgamma beside a count below 1.
//
// Coefficients: scripts/minimax.py. The maximum errors stated are measured against long double by
// tests/cpp/math_cases.h.
#pragma once

#include "math/elementary.h"

namespace fastelbo::FASTELBO_ISA {

// f(P's variable at v, its coefficients), where S = v P, the first of the tails below as a function of v = 1 / a
template <class F>
FASTELBO_HD auto with_stirling(float, F f) {
  return f(0.0f, 8.333333541e-2f, -3.000971558e-7f, -2.770664437e-3f, -6.447705729e-5f, 1.080920687e-3f,
           -6.792428791e-4f, 1.712652404e-4f, -9.368051301e-6f);
}
template <class F>
FASTELBO_HD auto with_stirling(double, F f) {
  return f(0.5, 8.268139191081858746e-2, -2.460020129812058293e-3, -1.940417552403306257e-3, 8.061463950606696244e-4,
           -2.019462900616151219e-5, -2.049293641723523451e-4, 1.630314497157395914e-4, -5.47076880617247952e-5,
           -2.999674028391253367e-5, 6.653892806096739134e-5, -6.131096571463121796e-5, 3.172991798047837115e-5,
           4.843246568496950486e-6, -3.66316777714162203e-5, 5.051319412048888636e-5, -3.062456764314487967e-5,
           1.387667547102892912e-5, -6.10698859699650413e-5, 2.149250868935360157e-5, 2.296568541568550223e-4,
           -2.332220915404523131e-4, -1.570463721964579734e-4, 2.158204364442332694e-4);
}
// The same of D = v^2 P, the second
template <class F>
FASTELBO_HD auto with_digamma(float, F f) {
  return f(0.0f, 8.333333771e-2f, -7.494708036e-7f, -8.31223745e-3f, -2.266999382e-4f, 5.160150312e-3f,
           -3.282271647e-3f, -7.07711712e-5f, 9.163804469e-4f, -3.014779366e-4f);
}
template <class F>
FASTELBO_HD auto with_digamma(double, F f) {
  return f(0.5, 8.145138184591267463e-2, -6.860457812027702241e-3, -4.612033064744680078e-3, 3.184196322166496829e-3,
           -6.132965331499271523e-4, -7.404818123514964641e-4, 9.497417040218044543e-4, -5.576504073920793602e-4,
           2.950855760423991725e-5, 3.589079160247514302e-4, -5.010145647203146908e-4, 4.082680231092241032e-4,
           -1.609410981422739112e-4, -1.393266761496005419e-4, 4.104163878402726067e-4, -5.41030065563998222e-4,
           3.508332921025606589e-4, -6.759257988942107524e-5, 4.065919551194346499e-4, -4.11646780093820752e-4,
           -2.009640722044385812e-3, 3.70690169743458188e-3, -2.168859192656739577e-5, -3.68699043307758441e-3,
           2.029456857172259838e-3);
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
  return {with_stirling(v, [v](T middle, auto... c) { return v * poly(v - middle, c...); }),
          with_digamma(v, [v](T middle, auto... c) { return v * v * poly(v - middle, c...); })};
}

// Of a > 0: below 1, by a step of the recurrence. Error there 3e-7 (float), 6e-16 (double) of the larger of the tail
// and 1, and relative 1.5e-6, 3e-15 of digamma.
template <class T>
FASTELBO_HD Stirling<T> stirling(T a) {
  const bool small = a < 1;
  const T b = small ? a + 1 : a, u = 1 / a, step = log_ratio(1 + u, u).log;  // log((a + 1) / a)
  const Stirling<T> of_b = stirling_from_one(b);
  return {small ? of_b.tail + ((a + T(0.5)) * step - 1) : of_b.tail,
          small ? of_b.digamma + (T(0.5) * (u + 1 / b) - step) : of_b.digamma};
}

// P(t) and [P(t) - P(u)] / (t - u), in which nothing cancels
template <class T>
struct PolyPair {
  T value, quotient;
};
template <class T>
FASTELBO_HD PolyPair<T> poly_pair(T, T, T c0) {
  return {c0, T(0)};
}
template <class T, class... C>
FASTELBO_HD PolyPair<T> poly_pair(T t, T u, T c0, C... c) {
  const PolyPair<T> rest = poly_pair<T>(t, u, c...);
  return {c0 + t * rest.value, rest.value + u * rest.quotient};
}

// lgamma(1 + x), 0 <= x <= 1. Relative error 2e-7 (float), 1.3e-15 (double).
FASTELBO_HD float lgamma1p_unit(float x) {
  return x * (x - 1) *
         poly(x - 0.5f, 4.831289523e-1f, -1.459599022e-1f, 6.291104767e-2f, -3.130799128e-2f, 1.68082223e-2f,
              -9.436492328e-3f, 5.325191317e-3f, -3.115888066e-3f, 2.448351088e-3f, -1.526438458e-3f);
}
FASTELBO_HD double lgamma1p_unit(double x) {
  return x * (x - 1) *
         poly(x - 0.5, 4.8312895054098089e-1, -1.45959895914305934e-1, 6.29114010745643495e-2, -3.130848750105422082e-2,
              1.679709863127980425e-2, -9.425622444762643588e-3, 5.446457838835767091e-3, -3.21207422275645821e-3,
              1.922916320368374387e-3, -1.164411339897755021e-3, 7.11518953454393641e-4, -4.38035541904371587e-4,
              2.713147742297996569e-4, -1.685694495989034396e-4, 1.053492815629967457e-4, -6.794591457811145994e-5,
              4.304759988628247638e-5, -2.147051962090806932e-5, 1.314843695064136691e-5, -1.854228380996208042e-5,
              1.217013938634337719e-5);
}

template <class T>
struct Rising {
  T value;  // lgamma(a + x) - lgamma(a) - x log a
  T slope;  // its derivative by log a: a [digamma(a + x) - digamma(a)] - x
};

// For 0 <= x <= 1 and a > 0, by Stirling; below a = 1 by a step of the recurrence. All terms are of the order of x.
// Errors 4e-7 (float), 1.6e-15 (double) of x + log(1 + x / a).
template <class T>
FASTELBO_HD Rising<T> rising(T x, T a) {
  const bool small = a < 1;
  const T b = small ? a + 1 : a, v = 1 / b, next = 1 / (b + x), u = x * v, step = -(u * next);  // next - v
  const LogRatio<T> ratio = log_ratio(1 + u, u);
  const T tails = with_stirling(v, [=](T middle, auto... c) {  // S(b + x) - S(b)
    const PolyPair<T> p = poly_pair(v - middle, next - middle, c...);
    return step * (p.value + next * p.quotient);
  });
  const T digammas = with_digamma(v, [=](T middle, auto... c) {  // D(b + x) - D(b)
    const PolyPair<T> p = poly_pair(v - middle, next - middle, c...);
    return step * ((v + next) * p.value + next * next * p.quotient);
  });
  const T inverse = 1 / a, quotient = x * inverse;
  const T recurrence = x * log_ratio(1 + inverse, inverse).log - log_ratio(1 + quotient, quotient).log;
  const T slope = a * ((small ? ratio.log : ratio.curve) - T(0.5) * step - digammas);
  return {b * ratio.curve + (x - T(0.5)) * ratio.log + tails + (small ? recurrence : T(0)),
          small ? slope + (x / (a + x) - x) : slope};
}

}  // namespace fastelbo::FASTELBO_ISA
