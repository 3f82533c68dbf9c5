// Bernoulli from the logit l: log p = x l - softplus(l), x anywhere in [0, 1].
//
// With h = [l >= 0] and e = exp(-|l|):  log p = l (x - h) - log(1 + e),  d/dl = (x - h) +- e / (1 + e).
// Neither difference cancels: exact for any size of l. At l = -inf the value is the limit, where the textbook forms
// give inf - inf. As a product of factors 1 + e, what rounding takes from a factor is put into the linear part.
#pragma once

#include "likelihoods/terms.h"

namespace fastelbo::FASTELBO_ISA {

struct Bernoulli {
  static constexpr const char* name = "bernoulli";
  static constexpr bool takes_scale = false;
  static constexpr bool splits_log = true;

  template <class T>
  FASTELBO_HD static Terms<T> eval(T l, T, T x) {
    const T e = exp_nonpositive(minus_abs(l));
    const T step = x - one_unless_negative(l);
    const T factor = 1 + e, lost = e - (factor - 1);
    return {.value = l * step - log1p_unit(e),
            .d_recon = step + with_sign_of(l, e / factor),  // e / factor is sigmoid(-|l|)
            .d_x = l,
            .linear = l * step - lost,
            .factor = factor};
  }
};

}  // namespace fastelbo::FASTELBO_ISA
