// Poisson from the log rate l; m = exp(l):  log p = x l - m - lgamma(x + 1).
//
// From x = 1 on, with lgamma by Stirling and g = (m - x) / x:  log p = x [log(1 + g) - g] - 1/2 log(2 pi x) - S(x),
// whose terms are of the size of the result (Loader 2000). At x = 0 it is -m.
#pragma once

#include "likelihoods/counts.h"

namespace fastelbo::FASTELBO_ISA {

struct PoissonZero {
  static constexpr int kSteps = 1, kWork = 1;
  enum { kMean };

  template <int, class T>
  FASTELBO_HD static void step(const Element<T>& in, T* w) {
    w[kMean] = exp_full(in.p.first);
  }

  template <class T>
  FASTELBO_HD static Terms<T> terms(const Element<T>& in, const T* w) {
    return {.value = -w[kMean], .d = {-w[kMean]}, .d_x = in.p.first - digamma_of_next(T(0))};
  }
};

struct PoissonSmall : PoissonZero {
  template <class T>
  FASTELBO_HD static Terms<T> terms(const Element<T>& in, const T* w) {
    return {.value = in.x * in.p.first - (w[kMean] + lgamma1p_unit(in.x)),
            .d = {in.x - w[kMean]},
            .d_x = in.p.first - digamma_of_next(in.x)};
  }
};

struct PoissonLarge : PoissonZero {
  template <class T>
  FASTELBO_HD static Terms<T> terms(const Element<T>& in, const T* w) {
    const T x = in.x, mean = w[kMean], log_x = log_positive(x), log_ratio_of = in.p.first - log_x;
    const T curve = log_ratio(mean / x, (mean - x) / x).curve;
    // no mean beside x, whose quotient may be no normal number
    const T deviance = x * (log_ratio_of < -60 ? log_ratio_of + 1 : curve), log_2pi = T(1.8378770664093454836);
    return {.value = deviance - (T(0.5) * (log_x + log_2pi) + stirling_from_one(x).tail),
            .d = {x - mean},
            .d_x = in.p.first - digamma_of_next(x)};
  }
};

struct Poisson : Counts<PoissonZero, PoissonSmall, PoissonLarge> {
  static constexpr const char* name = "poisson";
  static constexpr const char* parameters[] = {"log_rate"};
};

}  // namespace fastelbo::FASTELBO_ISA
