// Beta-binomial: x of n trials whose probability is Beta(a, b); y = n - x, s = a + b.
//
// With g = (a y - b x) / (n + s), and lgamma and digamma by Stirling (S and D of math/special.h, R(z) = 1/(2 z) +
// D(z)),
//   log p = x c(q1) + y c(q2) + a c(q3) + b c(q4) - 1/2 log[2 pi x y / n  (1 + x / a) (1 + y / b) s / (n + s)]
//           + S(n) - S(x) - S(y) + S(x + a) - S(a) + S(y + b) - S(b) - S(n + s) + S(s)
//   q1 = (x + a) n / [x (n + s)] = 1 + g / x,   q2 = (y + b) n / [y (n + s)] = 1 - g / y
//   q3 = (x + a) s / [a (n + s)] = 1 - g / a,   q4 = (y + b) s / [b (n + s)] = 1 + g / b
//   d/da  = log q3 + R(a) - R(x + a) + R(n + s) - R(s),   d/db = log q4 + R(b) - R(y + b) + R(n + s) - R(s)
// c(q) = log q - (q - 1) is never positive: the four terms do not cancel, and the g, which they leave out, do so
// exactly. Where x or y is 0, the terms with it as a factor or in S are none, x y / n counts as 1, and one g is left.
//
// Below a = 1 the terms of S would be larger than log p. One success and one failure are taken out, where there are
// any:
//   log p(x, y; a, b) = log p(x - 1, y - 1; a + 1, b + 1) + log[a b n (n - 1) / (s (s + 1) x y)]
//                     = log p(x - 1, y; a + 1, b) + log[a n / (s x)], and likewise without a success
//
// The total n is data, a whole number, and has no gradient. log p is -inf where x > n.
#pragma once

#include "likelihoods/counts.h"

namespace fastelbo::FASTELBO_ISA {

// kWhole: of whole x. All arguments of S and D are then at least 1, or in pairs of equal ones.
template <bool kWhole>
struct BetaBinomialOf {
  static constexpr int kSteps = 11, kWork = 4;
  static constexpr bool kLong = true;
  enum { kValue, kFirst, kSecond, kLog };

  // What is left of the trials, and of the parameters beside them. No bool: gcc 12 vectorizes no loop over some of
  // them.
  template <class T>
  struct Left {
    T x, y, n, a, b, s, inverse, g;  // inverse = 1 / (n + s)
    T success, failure;              // 1 where one was taken out, else 0
    T inside;                        // 0 where x or y is 0, else 1
  };
  template <class T>
  FASTELBO_HD static Left<T> left(const Element<T>& in) {
    const T x = in.x, n = in.p.third, y = n > x ? n - x : T(0);
    const T a = positive(in.p.first), b = positive(in.p.second), s = a + b;
    Left<T> t;
    t.success = x >= 1 ? T(1) : T(0), t.failure = y >= 1 ? T(1) : T(0);
    const T taken = t.success + t.failure;
    t.x = x - t.success, t.y = y - t.failure, t.n = n - taken;
    t.a = a + t.success, t.b = b + t.failure, t.s = s + taken;
    t.inverse = 1 / (n + s), t.g = (t.a * t.inverse) * t.y - (t.b * t.inverse) * t.x;
    t.inside = t.x * t.y == 0 ? T(0) : T(1);
    return t;
  }
  template <class T>
  FASTELBO_HD static T positive(T a) {
    return a > 0 ? a : T(__builtin_nan(""));
  }
  template <class T>
  FASTELBO_HD static T or_1(T condition, T x) {
    return condition == 0 ? T(1) : x;
  }

  template <class T>
  FASTELBO_HD static bool takes(const Element<T>& in) {
    constexpr T kRounds = sizeof(T) == 4 ? T(0x1p23) : T(0x1p52);  // from it on all numbers are whole
    return in.x >= 0 && (in.x >= kRounds || (in.x + kRounds) - kRounds == in.x);
  }

  template <class T>
  FASTELBO_HD static Stirling<T> stirling_of(T z) {
    if constexpr (kWhole) return stirling_from_one(z < 1 ? T(1) : z);
    return stirling(z);
  }

  // log gamma(z + k) - log gamma(z) and the like: what Stirling's series adds for z, to sign times it, and to digamma.
  // 0 of equal ones: a compiler may fuse the last product of either into the difference.
  template <class T>
  FASTELBO_HD static void add_pair(T from, T to, T& value, T& slope) {
    const Stirling<T> of_from = stirling_of(from), of_to = stirling_of(to);
    value = to == from ? T(0) : of_to.tail - of_from.tail;
    slope = T(0.5) * ((to - from) / from / to) + (of_from.digamma - of_to.digamma);
  }

