// Student's t from the mean m, the log scale s and the logarithm r of the degrees of freedom nu:
//   log p = lgamma((nu + 1) / 2) - lgamma(nu / 2) - 1/2 log(nu pi) - s - (nu + 1) / 2 log(1 + q),
// with t = (x - m) exp(-s) and q = t^2 / nu. By rising(1/2, nu / 2) no two lgammas are subtracted: the first three
// terms are that and -1/2 log 2 pi. With the share q / (1 + q):
//   d/dm = (nu + 1) share / (x - m),  d/ds = (nu + 1) share - 1
//   d/dr = the slope of rising + nu / 2 [share - log(1 + q)] + 1/2 share
// As nu goes to infinity the Gaussian is left, and every term of d/dr vanishes. Where the share is small,
//   d/dm = (1 + 1 / nu) t exp(-s) / (1 + q)
#pragma once

#include "likelihoods/terms.h"
#include "math/special.h"

namespace fastelbo::FASTELBO_ISA {

struct StudentT : Defaults {
  static constexpr const char* name = "student_t";
  static constexpr const char* parameters[] = {"mean", "log_scale", "log_df"};
  static constexpr int kFewest = 3;
  static constexpr bool kShares = true;

  template <class T>
  FASTELBO_HD static T shared(T, T s, T) {
    return exp_full(T(-0.5) * s);  // twice a factor: exp(-s) overflows where t does not
  }

  template <class T>
  FASTELBO_HD static Terms<T> eval(T m, T s, T r, T x, T inverse_root) {
    const T edge = 80, bounded = clamped(-edge, r, edge);  // beyond, log p hardly changes
    const T df = exp_within(bounded), inverse_df = 1 / df;
    const T delta = x - m, distance = abs_of(delta);
    const T t = times(times(delta, inverse_root), inverse_root), q = t * inverse_df * t;
    const bool far = q > T(0x1p60);  // beside q, 1 is 0, and q may overflow: its logarithm is that of its factors
    const T rest = 1 / (1 + q), share = far ? T(1) : q * rest;
    const LogRatio<T> log = log_ratio(far ? distance : rest, far ? distance - 1 : -share);
    const T log_distance = distance == T(__builtin_huge_val()) ? distance : log.log;
    const T log_rest = far ? 2 * (s - log_distance) + bounded : log.log;  // -log(1 + q)
    const T curve = far ? 1 + log_rest : log.curve;                       // share - log(1 + q)
    const Rising<T> of_half = rising(T(0.5), T(0.5) * df);
    const T half_log_2pi = T(0.91893853320467274178);
    const T near_slope = times(times(t * (1 + inverse_df) * rest, inverse_root), inverse_root);
    const T slope = q >= 1 ? (df + 1) * share / delta : near_slope;
    const T d_df = of_half.slope + T(0.5) * (df * curve + share);
    return {.value = of_half.value - (half_log_2pi + s) + T(0.5) * (df + 1) * log_rest,
            .d = {slope, (df + 1) * share - 1, abs_of(r) > edge ? T(0) : d_df},
            .d_x = -slope};
  }
};

}  // namespace fastelbo::FASTELBO_ISA
