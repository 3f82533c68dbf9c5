// Poisson of a rate that is Gamma of concentration a and rate b, as Pyro's: the negative binomial of theta = a and mean
// m = a / b, by nb_mean.h. With its derivatives,
//   d/db = -m / b d/dm,  d/da = d/dtheta + d/dm / b
// where the terms of f cancel: d/da is formed without them.
#pragma once

#include "likelihoods/nb_mean.h"

namespace fastelbo::FASTELBO_ISA {

template <class T>
FASTELBO_HD Element<T> by_mean(Element<T> in) {
  const T concentration = at_most(in.p.first, kThetaLimit<T>);
  in.p.first = concentration / at_most(in.p.second, T(__builtin_huge_val())), in.p.second = concentration;
  return in;
}
// d/da, d/db of the derivatives by a and by log m
template <class T>
FASTELBO_HD Terms<T> by_rate(const Element<T>& in, const Terms<T>& t, T d_a, T d_log_mean) {
  return {.value = t.value, .d = {within(in.p.first, d_a), -(d_log_mean / in.p.second)}, .d_x = t.d_x};
}

struct GammaPoissonZero : NbMeanZero {
  template <int kStep, class T>
  FASTELBO_HD static void step(const Element<T>& in, T* w) {
    NbMeanZero::step<kStep>(by_mean(in), w);
  }

  template <class T>
  FASTELBO_HD static Terms<T> terms(const Element<T>& in, const T* w) {
    const Terms<T> t = NbMeanZero::terms(by_mean(in), w);
    return by_rate(in, t, t.d.second + w[kF], w[kTheta] * w[kF]);
  }
};

struct GammaPoissonSmall : GammaPoissonZero {
  template <class T>
  FASTELBO_HD static Terms<T> terms(const Element<T>& in, const T* w) {
    const Terms<T> t = NbMeanSmall::terms(by_mean(in), w);
    const T d_log_mean = in.x * w[kRatio] + w[kTheta] * w[kF];
    return by_rate(in, t, t.d.second + d_log_mean / normal(w[kTheta]), d_log_mean);
  }
};

struct GammaPoissonLarge : NbMeanLarge {
  template <int kStep, class T>
  FASTELBO_HD static void step(const Element<T>& in, T* w) {
    NbMeanLarge::step<kStep>(by_mean(in), w);
    if constexpr (kStep == 1) w[NbFromOne::kCurve] = w[NbFromOne::kLog];
  }

  template <class T>
  FASTELBO_HD static Terms<T> terms(const Element<T>& in, const T* w) {
    const Terms<T> t = NbMeanLarge::terms(by_mean(in), w);
    return by_rate(in, t, t.d.second, w[NbFromOne::kTheta] * w[NbFromOne::kF]);
  }
};

struct GammaPoisson : Counts<GammaPoissonZero, GammaPoissonSmall, GammaPoissonLarge> {
  static constexpr const char* name = "gamma_poisson";
  static constexpr const char* parameters[] = {"concentration", "rate"};
  static constexpr int kFewest = 2;
  static constexpr bool kByElement = true;
};

}  // namespace fastelbo::FASTELBO_ISA
