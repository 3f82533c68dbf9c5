// What a likelihood says of one element: log p and its gradient. A likelihood is a struct with
//   name          as users write it
//   takes_scale   whether recon may be a pair, its second tensor the scale parameter
//   kShares       whether share() is worth a pass of its own: value and gradient need one exponential, which is long
//   kSoftplus     whether log(1 + share) is still to be subtracted from the value: the CPU takes one logarithm of the
//                 product of eight
//   share         (recon, scale) -> that number, in [0, 1] with kSoftplus
//   eval          (recon, scale, x, share) -> Terms; scale is the constant 0 where it is not given
// What the caller does not use of the Terms costs nothing: the compiler drops it.
#pragma once

#include "math/elementary.h"

namespace fastelbo::FASTELBO_ISA {

template <class T>
struct Terms {
  T value = 0, d_recon = 0, d_scale = 0, d_x = 0;
};

// The whole of one element.
template <class L, class T>
FASTELBO_HD Terms<T> evaluate(T recon, T scale, T x) {
  const T share = L::share(recon, scale);
  const Terms<T> t = L::eval(recon, scale, x, share);
  const T value = L::kSoftplus ? t.value - log1p_unit(share) : t.value;
  return {.value = value, .d_recon = t.d_recon, .d_scale = t.d_scale, .d_x = t.d_x};
}

}  // namespace fastelbo::FASTELBO_ISA
