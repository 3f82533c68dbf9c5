// KL(N(mu, exp(lv)) || N(mu_p, exp(lv_p))) of one latent dimension, with its gradient.
//
//   1/2 [exp(t) - 1 - t + (mu - mu_p)^2 exp(-lv_p)],  t = lv - lv_p      (Kingma & Welling 2014, app. B)
//
// No term is negative and none cancels, so neither can the sum. The difference is divided by the prior's standard
// deviation before it is squared: the square overflows where the KL does.
#pragma once

#include "math/elementary.h"

namespace fastelbo::FASTELBO_ISA {

template <class T>
struct KlTerm {
  T value, d_mu, d_logvar, d_prior_mu, d_prior_logvar;
};

// exp_t = exp(lv - lv_p); inv_std_p = exp(-lv_p / 2)
template <class T>
FASTELBO_HD KlTerm<T> kl_term(T delta, T t, T exp_t, T inv_std_p) {
  const Expm1<T> e = expm1_of(t, exp_t);
  const T distance = times(delta, inv_std_p), slope = times(distance, inv_std_p);
  const T half_square = T(0.5) * distance * distance, half_value = T(0.5) * e.value;  // halved first: no early overflow
  return {T(0.5) * e.remainder + half_square, slope, half_value, -slope, -(half_value + half_square)};
}

}  // namespace fastelbo::FASTELBO_ISA
