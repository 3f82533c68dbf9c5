// Poisson from the log rate l; m = exp(l):  log p = x l - m - lgamma(x + 1).
//
// With lgamma by Stirling, and g = (m - x) / x:  log p = x [log(1 + g) - g] - 1/2 log(2 pi x) - S(x), whose terms are
// of the size of the result (Loader 2000). At x = 0 it is -m.
#pragma once

#include "likelihoods/counts.h"

namespace fastelbo::FASTELBO_ISA {

struct PoissonZero {
  static constexpr int kSteps = 1, kWork = 1;
  enum { kMean };

  template <int, class T>
  FASTELBO_HD static void step(const Element<T>& in, T* w) {
    w[kMean] = exp_full(in.first);
  }

  template <class T>
  FASTELBO_HD static Terms<T> terms(const Element<T>& in, const T* w) {
    return {.value = -w[kMean], .d_first = -w[kMean], .d_x = in.first - digamma_of_next(T(0))};
  }
};

template <Count kCount>
struct PoissonOther {
  static constexpr int kSteps = 1, kWork = 2;
  enum { kMean, kRatio };

  template <int, class T>
  FASTELBO_HD static void step(const Element<T>& in, T* w) {
    w[kMean] = exp_full(in.first);
    w[kRatio] = (in.first < kFaint<T> ? exp_within(kFaint<T>) : w[kMean]) / in.x;  // a mean of 0 has no logarithm
  }

  template <class T>
  FASTELBO_HD static Terms<T> terms(const Element<T>& in, const T* w) {
    const T x = in.x, deviance = x * (log_ratio(w[kRatio], (w[kMean] - x) / x).curve + below(in.first, kFaint<T>));
    return of_count<kCount>(x, Terms<T>{.value = deviance - (half_log_2pi(x) + stirling_of<kCount>(x).tail),
                                        .d_first = x - w[kMean],
                                        .d_x = in.first - digamma_of_next(x)});
  }
};

struct Poisson : Counts<PoissonZero, PoissonOther> {
  static constexpr const char* name = "poisson";
  static constexpr const char* parameters[] = {"log_rate"};
};

}  // namespace fastelbo::FASTELBO_ISA
