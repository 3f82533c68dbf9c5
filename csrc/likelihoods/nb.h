// Negative binomial with mean m = exp(l) and variance m + m^2 / theta, r = log theta.
//
// With f = (x - m) / (theta + m), and lgamma and digamma by Stirling (S and D as in math/special.h):
//   log p = theta log(1 + f) + x log(1 - theta f / x) - 1/2 log(2 pi x (x + theta) / theta)
//           + S(x + theta) - S(theta) - S(x)
//   d/dl  = theta f
//   d/dr  = theta [log(1 + f) - f - D(x + theta) + D(theta)] + x / (2 (x + theta))
// The logarithms are of (x + theta) / (m + theta) and of that times m / x. Their terms are of the size of the result
// for any theta: as it goes to infinity the Poisson is left (Loader 2000). At x = 0, log p = theta log(1 + f), and d/dr
// has its first term alone.
#pragma once

#include "likelihoods/counts.h"

namespace fastelbo::FASTELBO_ISA {

template <class T>
FASTELBO_HD T nb_mean(T l) {
  return exp_between(kLowestMean<T>, l, kMeanEdge<T>);
}
template <class T>
FASTELBO_HD T nb_theta(T r) {
  return exp_between(kFaintTheta<T>, r, kThetaEdge<T>);
}

struct NbZero {
  static constexpr int kSteps = 1, kWork = 3;
  enum { kTheta, kRatio, kF };

  template <int, class T>
  FASTELBO_HD static void step(const Element<T>& in, T* w) {
    const T mean = nb_mean(in.first), theta = nb_theta(in.second), inverse = 1 / (theta + mean);
    w[kTheta] = theta, w[kRatio] = theta * inverse, w[kF] = -(mean * inverse);
  }

  template <class T>
  FASTELBO_HD static Terms<T> terms(const Element<T>& in, const T* w) {
    const LogRatio<T> ratio = log_ratio(w[kRatio], w[kF]);
    const T theta = w[kTheta], excess = above(in.first, kMeanEdge<T>);
    const T d_x = ratio.log - (T(0.5) / theta + stirling(theta).digamma) + (in.first - excess) - digamma_of_next(T(0));
    return {.value = theta * (ratio.log - excess),
            .d_first = theta * w[kF],
            .d_second = in.second > kThetaEdge<T> ? T(0) : theta * (ratio.curve - excess),
            .d_x = d_x};
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
      w[kMean] = nb_mean(in.first), w[kTheta] = nb_theta(in.second);
      const T sum = w[kTheta] + w[kMean];  // two divisions: d/dr is as large as theta f where x is
      w[kRatio] = (x + w[kTheta]) / sum, w[kF] = (x - w[kMean]) / sum;
    } else if constexpr (kStep == 1) {
      const LogRatio<T> ratio = log_ratio(w[kRatio], w[kF]);
      w[kLog] = ratio.log, w[kCurve] = ratio.curve;
    } else if constexpr (kStep == 2) {
      const T mean = in.first < kFaint<T> ? exp_within(kFaint<T>) : w[kMean];
      const T log = log_ratio(w[kRatio] * (mean / x), -(w[kTheta] * w[kF]) / x).log;
      w[kValue] = w[kTheta] * w[kLog] + x * log;
    } else {
      const Stirling<T> of_theta = stirling(w[kTheta]);
      w[kValue] -= of_theta.tail, w[kCurve] += of_theta.digamma;
    }
  }

  template <class T>
  FASTELBO_HD static Terms<T> terms(const Element<T>& in, const T* w) {
    const T x = in.x, theta = w[kTheta], total = x + theta, excess = above(in.first, kMeanEdge<T>);
    const Stirling<T> of_total = stirling_of<kCount>(total);
    const T rest = of_total.tail - stirling_of<kCount>(x).tail - half_log_2pi(x * total / theta);
    const T cut = x * below(in.first, kFaint<T>) + below(in.second, kFaintTheta<T>) - theta * excess;
    const T d_x = w[kLog] - (T(0.5) / total + of_total.digamma) + (in.first - excess) - digamma_of_next(x);
    const T d_r = theta * (w[kCurve] - of_total.digamma - excess) + x / (2 * total);
    return of_count<kCount>(x, Terms<T>{.value = w[kValue] + (rest + cut),
                                        .d_first = theta * w[kF],
                                        .d_second = in.second > kThetaEdge<T> ? T(0) : d_r,
                                        .d_x = d_x});
  }
};

struct Nb : Counts<NbZero, NbOther> {
  static constexpr const char* name = "nb";
  static constexpr const char* parameters[] = {"log_mean", "log_theta"};
  static constexpr int kFewest = 2;
};

}  // namespace fastelbo::FASTELBO_ISA
