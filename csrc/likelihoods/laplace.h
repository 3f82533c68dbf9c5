// Laplace from the mean m and, where it is given, the log scale s (0 otherwise):
//   log p = -[|x - m| exp(-s) + s + log 2]; the gradient at x = m is 0, as that of torch.abs; at NaN it is
// NaN, where that of torch.abs is 0.
#pragma once

#include "likelihoods/terms.h"

namespace fastelbo::FASTELBO_ISA {

struct Laplace : Defaults {
  static constexpr const char* name = "laplace";
  static constexpr const char* parameters[] = {"mean", "log_scale"};
  static constexpr bool kShares = true;

  template <class T>
  FASTELBO_HD static T shared(T, T s) {
    return exp_full(-s);
  }

  template <class T>
  FASTELBO_HD static Terms<T> eval(T m, T s, T x, T inverse) {
    const T delta = x - m;
    const T distance = times(abs_of(delta), inverse);
    const T slope = delta > 0 ? inverse : (delta < 0 ? -inverse : distance);
    const T log_2 = T(0.69314718055994530942);
    return {.value = -(distance + s + log_2), .d = {slope, distance - 1}, .d_x = -slope};
  }
};

}  // namespace fastelbo::FASTELBO_ISA
