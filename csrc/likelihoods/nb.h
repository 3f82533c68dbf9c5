// Negative binomial with mean m = exp(l) and variance m + m^2 / theta, r = log theta.
//
// With f = (x - m) / (theta + m), g = (m - x) / x, and lgamma and digamma by Stirling (S and D as in math/special.h):
//   log p = (x + theta) log(1 + f) + x log(1 + g) - 1/2 log(2 pi x (x + theta) / theta) + S(x + theta) - S(theta) -
//   S(x) d/dl  = theta f d/dr  = theta [log(1 + f) - f - D(x + theta) + D(theta)] + x / (2 (x + theta))
// No difference cancels, for any theta: as it goes to infinity the Poisson is left (Loader 2000). At x = 0,
// log p = theta log(1 + f), and d/dr has its first term alone.
#pragma once

#include "likelihoods/counts.h"

namespace fastelbo::FASTELBO_ISA {

struct NbZero {
  static constexpr int kSteps = 1, kWork = 3;
  enum { kTheta, kRatio, kF };

  template <int, class T>
  FASTELBO_HD static void step(const Element<T>& in, T* w) {
    const T mean = exp_within_edges(in.first), theta = exp_within_edges(in.second), inverse = 1 / (theta + mean);
    w[kTheta] = theta, w[kRatio] = theta * inverse, w[kF] = -(mean * inverse);
  }

  template <class T>
  FASTELBO_HD static Terms<T> terms(const Element<T>& in, const T* w) {
    const LogRatio<T> ratio = log_ratio(w[kRatio], w[kF]);
    const T above = above_edge(in.first), theta = w[kTheta];
    const T d_x = ratio.log - (T(0.5) / theta + stirling(theta).digamma) + (in.first - above) - digamma_of_next(T(0));
    return {
        .value = theta * (ratio.log - above), .d_first = theta * w[kF], .d_second = theta * ratio.curve, .d_x = d_x};
  }
};

template <Count kCount>
struct NbOther {
  static constexpr int kSteps = 4, kWork = 6;
  enum { kTheta, kF, kMean, kRatio, kValue = kRatio, kCurve, kLog };

  template <int kStep, class T>
  FASTELBO_HD static void step(const Element<T>& in, T* w) {
    const T x = in.x;
    if constexpr (kStep == 0) {
      w[kMean] = exp_within_edges(in.first), w[kTheta] = exp_within_edges(in.second);
      const T inverse = 1 / (w[kTheta] + w[kMean]);
      w[kRatio] = (x + w[kTheta]) * inverse, w[kF] = (x - w[kMean]) * inverse;
    } else if constexpr (kStep == 1) {
      const LogRatio<T> ratio = log_ratio(w[kRatio], w[kF]);
      w[kLog] = ratio.log, w[kCurve] = ratio.curve, w[kValue] = (x + w[kTheta]) * ratio.log;
    } else if constexpr (kStep == 2) {
      w[kValue] += x * log_ratio(w[kMean] / x, (w[kMean] - x) / x).log;
    } else {
      const Stirling<T> of_theta = stirling(w[kTheta]);
      w[kValue] -= of_theta.tail, w[kCurve] += of_theta.digamma;
    }
  }

  template <class T>
  FASTELBO_HD static Terms<T> terms(const Element<T>& in, const T* w) {
    const T x = in.x, theta = w[kTheta], total = x + theta, above = above_edge(in.first);
    const Stirling<T> of_total = stirling_of<kCount>(total);
    const T rest = of_total.tail - stirling_of<kCount>(x).tail - half_log_2pi(x * total / theta);
    const T cut = x * below_edge(in.first) + below_edge(in.second) - theta * above;
    const T d_x = w[kLog] - (T(0.5) / total + of_total.digamma) + (in.first - above) - digamma_of_next(x);
    return of_count<kCount>(x, Terms<T>{.value = w[kValue] + (rest + cut),
                                        .d_first = theta * w[kF],
                                        .d_second = theta * (w[kCurve] - of_total.digamma) + x / (2 * total),
                                        .d_x = d_x});
  }
};

struct Nb : Counts<NbZero, NbOther> {
  static constexpr const char* name = "nb";
  static constexpr const char* parameters[] = {"log_mean", "log_theta"};
  static constexpr int kFewest = 2;
};

}  // namespace fastelbo::FASTELBO_ISA
