// Gaussian from the mean m and, where it is given, the log variance lv (0 otherwise):
//   log p = -1/2 [(x - m)^2 exp(-lv) + lv + log 2 pi]; log 2 pi is always kept.
#pragma once

#include "likelihoods/terms.h"

namespace fastelbo::FASTELBO_ISA {

struct Gaussian {
  static constexpr const char* name = "gaussian";
  static constexpr bool takes_scale = true, kShares = true, kSoftplus = false;

  template <class T>
  FASTELBO_HD static T share(T, T lv) {
    return exp_full(-lv);
  }

  template <class T>
  FASTELBO_HD static Terms<T> eval(T m, T lv, T x, T inverse) {
    const T delta = x - m;
    const T slope = delta * inverse;
    const T square = delta * slope;
    const T log_2pi = T(1.83787706640934548356);
    return {
        .value = T(-0.5) * (square + lv + log_2pi), .d_recon = slope, .d_scale = T(0.5) * (square - 1), .d_x = -slope};
  }
};

}  // namespace fastelbo::FASTELBO_ISA
