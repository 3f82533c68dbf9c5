// What a likelihood says of one element: log p and its gradient. A likelihood is a struct with
//   name          as users write it
//   takes_scale   whether recon may be a pair, its second tensor the scale parameter
//   eval          (recon, scale, x) -> Terms; scale is the constant 0 where it is not given
// What the caller does not use of the Terms costs nothing: the compiler drops it.
#pragma once

#include "math/elementary.h"

namespace fastelbo::FASTELBO_ISA {

template <class T>
struct Terms {
  T value = 0, d_recon = 0, d_scale = 0, d_x = 0;
};

}  // namespace fastelbo::FASTELBO_ISA
