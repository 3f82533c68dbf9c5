// log (1/K) sum_k exp(x_k) and the weights exp(x_k) / sum, by the shift that keeps the largest term at 1.
//
// Where every x is -inf the value is -inf and the weights are defined as 0; NaN and +inf come through.
#pragma once

#include "math/elementary.h"

namespace fastelbo::FASTELBO_ISA {

template <class T>
struct LogMeanExp {
  T shift;     // the largest x, or 0 where that is not finite
  double sum;  // sum of exp(x - shift)

  FASTELBO_HD static T shift_of(T largest) { return largest - largest == 0 ? largest : T(0); }
  FASTELBO_HD double value(int64_t count) const {
    return double(shift) + (__builtin_log(sum) - __builtin_log(double(count)));
  }
  FASTELBO_HD T weight_factor() const { return sum == 0 ? T(0) : T(1 / sum); }
};

}  // namespace fastelbo::FASTELBO_ISA
