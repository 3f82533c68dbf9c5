// Negative binomial with mean m = exp(l) and variance m + m^2 / theta, r = log theta.
//
// From x = 1 on, with f = (x - m) / (theta + m), and lgamma and digamma by Stirling (S and D as in math/special.h):
//   log p    = theta log(1 + f) + x log(1 - theta f / x) - 1/2 log(2 pi x (x + theta) / theta)
//              + S(x + theta) - S(theta) - S(x)
//   d/dl     = theta f
//   d/dtheta = log(1 + f) - f - D(x + theta) + D(theta) + x / (2 theta (x + theta));  d/dr = theta d/dtheta
// The logarithms are of (x + theta) / (m + theta) and of that times m / x. Their terms are of the size of the result
// for any theta: as it goes to infinity the Poisson is left (Loader 2000).
//
// Below x = 1 every term of
//   log p = rising(x, theta) - lgamma(x + 1) + x l - (x + theta) log(1 + m / theta)
// vanishes with x and m, as log p does. At x = 0 the last one is left.
#pragma once

#include "likelihoods/counts.h"

namespace fastelbo::FASTELBO_ISA {

// The range of l and r that exponentials are taken of. Beyond an edge log p is continued in a straight line.
//   kThetaEdge    above, the Poisson is left: it differs by x^2 / 2 theta
//   kMeanEdge     lies so far above kThetaEdge that log(1 + m / theta) is log(m / theta)
//   kLowest       below, theta or m is 0 next to anything
// The formula of x >= 1 takes quotients of them and of x, for which its range is shorter:
//   kNegligible   beside x >= 1, theta + m is 0 if both lie below: log p depends on m / theta and is linear in r
//   kFaintMean, kFaintTheta  below, it is 0 beside the other one, which is not negligible
template <class T>
inline constexpr T kThetaEdge = 40;
template <class T>
inline constexpr T kMeanEdge = sizeof(T) == 4 ? 58 : 80;
template <class T>
inline constexpr T kLowest = sizeof(T) == 4 ? -85 : -700;
template <class T>
inline constexpr T kNegligible = sizeof(T) == 4 ? -25 : -60;
template <class T>
inline constexpr T kFaintMean = sizeof(T) == 4 ? -45 : -100;
template <class T>
inline constexpr T kFaintTheta = sizeof(T) == 4 ? -60 : -150;

template <class T>
FASTELBO_HD T above(T log, T edge) {
  return log > edge ? log - edge : T(0);
}
template <class T>
FASTELBO_HD T below(T log, T edge) {
  return log < edge ? log - edge : T(0);
}

// log(theta / (theta + m)), and that less f = -m / (theta + m), from the ratio and f
template <class T>
FASTELBO_HD LogRatio<T> nb_share(T l, T r, T ratio, T f) {
  const LogRatio<T> near = log_ratio(ratio, f);
  const T excess = above(l, kMeanEdge<T>), log = clamped(kLowest<T>, r, kThetaEdge<T>) - l;
  const bool far = log < -80;  // the ratio is theta / m, which may be no normal number
  return {far ? log : near.log - excess, far ? log - f : near.curve - excess};
}

struct NbZero {
  static constexpr int kSteps = 1, kWork = 3;
  enum { kTheta, kRatio, kF };

  template <int, class T>
  FASTELBO_HD static void step(const Element<T>& in, T* w) {
    const T mean = exp_within(clamped(kLowest<T>, in.p.first, kMeanEdge<T>));
    const T theta = exp_within(clamped(kLowest<T>, in.p.second, kThetaEdge<T>)), inverse = 1 / (theta + mean);
    w[kTheta] = theta, w[kRatio] = theta * inverse, w[kF] = -(mean * inverse);
  }

  template <class T>
  FASTELBO_HD static Terms<T> terms(const Element<T>& in, const T* w) {
    const LogRatio<T> share = nb_share(in.p.first, in.p.second, w[kRatio], w[kF]);
    const T theta = w[kTheta];
    const T d_x = share.log - (T(0.5) / theta + stirling(theta).digamma) + in.p.first - digamma_of_next(T(0));
    return {.value = theta * share.log,
            .d = {theta * w[kF], in.p.second > kThetaEdge<T> ? T(0) : theta * share.curve},
            .d_x = d_x};
  }
};

struct NbSmall : NbZero {
  template <class T>
  FASTELBO_HD static Terms<T> terms(const Element<T>& in, const T* w) {
    const T x = in.x, l = in.p.first, theta = w[kTheta], total = x + theta;
    const T r = clamped(kLowest<T>, in.p.second, kThetaEdge<T>);
    const LogRatio<T> share = nb_share(l, in.p.second, w[kRatio], w[kF]);
    const Rising<T> of_x = rising(x, theta);
    const T value = of_x.value - lgamma1p_unit(x) + (x * l + total * share.log);
    const T psi = log_positive(total) - (T(0.5) / total + stirling(total).digamma);
    return {.value = value + below(in.p.second, kLowest<T>),
            .d = {x * w[kRatio] + theta * w[kF],
                  in.p.second > kThetaEdge<T> ? T(0) : of_x.slope + theta * share.curve - x * w[kF]},
            .d_x = psi + (l - r + share.log) - digamma_of_next(x)};
  }
};

// From x = 1 on, from m and theta: by nb.h from their logarithms, by nb_mean.h from themselves. A formula's first step
// calls start(), the others are those here.
struct NbFromOne {
  static constexpr int kSteps = 4;
  enum { kTheta, kF, kMean, kRatio, kValue = kRatio, kCurve, kLog, kOwn };

