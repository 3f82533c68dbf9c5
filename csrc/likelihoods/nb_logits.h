// Negative binomial of theta, the total count, and the logit l of a success, as torch's: its mean is theta exp(l). With
// s = sigmoid(l) and f as in nb.h,
//   d/dl = x (1 - s) - theta s,  d/dtheta = log(1 + f) - D(x + theta) + D(theta) + x / (2 theta (x + theta))
// At x = 0 they are those of log p = -theta softplus(l). Below x = 1
//   log p = rising(x, theta) - lgamma(x + 1) + x (log theta + l) - (x + theta) softplus(l)
#pragma once

#include "likelihoods/nb_mean.h"

namespace fastelbo::FASTELBO_ISA {

template <class T>
FASTELBO_HD T total_of(const Element<T>& in) {
  return at_most(in.p.first + in.added, kThetaLimit<T>);
}
// d/dtheta, NaN where theta is: at x = 0 the formula has no theta
template <class T>
FASTELBO_HD T by_total(const Element<T>& in, T d_theta) {
  const T theta = total_of(in);
  return theta == theta ? within(in.p.first + in.added, d_theta) : theta;
}

struct NbLogitsZero {
  static constexpr int kSteps = 1, kWork = 2;
  enum { kSigmoid, kSoftplus };

  template <int, class T>
  FASTELBO_HD static void step(const Element<T>& in, T* w) {
    const Sigmoid<T> success = sigmoid(in.p.second);
    w[kSigmoid] = success.value, w[kSoftplus] = success.softplus(in.p.second);
  }

  template <class T>
  FASTELBO_HD static Terms<T> terms(const Element<T>& in, const T* w) {
    const T theta = total_of(in), l = in.p.second;
    const T psi = log_positive(normal(theta)) - (T(0.5) / theta + stirling(theta).digamma);
    return {.value = -(theta * w[kSoftplus]),
            .d = {by_total(in, -w[kSoftplus]), -(theta * w[kSigmoid])},
            .d_x = psi - digamma_of_next(T(0)) + (l - w[kSoftplus])};
  }
};

struct NbLogitsSmall {
  static constexpr int kSteps = 0, kWork = 1;

  template <class T>
  FASTELBO_HD static Terms<T> terms(const Element<T>& in, const T*) {
    const T x = in.x, theta = normal(total_of(in)), total = x + theta, l = in.p.second;
    const Sigmoid<T> success = sigmoid(l);
    const T softplus = success.softplus(l);
    const Rising<T> of_x = rising(x, theta);
    const T value = of_x.value - lgamma1p_unit(x) + (x * (log_positive(theta) + l) - total * softplus);
    const T psi = log_positive(total) - (T(0.5) / total + stirling(total).digamma);
    return {.value = value + impossible(total_of(in)),
            .d = {by_total(in, (of_x.slope + x) / theta - softplus), x * success.rest - theta * success.value},
            .d_x = psi - digamma_of_next(x) + (l - softplus)};
  }
};

struct NbLogitsLarge {
  static constexpr int kSteps = NbFromOne::kSteps, kWork = NbFromOne::kOwn + 1;
  enum { kRaised = NbFromOne::kOwn };
  // exponentials are taken within; beyond, log p is linear in l
  template <class T>
  static constexpr T kEdge = sizeof(T) == 4 ? 60 : 300;

  template <class T>
  FASTELBO_HD static bool nothing(const Element<T>& in) {
    return total_of(in) < kNothing<T>;
  }

  template <int kStep, class T>
  FASTELBO_HD static void step(const Element<T>& in, T* w) {
    if constexpr (kStep == 0) {
      const T theta = (nothing(in) ? kScale<T> : T(1)) * normal(total_of(in));
      const T ratio = exp_within(clamped(-kEdge<T>, in.p.second, T(45)));
      NbFromOne::start(in.x, theta * ratio, theta, w);
      const bool faint = ratio < 1 / kScale<T>;
      w[NbFromOne::kMean] = theta * (faint ? ratio * kScale<T> : ratio);
      w[kRaised] = faint ? kLogScale<T> : T(0);
    } else {
      NbFromOne::step<kStep>(in.x, w, w[kRaised]);
      if constexpr (kStep == 1) w[NbFromOne::kCurve] = w[NbFromOne::kLog];
    }
  }

  template <class T>
  FASTELBO_HD static Terms<T> terms(const Element<T>& in, const T* w) {
    const Terms<T> t = NbFromOne::terms(in.x, w);
    const T theta = total_of(in), low = below(in.p.second, -kEdge<T>), high = above(in.p.second, T(45));
    const T cut = in.x * low - theta * high - (nothing(in) ? kLogScale<T> : T(0));
    return {.value = t.value + cut + impossible(theta),
            .d = {by_total(in, t.d.second / theta - high), t.d.first},
            .d_x = t.d_x + low};
  }
};

struct NbLogits : Counts<NbLogitsZero, NbLogitsSmall, NbLogitsLarge> {
  static constexpr const char* name = "nb_logits";
  static constexpr const char* parameters[] = {"total_count", "logits"};
  static constexpr int kFewest = 2;
  static constexpr bool kByElement = true;
};

}  // namespace fastelbo::FASTELBO_ISA
