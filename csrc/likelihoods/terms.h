// What a likelihood says of one element: log p and its gradient. A likelihood is a struct with
//   name          as users write it
//   takes_scale   whether recon may be a pair, its second tensor the scale parameter
//   splits_log    whether log p is also given as linear - log(factor), factor in [1, 2]: then the logarithm is taken
//                 once of the product of many factors, not once per element
//   eval          (recon, scale, x) -> Terms; scale is the constant 0 where it is not given
// What the caller does not use of the Terms costs nothing: the compiler drops it.
#pragma once

#include "math/elementary.h"

namespace fastelbo::FASTELBO_ISA {

template <class T>
struct Terms {
  T value = 0, d_recon = 0, d_scale = 0, d_x = 0;
  T linear = 0, factor = 1;
};

}  // namespace fastelbo::FASTELBO_ISA
