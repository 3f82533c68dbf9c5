// What the likelihoods of counts share: x = 0, 0 < x < 1 and other x have formulas of their own, in steps.
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

// Whether the formula of large counts takes this one.
template <class Large, class T>
FASTELBO_HD bool takes(const Element<T>& in) {
  if constexpr (requires { Large::takes(in); }) return Large::takes(in);
  return in.x >= 1;
}

// t if x is a count
template <class T>
FASTELBO_HD Terms<T> of_count(T x, const Terms<T>& t) {
  const T inf = T(__builtin_huge_val());
  return select(x < 0 || x == inf, Terms<T>{.value = -inf}, t);
}

// Of any x other than 0: by Large where it takes x, which is from 1 on unless it says so, else by Small.
template <class Small, class Large>
struct Either {
  static constexpr int kSteps = Small::kSteps + Large::kSteps, kWork = Small::kWork + Large::kWork;

  template <int kStep, class T>
  FASTELBO_HD static void step(const Element<T>& in, T* w) {
    if constexpr (kStep < Small::kSteps) {
      Small::template step<kStep>(in, w);
    } else {
      Large::template step<kStep - Small::kSteps>(in, w + Small::kWork);
    }
  }

  template <class T>
  FASTELBO_HD static Terms<T> terms(const Element<T>& in, const T* w) {
    return of_count(in.x, select(takes<Large>(in), Large::terms(in, w + Small::kWork), Small::terms(in, w)));
  }
};

#if defined(__CUDA_ARCH__)
template <class Formula, class T>
__device__ __noinline__ Terms<T> called(const Element<T>& in) {
  return run<Formula>(in);
}
template <class Formula, class T>
__device__ Terms<T> on_device(const Element<T>& in) {
  if constexpr (requires { Formula::kLong; }) return called<Formula>(in);
  return run<Formula>(in);
}
#endif

// A likelihood of the formulas of x = 0, of 0 < x < 1, which no whole count is, and of finite x >= 1.
template <class ZeroFormula, class Small, class LargeFormula>
struct Counts : Defaults {
  static constexpr Domain kDomain = Domain::counts;
  static constexpr bool kZeros = true, kLong = requires { LargeFormula::kLong; };
  using Zero = ZeroFormula;
  using Large = LargeFormula;
  using Other = Either<Small, Large>;

  template <class T>
  FASTELBO_HD static Terms<T> terms_of(const Element<T>& in) {
#if defined(__CUDA_ARCH__)
    if (in.x == 0) return on_device<Zero>(in);  // branches: the registers of one formula at a time
    return of_count(in.x, takes<Large>(in) ? on_device<Large>(in) : on_device<Small>(in));
#else
    return select(in.x == 0, run<Zero>(in), run<Other>(in));
#endif
  }
};

// sigmoid(l), its complement, and log(1 + exp(-|l|))
template <class T>
struct Sigmoid {
  T value, rest, log;

  FASTELBO_HD T softplus(T l) const { return (l > 0 ? l : T(0)) + log; }  // log(1 + exp(l))
};
template <class T>
FASTELBO_HD Sigmoid<T> sigmoid(T l) {
  const T e = exp_nonpositive(minus_abs(l)), high = 1 / (1 + e), low = e * high;
  return {l >= 0 ? high : low, l >= 0 ? low : high, log1p_unit(e)};
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

}  // namespace fastelbo::FASTELBO_ISA
