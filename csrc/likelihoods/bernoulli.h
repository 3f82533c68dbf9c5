// Bernoulli from the logit l: log p = x l - softplus(l), x anywhere in [0, 1].
//
// With h = [l >= 0] and e = exp(-|l|):  log p = l (x - h) - log(1 + e),  d/dl = (x - h) +- e / (1 + e).
// Neither difference cancels: exact for any size of l. At l = -inf, x > 0 the value is the limit
// -inf, where the textbook forms give inf - inf.
#pragma once

#include "likelihoods/terms.h"

namespace fastelbo::FASTELBO_ISA {

struct Bernoulli : Defaults {
  static constexpr const char* name = "bernoulli";
  static constexpr const char* parameters[] = {"logits"};
  static constexpr Domain kDomain = Domain::unit;
  static constexpr bool kShares = true, kSoftplus = true;

  template <class T>
  FASTELBO_HD static T shared(T l) {
    return exp_nonpositive(minus_abs(l));
  }

  template <class T>
  FASTELBO_HD static Terms<T> eval(T l, T x, T e) {
    const T step = x - one_unless_negative(l);
    const T tail = e / (1 + e);  // sigmoid(-|l|)
    return {.value = l * step, .d = {step + with_sign_of(l, tail)}, .d_x = l};
  }
};

}  // namespace fastelbo::FASTELBO_ISA
