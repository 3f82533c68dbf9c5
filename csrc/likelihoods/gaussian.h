// Gaussian from the mean m and, where it is given, the log variance lv (0 otherwise):
//   log p = -1/2 [(x - m)^2 exp(-lv) + lv + log 2 pi]; log 2 pi is always kept.
#pragma once

#include "likelihoods/terms.h"

namespace fastelbo::FASTELBO_ISA {

struct Gaussian : Defaults {
  static constexpr const char* name = "gaussian";
  static constexpr const char* parameters[] = {"mean", "logvar"};
  static constexpr bool kShares = true;

  template <class T>
  FASTELBO_HD static T shared(T, T lv) {
    return exp_full(T(-0.5) * lv);
  }

  template <class T>
  FASTELBO_HD static Terms<T> eval(T m, T lv, T x, T inverse_std) {
    const T distance = times(x - m, inverse_std);  // squared after it is scaled: the square overflows where log p does
    const T slope = times(distance, inverse_std);
    const T half_square = T(0.5) * distance * distance;  // halved first: finite wherever its double in the log p is not
    const T half_log_2pi = T(0.91893853320467274178);
    return {.value = -(half_square + (T(0.5) * lv + half_log_2pi)), .d = {slope, half_square - T(0.5)}, .d_x = -slope};
  }
};

}  // namespace fastelbo::FASTELBO_ISA
