// Reparameterized sampling of one latent dimension, and its gradient.
//
//   z = mu + std eps,  log q = log N(z; mu, exp(lv)) = -1/2 [eps^2 + lv + log 2 pi]
//   log ratio = log N(z; mu_p, exp(lv_p)) - log q = 1/2 [t + eps^2 - (z - mu_p)^2 exp(-lv_p)]
// with std = exp(lv / 2), delta = mu - mu_p, t = lv - lv_p    (Kingma & Welling 2014, sec. 2.4)
// The distance (z - mu_p) exp(-lv_p / 2) is squared after it is scaled, so that it overflows where the ratio does.
#pragma once

#include "math/elementary.h"
#include "params.h"

namespace fastelbo::FASTELBO_ISA {

template <class T>
struct Sample {
  T z, log_ratio, log_q;  // log_q without its log 2 pi
};

template <class T>
FASTELBO_HD Sample<T> sample(T mu, T logvar, T delta, T t, T std, T inv_std_p, T eps) {
  const T step = std * eps, square = eps * eps, distance = times(delta + step, inv_std_p);
  return {mu + step, T(0.5) * (t + (square - distance * distance)), T(-0.5) * (square + logvar)};
}

// The upstream gradients of z, of log p(z) (that of the log ratio) and of -log q (that of the log ratio less that of
// log q), and the factors of the path and of the score gradient (math/estimator.h).
template <class T>
struct SampleUpstream {
  T z, log_p, minus_log_q, path, score;
};

template <class T>
struct SampleGrad {
  T mu, logvar, eps, prior_mu, prior_logvar;
};

// With s = log_p (z - mu_p) exp(-lv_p), G = path (z - s) and r = minus_log_q (path - score):
//   d mu = G + r eps / std,            d lv = [G std eps + r eps^2 + minus_log_q score] / 2,
//   d mu_p = s,                        d lv_p = [s (z - mu_p) - log_p] / 2
// Of z alone nothing of the densities is multiplied by 0: they may be infinite.
template <class T>
FASTELBO_HD SampleGrad<T> sample_grad(Upstream kind, const SampleUpstream<T>& up, T delta, T std, T inv_std_p, T eps) {
  const T step = std * eps;
  if (kind == Upstream::z) return {up.z, T(0.5) * (up.z * step), up.z * std, 0, 0};
  const T distance = times(delta + step, inv_std_p), slope = times(up.log_p, times(distance, inv_std_p));
  const T prior_logvar = T(0.5) * (times(up.log_p, distance * distance) - up.log_p);
  const T g = up.z - slope;
  if (kind == Upstream::densities) {
    return {g, T(0.5) * (g * step + up.minus_log_q), g * std + up.minus_log_q * eps, slope, prior_logvar};
  }
  const T by_path = up.path * g, score_mu = up.minus_log_q * (up.path - up.score) * eps;
  return {by_path + zero_if(is_zero(score_mu), score_mu / std),
          T(0.5) * (by_path * step + (score_mu * eps + up.minus_log_q * up.score)),
          by_path * std + up.minus_log_q * up.path * eps, slope, prior_logvar};
}

}  // namespace fastelbo::FASTELBO_ISA
