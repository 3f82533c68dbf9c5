// The negative binomials of nb.h and zinb.h from the mean m and theta themselves. What in.added holds is added to both:
// scvi-tools computes with m + 1e-8 and theta + 1e-8.
//
// The gradients are by m and by theta: those by l = log m and r = log theta over m and theta, and at x = 0
//   d/dm = -theta / (theta + m),  d/dtheta = log(1 + f) - f, f = -m / (theta + m)
// theta counts as at most exp(40), as it does in nb.h, and m as at most kMeanLimit. Both may be 0.
#pragma once

#include "likelihoods/zinb.h"

namespace fastelbo::FASTELBO_ISA {

template <class T>
inline constexpr T kThetaLimit = T(235385266837019985.408);  // exp(kThetaEdge)
template <class T>
inline constexpr T kMeanLimit = sizeof(T) == 4 ? T(1e37) : T(1e300);

template <class T>
FASTELBO_HD T at_most(T x, T limit) {  // NaN stays, and is what a negative number is
  const T below = x > limit ? limit : x;
  return below < 0 ? T(__builtin_nan("")) : below;
}
template <class T>
FASTELBO_HD T normal(T x) {  // x >= 0, or the smallest normal number
  return x < Float<T>::kMinNormal ? Float<T>::kMinNormal : x;
}
template <class T>
FASTELBO_HD T mean_of(const Element<T>& in) {
  return at_most(in.p.first + in.added, kMeanLimit<T>);
}
template <class T>
FASTELBO_HD T theta_of(const Element<T>& in) {
  return at_most(in.p.second + in.added, kThetaLimit<T>);
}
// What a mean or theta adds to log p of x > 0, beyond the formula of positive ones: -inf where it is 0. By bits, since
// gcc vectorizes no loop over two such choices.
template <class T>
FASTELBO_HD T impossible(T t) {
  using U = typename Float<T>::UInt;
  return bits_to<T>(bits_to<U>(-T(__builtin_huge_val())) & U(-U(is_zero(t))));
}
// d/dtheta, which is 0 where theta counts as less than it is
template <class T>
FASTELBO_HD T within(T theta, T d_theta) {
  return theta > kThetaLimit<T> ? T(0) : d_theta;
}

// Beside x >= 1, m + theta is 0 if it lies below kNothing: log p depends on m / theta and is linear in log theta, and
// both are taken times kScale. So is m, in the logarithm of a ratio, where it is next to nothing beside theta.
template <class T>
inline constexpr T kNothing = sizeof(T) == 4 ? T(0x1p-90) : T(0x1p-500);
template <class T>
inline constexpr T kScale = sizeof(T) == 4 ? T(0x1p64) : T(0x1p440);
template <class T>
inline constexpr T kLogScale = T(0.69314718055994530942) * (sizeof(T) == 4 ? 64 : 440);

struct NbMeanZero {
  static constexpr int kSteps = 1, kWork = 3;
  enum { kTheta, kRatio, kF };

  template <int, class T>
  FASTELBO_HD static void step(const Element<T>& in, T* w) {
    const T mean = mean_of(in), theta = theta_of(in), inverse = 1 / normal(theta + mean);
    w[kTheta] = theta, w[kRatio] = theta * inverse, w[kF] = -(mean * inverse);
  }

  template <class T>
  FASTELBO_HD static Terms<T> terms(const Element<T>& in, const T* w) {
    const LogRatio<T> share = log_ratio(normal(w[kRatio]), w[kF]);
    const T theta = w[kTheta];
    const T psi = share.log - (T(0.5) / theta + stirling(theta).digamma);
    return {.value = theta * share.log,
            .d = {-w[kRatio], within(in.p.second + in.added, share.curve)},
            .d_x = psi + log_positive(normal(mean_of(in))) - digamma_of_next(T(0))};
  }
};

struct NbMeanSmall : NbMeanZero {
  template <class T>
  FASTELBO_HD static Terms<T> terms(const Element<T>& in, const T* w) {
    const T x = in.x, mean = mean_of(in), theta = normal(w[kTheta]), total = x + theta;
    const LogRatio<T> near = log_ratio(normal(w[kRatio]), w[kF]);
    const T l = log_positive(normal(mean)), far = log_positive(theta) - l;
    const bool faint = w[kRatio] < Float<T>::kMinNormal;
    const T share = faint ? far : near.log, curve = faint ? far - w[kF] : near.curve;
    const Rising<T> of_x = rising(x, theta);
    const T value = of_x.value - lgamma1p_unit(x) + (x * l + total * share);
    const T psi = log_positive(total) - (T(0.5) / total + stirling(total).digamma);
    const T odds = -w[kF], rare = l - log_positive(theta + mean);  // m / (theta + m)
    const T log_odds = odds < Float<T>::kMinNormal ? rare : log_ratio(odds, -w[kRatio]).log;
    return {.value = value + (impossible(mean) + impossible(w[kTheta])),
            .d = {w[kRatio] * (x - mean) / mean,
                  within(in.p.second + in.added, (of_x.slope + theta * curve - x * w[kF]) / theta)},
            .d_x = psi + log_odds - digamma_of_next(x)};
  }
};

struct NbMeanLarge {
  static constexpr int kSteps = NbFromOne::kSteps, kWork = NbFromOne::kOwn + 1;
  enum { kRaised = NbFromOne::kOwn };
  template <class T>
  FASTELBO_HD static bool nothing(const Element<T>& in) {
    return mean_of(in) + theta_of(in) < kNothing<T>;
  }

  template <int kStep, class T>
  FASTELBO_HD static void step(const Element<T>& in, T* w) {
    if constexpr (kStep == 0) {
      const T scale = nothing(in) ? kScale<T> : T(1), mean = scale * mean_of(in), theta = scale * normal(theta_of(in));
      NbFromOne::start(in.x, mean, theta, w);
      const bool faint = mean < theta / kScale<T>;
      w[NbFromOne::kMean] = faint ? mean * kScale<T> : mean;
      w[kRaised] = faint ? kLogScale<T> : T(0);
    } else {
      NbFromOne::step<kStep>(in.x, w, w[kRaised]);
    }
  }

  template <class T>
  FASTELBO_HD static Terms<T> terms(const Element<T>& in, const T* w) {
    const Terms<T> t = NbFromOne::terms(in.x, w);
    return {
        .value = t.value - (nothing(in) ? kLogScale<T> : T(0)) + (impossible(mean_of(in)) + impossible(theta_of(in))),
        .d = {t.d.first / mean_of(in), within(in.p.second + in.added, t.d.second / theta_of(in))},
        .d_x = t.d_x};
  }
};

struct NbMean : Counts<NbMeanZero, NbMeanSmall, NbMeanLarge> {
  static constexpr const char* name = "nb_mean";
  static constexpr const char* parameters[] = {"mean", "theta"};
  static constexpr int kFewest = 2;
  static constexpr bool kByElement = true;
};

struct ZinbMean : Counts<ZinbZero<NbMeanZero>, ZinbOther<NbMeanSmall>, ZinbOther<NbMeanLarge>> {
  static constexpr const char* name = "zinb_mean";
  static constexpr const char* parameters[] = {"mean", "theta", "zero_logits"};
  static constexpr int kFewest = 3;
  static constexpr bool kByElement = true;
};

}  // namespace fastelbo::FASTELBO_ISA
