// Reparameterized sampling of one latent dimension, and its gradient.
//
//   z = mu + std eps,  log ratio = log N(z; mu_p, exp(lv_p)) - log N(z; mu, exp(lv))
//                                = 1/2 [t + eps^2 - (z - mu_p)^2 exp(-lv_p)]
// with std = exp(lv / 2), delta = mu - mu_p, t = lv - lv_p    (Kingma & Welling 2014, sec. 2.4)
// The distance (z - mu_p) exp(-lv_p / 2) is squared after it is scaled, so that it overflows where the ratio does.
#pragma once

#include "math/elementary.h"

namespace fastelbo::FASTELBO_ISA {

template <class T>
struct Sample {
  T z, log_ratio;
};

template <class T>
FASTELBO_HD Sample<T> sample(T mu, T delta, T t, T std, T inv_std_p, T eps) {
  const T step = std * eps, distance = times(delta + step, inv_std_p);
  return {mu + step, T(0.5) * (t + (eps * eps - distance * distance))};
}

template <class T>
struct SampleGrad {
  T mu, logvar, eps, prior_mu, prior_logvar;
};

// Of z alone. Nothing of the log ratio is multiplied by 0: it may be infinite.
template <class T>
FASTELBO_HD SampleGrad<T> sample_grad(T grad_z, T std, T eps) {
  return {grad_z, T(0.5) * (grad_z * (std * eps)), grad_z * std, 0, 0};
}

// Of z and of the log ratio. With s = grad_lr (z - mu_p) exp(-lv_p) and G = grad_z - s:
//   d mu = G,  d lv = [G std eps + grad_lr] / 2,  d mu_p = s,  d lv_p = [s (z - mu_p) - grad_lr] / 2
template <class T>
FASTELBO_HD SampleGrad<T> sample_grad(T grad_z, T grad_lr, T delta, T std, T inv_std_p, T eps) {
  const T step = std * eps, distance = times(delta + step, inv_std_p);
  const T slope = times(grad_lr, times(distance, inv_std_p)), g = grad_z - slope;
  return {g, T(0.5) * (g * step + grad_lr), g * std + grad_lr * eps, slope,
          T(0.5) * (times(grad_lr, distance * distance) - grad_lr)};
}

// The same with the path derivative times r = path and the score times s = score (math/estimator.h):
//   G = r [grad_z - grad_lr (z - mu_p) exp(-lv_p)],
//   d mu = G + grad_lr (r - s) eps / std,  d lv = [G std eps + grad_lr ((r - s) eps^2 + s)] / 2.
template <class T>
FASTELBO_HD SampleGrad<T> gated_sample_grad(T grad_z, T grad_lr, T path, T score, T delta, T std, T inv_std_p, T eps) {
  const T step = std * eps, distance = times(delta + step, inv_std_p);
  const T slope = times(grad_lr, times(distance, inv_std_p)), g = path * (grad_z - slope);
  const T of_q = grad_lr * (path - score), score_mu = of_q * eps;
  return {g + zero_if(is_zero(score_mu), score_mu / std), T(0.5) * (g * step + (score_mu * eps + grad_lr * score)),
          g * std + grad_lr * path * eps, slope, T(0.5) * (times(grad_lr, distance * distance) - grad_lr)};
}

}  // namespace fastelbo::FASTELBO_ISA