  template <int kStep, class T>
  FASTELBO_HD static void step(const Element<T>& in, T* w) {
    const Left<T> t = left(in);
    if constexpr (kStep == 0) {
      const T x = or_1(t.x, t.x), q = or_1(t.x, (1 + t.a / x) * (t.n * t.inverse)), f = t.x == 0 ? T(0) : t.g / x;
      w[kValue] = t.x * log_ratio(q, f).curve - (t.x == 0 ? t.g : T(0));
    } else if constexpr (kStep == 1) {
      const T y = or_1(t.y, t.y), q = or_1(t.y, (1 + t.b / y) * (t.n * t.inverse)), f = t.y == 0 ? T(0) : -(t.g / y);
      w[kValue] += t.y * log_ratio(q, f).curve + (t.y == 0 ? t.g : T(0));
    } else if constexpr (kStep == 2) {
      const LogRatio<T> q = log_ratio((1 + t.x / t.a) * (t.s * t.inverse), -(t.g / t.a));
      w[kValue] += t.a * q.curve, w[kFirst] = q.log;
    } else if constexpr (kStep == 3) {
      const LogRatio<T> q = log_ratio((1 + t.y / t.b) * (t.s * t.inverse), t.g / t.b);
      w[kValue] += t.b * q.curve, w[kSecond] = q.log;
    } else if constexpr (kStep == 4) {
      const T trials = T(6.2831853071795864769) * t.x * (t.y / t.n);
      const T log = log_positive(or_1(t.inside, trials * (1 + t.x / t.a) * (1 + t.y / t.b) * (t.s * t.inverse)));
      const T of_x = t.y == 0 ? w[kFirst] : log;
      w[kValue] -= T(0.5) * (t.x == 0 ? w[kSecond] : of_x);
    } else if constexpr (kStep == 5) {  // of what was taken out: of successes or failures alone it may be near 1
      const T x = in.x, n = in.p.third, y = t.y + t.failure, a = in.p.first, b = in.p.second, s = a + b;
      const T of_x = or_1(t.success, a / x), of_y = or_1(t.failure, b / y);
      const T second = or_1(t.success * t.failure, (n - 1) / (s + 1));
      const T q = of_x * of_y * (n / s) * second, kept = (x == 0 ? b : a) / s, lost = (x == 0 ? a : b) / s;
      const T log = log_ratio(x * y == 0 ? kept : q, x * y == 0 ? -lost : q - 1).log;
      w[kValue] += t.success + t.failure == 0 ? T(0) : log;
    } else if constexpr (kStep == 6) {
      w[kLog] = stirling_of(or_1(t.inside, t.n)).tail - stirling_of(or_1(t.inside, t.x)).tail;
    } else if constexpr (kStep == 7) {
      w[kValue] += t.inside == 0 ? T(0) : w[kLog] - stirling_of(or_1(t.inside, t.y)).tail;
    } else {
      T value, slope;
      if constexpr (kStep == 8) {
        add_pair(t.a, in.x + in.p.first, value, slope);
        w[kValue] += value, w[kFirst] += slope;
      } else if constexpr (kStep == 9) {
        add_pair(t.b, t.y + t.b, value, slope);
        w[kValue] += value, w[kSecond] += slope;
      } else {
        add_pair(t.s, in.p.third + (in.p.first + in.p.second), value, slope);
        w[kValue] -= value, w[kFirst] -= slope, w[kSecond] -= slope;
      }
    }
  }

  template <class T>
  FASTELBO_HD static Terms<T> terms(const Element<T>& in, const T* w) {
    const Left<T> t = left(in);
    const T x = in.x, n = in.p.third, a = in.p.first, b = in.p.second, s = a + b;
    const T both = -(1 / s + 1 / (s + 1));
    const T with_success = t.failure == 0 ? b / s / a : 1 / a + both,
            with_failure = t.success == 0 ? a / s / b : 1 / b + both;
    const T of_a = t.success == 0 ? -t.failure / s : with_success,
            of_b = t.failure == 0 ? -t.success / s : with_failure;
    const T y = n > x ? n - x : T(0), of_x = x + a, of_y = y + b;
    const T psi_x = log_positive(of_x) - (T(0.5) / of_x + stirling(of_x).digamma);
    const T psi_y = log_positive(of_y) - (T(0.5) / of_y + stirling(of_y).digamma);
    const Terms<T> found{.value = w[kValue],
                         .d = {w[kFirst] + of_a, w[kSecond] + of_b},
                         .d_x = (digamma_of_next(y) - digamma_of_next(x)) + (psi_x - psi_y)};
    return select(x > n, Terms<T>{.value = -T(__builtin_huge_val())}, found);
  }
};

struct BetaBinomial : Counts<BetaBinomialOf<true>, BetaBinomialOf<false>, BetaBinomialOf<true>> {
  static constexpr const char* name = "beta_binomial";
  static constexpr const char* parameters[] = {"concentration1", "concentration0", "total"};
  static constexpr int kFewest = 3;
  static constexpr bool kByElement = true;
  static constexpr int kData = 1;
};

}  // namespace fastelbo::FASTELBO_ISA
