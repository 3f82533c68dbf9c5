// What the likelihoods of counts share: zeros and other counts have formulas of their own, in steps.
//
// x may be fractional. log p is -inf, with a gradient of 0, where x is negative or infinite, and NaN where x is.
//
// A formula is a struct with
//   kWork                             numbers that a step leaves to the next ones
//   step<i>(in, w), i < kSteps        the steps, which read and write w
//   terms(in, w) -> Terms             the last step
// Each step is one exponential or logarithm and what depends on it. In one piece the formula is a chain of some 250
// cycles, longer than the processor's window: the CPU runs every step over a block of elements before the next.
#pragma once

#include "likelihoods/terms.h"
#include "math/special.h"

namespace fastelbo::FASTELBO_ISA {

template <class T>
struct Element {
  T first, second, third, x;
};

template <class Formula, int kStep = 0, class T>
FASTELBO_HD Terms<T> run_steps(const Element<T>& in, T* w) {
  if constexpr (kStep < Formula::kSteps) {
    Formula::template step<kStep>(in, w);
    return run_steps<Formula, kStep + 1>(in, w);
  } else {
    return Formula::terms(in, w);
  }
}
template <class Formula, class T>
FASTELBO_HD Terms<T> run(const Element<T>& in) {
  T w[Formula::kWork] = {};
  return run_steps<Formula>(in, w);
}

// What is known of an x that is not 0. A whole one is at least 1: lgamma(x) takes no recurrence there.
enum class Count { any, from_one };

// A likelihood of the formulas Zero, of x = 0, and Other<Count>.
template <class ZeroFormula, template <Count> class OtherFormula>
struct Counts : Defaults {
  static constexpr Domain kDomain = Domain::counts;
  static constexpr bool kZeros = true;
  using Zero = ZeroFormula;
  template <Count kCount>
  using Other = OtherFormula<kCount>;

  template <class T>
  FASTELBO_HD static Terms<T> eval(T first, T x, T) {
    return at(Element<T>{first, T(0), T(0), x});
  }
  template <class T>
  FASTELBO_HD static Terms<T> eval(T first, T second, T x, T) {
    return at(Element<T>{first, second, T(0), x});
  }
  template <class T>
  FASTELBO_HD static Terms<T> eval(T first, T second, T third, T x, T) {
    return at(Element<T>{first, second, third, x});
  }

 private:
  template <class T>
  FASTELBO_HD static Terms<T> at(const Element<T>& in) {
#if defined(__CUDA_ARCH__)
    return in.x == 0 ? run<Zero>(in) : run<Other<Count::any>>(in);  // a branch: the registers of one formula at a time
#else
    return select(in.x == 0, run<Zero>(in), run<Other<Count::any>>(in));
#endif
  }
};

// t if x is a count
template <Count kCount, class T>
FASTELBO_HD Terms<T> of_count(T x, const Terms<T>& t) {
  if constexpr (kCount == Count::from_one) {
    return t;
  } else {
    const T inf = T(__builtin_huge_val());
    return select(x < 0 || x == inf, Terms<T>{.value = -inf}, t);
  }
}

template <Count kCount, class T>
FASTELBO_HD Stirling<T> stirling_of(T a) {
  if constexpr (kCount == Count::from_one) {
    return stirling_from_one(a);
  } else {
    return stirling(a);
  }
}

// digamma(x + 1), x >= 0
template <class T>
FASTELBO_HD T digamma_of_next(T x) {
  const T a = x + 1;
  return log_positive(a) - (T(0.5) / a + stirling_from_one(a).digamma);
}

// 1/2 log(2 pi a)
template <class T>
FASTELBO_HD T half_log_2pi(T a) {
  return T(0.5) * log_positive(T(6.2831853071795864769) * a);
}

// Logarithms beyond an edge count as that at the edge, and log p is continued in a straight line, so that ratios of two
// exponentials are normal numbers:
//   of theta  above, the Poisson is left: it differs by x^2 / 2 theta; below, theta is 0 next to anything
//   of means  kMeanEdge lies so far above kThetaEdge that log(1 + m / theta) is log(m / theta); kFaint: no mean beside
//   x
template <class T>
inline constexpr T kThetaEdge = 40;
template <class T>
inline constexpr T kFaintTheta = sizeof(T) == 4 ? -25 : -60;
template <class T>
inline constexpr T kMeanEdge = sizeof(T) == 4 ? 58 : 80;
template <class T>
inline constexpr T kLowestMean = sizeof(T) == 4 ? -85 : -700;
template <class T>
inline constexpr T kFaint = -60;

template <class T>
FASTELBO_HD T exp_between(T low, T log, T high) {
  const T below = log > high ? high : log;
  return exp_within(below < low ? low : below);
}
template <class T>
FASTELBO_HD T above(T log, T edge) {
  return log > edge ? log - edge : T(0);
}
template <class T>
FASTELBO_HD T below(T log, T edge) {
  return log < edge ? log - edge : T(0);
}

}  // namespace fastelbo::FASTELBO_ISA
