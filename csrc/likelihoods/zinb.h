// Zero-inflated negative binomial: 0 with probability s = sigmoid(pi), pi the zero logit, else that of nb.h.
//   x > 0:  log p = log sigmoid(-pi) + nb
//   x = 0:  log p = log q, q = s + (1 - s) E, E = exp(n), n the nb at 0;  d/dn = (1 - s) E / q,
//           d/dpi = s (1 - s) (1 - E) / q
// 1 - q = (1 - s) (1 - E) is a product: no digit is lost where q is near 1. Where s and E both vanish, the larger of
// their logarithms is taken out first, down to exp(-40), beside which 1 - s is 1.
#pragma once

#include "likelihoods/nb.h"

namespace fastelbo::FASTELBO_ISA {

template <class NbZero>
struct ZinbZero {
  static constexpr int kSteps = NbZero::kSteps + 2, kWork = 7;
  enum { kShift, kQ, kBelow, kFirst, kSecond, kThird, kWeight };
  static_assert(NbZero::kWork <= kWork);

  template <int kStep, class T>
  FASTELBO_HD static void step(const Element<T>& in, T* w) {
    if constexpr (kStep < NbZero::kSteps) {
      NbZero::template step<kStep>(in, w);
    } else if constexpr (kStep == NbZero::kSteps) {
      const Terms<T> nb = NbZero::terms(in, w);
      w[kShift] = nb.value, w[kFirst] = nb.d.first, w[kSecond] = nb.d.second;
    } else {
      const T value = w[kShift], pi = in.p.third, shift = below(value > pi ? value : pi, T(-40)), logit = pi - shift;
      const T e = exp_nonpositive(minus_abs(logit)), norm = 1 / (1 + e);
      const T a = logit >= 0 ? T(1) : e, b = logit >= 0 ? e : T(1);  // s = a norm, 1 - s = b norm
      const ExpPair<T> n = exp_and_expm1(value - shift);
      const T q = a + b * n.exp, inverse = 1 / q, weight = b * n.exp * inverse;
      w[kShift] = shift, w[kQ] = q * norm, w[kBelow] = (b * norm) * n.expm1;
      w[kFirst] *= weight, w[kSecond] *= weight, w[kThird] = -(a * w[kBelow] * inverse), w[kWeight] = weight;
    }
  }

  template <class T>
  FASTELBO_HD static Terms<T> terms(const Element<T>& in, const T* w) {
    return {.value = w[kShift] + log_ratio(w[kQ], w[kBelow]).log,
            .d = {w[kFirst], w[kSecond], w[kThird]},
            .d_x = w[kWeight] * run<NbZero>(in).d_x};
  }
};

template <class Nb>
struct ZinbOther {
  static constexpr int kSteps = Nb::kSteps + 1, kWork = Nb::kWork + 2;
  enum { kLogRest = Nb::kWork, kThird };

  template <int kStep, class T>
  FASTELBO_HD static void step(const Element<T>& in, T* w) {
    if constexpr (kStep < Nb::kSteps) {
      Nb::template step<kStep>(in, w);
    } else {
      const T pi = in.p.third, e = exp_nonpositive(minus_abs(pi)), tail = e / (1 + e);
      w[kLogRest] = -((pi > 0 ? pi : T(0)) + log1p_unit(e));  // log sigmoid(-pi)
      w[kThird] = pi >= 0 ? tail - 1 : -tail;
    }
  }

  template <class T>
  FASTELBO_HD static Terms<T> terms(const Element<T>& in, const T* w) {
    const Terms<T> nb = Nb::terms(in, w);
    const T value = w[kLogRest] + nb.value;
    const bool poisoned = value != value;  // NaN in any of them is NaN in all gradients, as that of a zero is
    return {.value = value,
            .d = {poisoned ? value : nb.d.first, poisoned ? value : nb.d.second, poisoned ? value : w[kThird]},
            .d_x = poisoned ? value : nb.d_x};
  }
};

struct Zinb : Counts<ZinbZero<NbZero>, ZinbOther<NbSmall>, ZinbOther<NbLarge>> {
  static constexpr const char* name = "zinb";
  static constexpr const char* parameters[] = {"log_mean", "log_theta", "zero_logits"};
  static constexpr int kFewest = 3;
};

}  // namespace fastelbo::FASTELBO_ISA