  template <class T>
  FASTELBO_HD static void start(T x, T mean, T theta, T* w) {
    const T sum = theta + mean;  // two divisions: d/dr is as large as theta f where x is
    w[kTheta] = theta, w[kMean] = mean, w[kRatio] = (x + theta) / sum, w[kF] = (x - mean) / sum;
  }

  // raised: w[kMean] is the mean times exp(raised), which is far below theta
  template <int kStep, class T>
  FASTELBO_HD static void step(T x, T* w, T raised = 0) {
    if constexpr (kStep == 1) {
      const LogRatio<T> ratio = log_ratio(w[kRatio], w[kF]);
      w[kLog] = ratio.log, w[kCurve] = ratio.curve;
    } else if constexpr (kStep == 2) {
      const T ratio = w[kRatio] * (w[kMean] / x), f = -(w[kTheta] * w[kF]) / x;
      const T log = log_ratio(ratio, raised == 0 ? f : ratio - 1).log - raised;
      w[kValue] = w[kTheta] * w[kLog] + x * log, w[kLog] = log;
    } else {
      const Stirling<T> of_theta = stirling(w[kTheta]);
      w[kValue] -= of_theta.tail, w[kCurve] += of_theta.digamma;
    }
  }

  // value; d/dl; d/dtheta times theta; d_x
  template <class T>
  FASTELBO_HD static Terms<T> terms(T x, const T* w) {
    const T theta = w[kTheta], total = x + theta;
    const Stirling<T> of_total = stirling_from_one(total);
    const bool tiny = theta < T(0x1p-30);  // x^2 / theta may overflow
    const T square = x * (total / (tiny ? theta * T(0x1p60) : theta));
    const T halves = half_log_2pi(square) + (tiny ? T(20.794415416798359283) : T(0));  // 30 log 2
    const T rest = of_total.tail - stirling_from_one(x).tail - halves;
    // digamma(x + theta) - digamma(x + 1) + log(m / (m + theta)); the logarithms as one and log(x / (x + 1))
    const T next = x + 1, of_next = T(0.5) / next + stirling_from_one(next).digamma;
    const T d_x = w[kLog] + log_ratio(x / next, -1 / next).log + of_next - (T(0.5) / total + of_total.digamma);
    return {.value = w[kValue] + rest,
            .d = {theta * w[kF], theta * (w[kCurve] - of_total.digamma) + x / (2 * total)},
            .d_x = d_x};
  }
};

struct NbLarge {
  static constexpr int kSteps = NbFromOne::kSteps, kWork = NbFromOne::kOwn + 2;
  enum { kL = NbFromOne::kOwn, kR };

  template <class T>
  FASTELBO_HD static T larger(const Element<T>& in) {  // finite: that of two -inf has no difference
    const T top = in.p.first > in.p.second ? in.p.first : in.p.second, lowest = T(-1e30f);
    return top < lowest ? lowest : top;
  }

  template <int kStep, class T>
  FASTELBO_HD static void step(const Element<T>& in, T* w) {
    if constexpr (kStep == 0) {
      const T top = larger(in), edge = kNegligible<T>;
      const bool raised = top < edge;  // both are, and keep their difference, which is exact where it is small
      w[kL] = raised ? (in.p.first - top) + edge : in.p.first;
      w[kR] = raised ? (in.p.second - top) + edge : in.p.second;
      NbFromOne::start(in.x, exp_within(clamped(kFaintMean<T>, w[kL], kMeanEdge<T>)),
                       exp_within(clamped(kFaintTheta<T>, w[kR], kThetaEdge<T>)), w);
    } else {
      NbFromOne::step<kStep>(in.x, w);
    }
  }

  template <class T>
  FASTELBO_HD static Terms<T> terms(const Element<T>& in, const T* w) {
    const Terms<T> t = NbFromOne::terms(in.x, w);
    const T lost = below(w[kL], kFaintMean<T>), beyond = w[NbFromOne::kTheta] * above(in.p.first, kMeanEdge<T>);
    const T cut = in.x * lost + below(w[kR], kFaintTheta<T>) + below(larger(in), kNegligible<T>) - beyond;
    return {.value = t.value + cut,
            .d = {t.d.first, in.p.second > kThetaEdge<T> ? T(0) : t.d.second - beyond},
            .d_x = t.d_x + lost};
  }
};

struct Nb : Counts<NbZero, NbSmall, NbLarge> {
  static constexpr const char* name = "nb";
  static constexpr const char* parameters[] = {"log_mean", "log_theta"};
  static constexpr int kFewest = 2;
};

}  // namespace fastelbo::FASTELBO_ISA
