// Mixture of two negative binomials of one theta, by nb_mean.h, with a the log p of the first, b that of the second and
// l the mixture logit:
//   log p = log[s exp(a) + (1 - s) exp(b)], s = sigmoid(l)
// The first has the responsibility w = sigmoid(u), u = l + a - b. With t = a - b,
//   d/dl = w - s = s (1 - s) (exp(t) - 1) / (s exp(t) + 1 - s)
// the last of which loses no digit near t = 0. Far from it the difference is taken, of the complements where both
// are near 1.
#pragma once

#include "likelihoods/nb_mean.h"

namespace fastelbo::FASTELBO_ISA {

template <class Nb>
struct NbMixtureOf {
  static constexpr int kSteps = 2 * Nb::kSteps + 1, kWork = 2 * Nb::kWork + 4;
  static constexpr bool kLong = true;
  enum { kValue = 2 * Nb::kWork, kFirst, kSecond, kLogit };

  template <class T>
  FASTELBO_HD static Element<T> component(const Element<T>& in, bool second) {
    return {{second ? in.p.second : in.p.first, in.p.third}, in.x, in.added};
  }

  template <int kStep, class T>
  FASTELBO_HD static void step(const Element<T>& in, T* w) {
    if constexpr (kStep < Nb::kSteps) {
      Nb::template step<kStep>(component(in, false), w);
    } else if constexpr (kStep < 2 * Nb::kSteps) {
      Nb::template step<kStep - Nb::kSteps>(component(in, true), w + Nb::kWork);
    } else {
      const T a = Nb::terms(component(in, false), w).value, b = Nb::terms(component(in, true), w + Nb::kWork).value;
      const T l = in.p.fourth, t = a == b ? T(0) : a - b, u = l + t;  // both may be -inf
      const Sigmoid<T> prior = sigmoid(l), posterior = sigmoid(u);
      const ExpPair<T> e = exp_and_expm1(minus_abs(t));
      const T odds = t > 0 ? prior.value + prior.rest * e.exp : prior.rest + prior.value * e.exp;
      const T near = with_sign_of(t, -(prior.value * prior.rest * e.expm1)) / odds;
      const T far = l > 0 ? prior.rest - posterior.rest : posterior.value - prior.value;
      // log of the prior and of the likelihood of the more probable one
      const T log_prior = -((u >= 0 ? (l < 0 ? -l : T(0)) : (l > 0 ? l : T(0))) + prior.log);
      w[kValue] = (u >= 0 ? a : b) + log_prior + posterior.log;
      w[kFirst] = posterior.value, w[kSecond] = posterior.rest;
      w[kLogit] = abs_of(t) < 1 ? near : far;
    }
  }

  template <class T>
  FASTELBO_HD static Terms<T> terms(const Element<T>& in, const T* w) {
    const Terms<T> a = Nb::terms(component(in, false), w), b = Nb::terms(component(in, true), w + Nb::kWork);
    const T first = w[kFirst], second = w[kSecond];
    const T of_a = first == 0 ? T(0) : first * a.d.first, of_b = second == 0 ? T(0) : second * b.d.first;
    const T theta = (first == 0 ? T(0) : first * a.d.second) + (second == 0 ? T(0) : second * b.d.second);
    return {.value = w[kValue], .d = {of_a, of_b, theta, w[kLogit]}, .d_x = first * a.d_x + second * b.d_x};
  }
};

struct NbMixture : Counts<NbMixtureOf<NbMeanZero>, NbMixtureOf<NbMeanSmall>, NbMixtureOf<NbMeanLarge>> {
  static constexpr const char* name = "nb_mixture";
  static constexpr const char* parameters[] = {"mean1", "mean2", "theta", "mixture_logits"};
  static constexpr int kFewest = 4;
  static constexpr bool kByElement = true;
};

}  // namespace fastelbo::FASTELBO_ISA
