// The weights a, b, c of an estimator and its bound, of one datum: math/estimator.h says what they are.
#pragma once

#include "math/half.h"
#include "math/log_mean_exp.h"
#include "params.h"

namespace fastelbo::FASTELBO_ISA {

// b / a - 1. Without path_weight, a counts for nothing: it may be NaN.
FASTELBO_HD double path_gate(const Estimator& e, double a) {
  return (e.path_weight == 0 ? e.path : e.path + e.path_weight * a) - 1;
}
// c / a - 1
FASTELBO_HD double score_gate(const Estimator& e) { return e.score - 1; }

// [u exp(u) - (exp(u) - 1)] / u^2 = 1/2 + u/3 + u^2/8 + ..., without its cancellation near 0.
FASTELBO_HD double renyi_slope(double u) {
  const double e = exp_full(u), closed = (u * e - (e - 1)) / (u * u);
  double series = 0;
  for (int n = 16; n >= 0; --n) series = (series + 1.0 / double(n + 2)) * (n ? u / double(n) : 1.0);
  return u > -0.5 && u < 0.5 ? series : closed;
}

// The bound of one datum from its K log weights log_w[k * stride], which become the weights a. slopes: its derivatives
// by elbo_weight and by alpha; null: not wanted. Not kTempered: alpha is 0, and nothing wants slopes; a GPU's fused
// kernel has no registers for more.
//
// A Team runs loops over the samples: max(n, f) and sum(n, f) of f(0) .. f(n - 1), and each(n, f); leads() is true in
// one thread. It is one thread of a CPU, or a block of threads of a GPU, all of which call this.
template <bool kTempered, class Team>
FASTELBO_HD double weigh(const Estimator& e, double* log_w, int64_t stride, int64_t K, const Team& team,
                         double* slopes) {
  const double elbo_weight = read(e.elbo_weight), t = kTempered ? 1 - read(e.alpha) : 1, even = elbo_weight / double(K);
  double mean = 0, renyi = 0, slope = 0;  // the ELBO; the Renyi bound, averaged over the groups, and its slope by t
  if (elbo_weight != 0 || slopes) mean = team.sum(K, [=](int64_t k) { return log_w[k * stride]; }) / double(K);
  if (elbo_weight == 1 && !slopes) {
    team.each(K, [=](int64_t k) { log_w[k * stride] = even; });
    return mean;
  }
  const int64_t size = K / e.groups;
  const double part = (1 - elbo_weight) / double(e.groups);
  for (int64_t group = 0; group < e.groups; ++group) {
    double* w = log_w + group * size * stride;
    const double largest = team.max(size, [=](int64_t k) { return times(t, w[k * stride]); });
    const double shift = LogMeanExp<double>::shift_of(largest);
    const double sum = team.sum(size, [=](int64_t k) { return exp_full(times(t, w[k * stride]) - shift); });
    const LogMeanExp<double> total{shift, sum};
    double value = total.value(size) / t;
    const double factor = part * total.weight_factor();
    if (kTempered && (t != 1 || slopes)) {
      // around the mean c of the group: R = c + log mean exp(t (log w - c)) / t, which near t = 0 cancels nothing
      const double c = team.sum(size, [=](int64_t k) { return w[k * stride]; }) / double(size);
      const double spread = team.max(size, [=](int64_t k) { return t * (c - w[k * stride]); });
      const double beyond = __builtin_log1p(team.sum(size, [=](int64_t k) {
        const double u = t * (w[k * stride] - c);
        return expm1_of(u, exp_full(u)).value;
      }) / double(size));
      if (t == 0)
        value = c;
      else if (spread < 0.5 && largest - t * c < 0.5)
        value = c + beyond / t;
      if (slopes) {
        slope += team.sum(size, [=](int64_t k) {
          const double v = w[k * stride] - value;
          return v * v * renyi_slope(t * v);
        }) / double(size);
      }
    }
    renyi += value;
    team.each(size, [=](int64_t k) { w[k * stride] = factor * exp_full(times(t, w[k * stride]) - shift) + even; });
  }
  renyi /= double(e.groups);
  if (slopes && team.leads()) {
    slopes[0] = mean - renyi;
    slopes[1] = -(1 - elbo_weight) * slope / double(e.groups);
  }
  return elbo_weight == 0 ? renyi : elbo_weight == 1 ? mean : elbo_weight * mean + (1 - elbo_weight) * renyi;
}

// Everything of datum b but the gradients of the likelihood's parameters, from its log p in p.weights.
template <class T, bool kTempered = true, class Team>
FASTELBO_HD void weigh_datum(const MultiSampleParams& p, int64_t b, const Team& team) {
  const int64_t K = p.fit.K, B = p.fit.B;
  double* weights = p.weights + b;
  T* log_p = static_cast<T*>(p.log_p);
  team.each(K, [=, &p](int64_t k) {
    if (log_p) log_p[k * B + b] = T(weights[k * B]);
    weights[k * B] += double(row_number<T>(p.log_ratio, k, b));
  });
  double slopes[2];
  double* wanted = kTempered && p.slopes ? slopes : nullptr;
  const double bound = weigh<kTempered>(p.estimator, weights, B, K, team, wanted);
  if (team.leads()) {
    p.bound[b] = bound;
    if (wanted) p.slopes[b] = slopes[0], p.slopes[B + b] = slopes[1];
  }
  T* row_factor = static_cast<T*>(p.row_factor);
  T* gates = static_cast<T*>(p.gates);
  team.each(K, [=, &p](int64_t k) {
    const double a = weights[k * B];
    if (row_factor) row_factor[k * B + b] = T(-p.datum_weight * a);
    if (!gates) return;
    gates[k * B + b] = T(path_gate(p.estimator, a));
    gates[(K + k) * B + b] = T(score_gate(p.estimator));
  });
}

}  // namespace fastelbo::FASTELBO_ISA
