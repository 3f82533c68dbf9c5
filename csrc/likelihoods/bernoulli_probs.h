// Bernoulli from the probability p in [0, 1]: log p(x) = x log p + (1 - x) log(1 - p), each logarithm clamped at -100.
//
// The clamp and the gradient (x - p) / max(p (1 - p), 1e-12) are those of torch's binary_cross_entropy; p outside
// [0, 1] gives NaN.
#pragma once

#include "likelihoods/terms.h"

namespace fastelbo::FASTELBO_ISA {

struct BernoulliProbs : Defaults {
  static constexpr const char* name = "bernoulli_probs";
  static constexpr const char* parameters[] = {"probs"};
  static constexpr Domain kDomain = Domain::unit;

  template <class T>
  FASTELBO_HD static Terms<T> eval(T p, T x, T) {
    const LogPair<T> logs = log_and_log1m(p);
    const T log_p = logs.log_p < -100 ? T(-100) : logs.log_p;
    const T log_1mp = logs.log_1mp < -100 ? T(-100) : logs.log_1mp;
    const T variance = p * (1 - p);
    const T floored = variance < T(1e-12f) ? T(1e-12f) : variance;  // float: torch's constant
    return {.value = x * log_p + (1 - x) * log_1mp, .d = {(x - p) / floored}, .d_x = log_p - log_1mp};
  }
};

}  // namespace fastelbo::FASTELBO_ISA
