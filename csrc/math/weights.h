// The weights a, b, c of an estimator and its bound, of one datum: math/estimator.h says what they are.
#pragma once

#include "math/log_mean_exp.h"
#include "params.h"

namespace fastelbo::FASTELBO_ISA {

// b / a - 1. Without path_weight, a counts for nothing: it may be NaN.
FASTELBO_HD double path_gate(const Estimator& e, double a) {
  return (e.path_weight == 0 ? e.path : e.path + e.path_weight * a) - 1;
}
// c / a - 1
FASTELBO_HD double score_gate(const Estimator& e) { return e.score - 1; }

// The bound of one datum from its K log weights log_w[k * stride], which become the weights a.
//
// A Team runs loops over the samples: max(n, f) and sum(n, f) of f(0) .. f(n - 1), and each(n, f); leads() is true in
// one thread. It is one thread of a CPU, or a block of threads of a GPU, all of which call this.
template <class Team>
FASTELBO_HD double weigh(const Estimator& e, double* log_w, int64_t stride, int64_t K, const Team& team) {
  const double even = e.elbo_weight / double(K), t = 1 - e.alpha;
  double bound = 0;
  if (e.elbo_weight != 0) bound = even * team.sum(K, [=](int64_t k) { return log_w[k * stride]; });
  if (e.elbo_weight == 1) {
    team.each(K, [=](int64_t k) { log_w[k * stride] = even; });
    return bound;
  }
  const int64_t size = K / e.groups;
  const double part = (1 - e.elbo_weight) / double(e.groups);
  for (int64_t group = 0; group < e.groups; ++group) {
    double* w = log_w + group * size * stride;
    const double largest = team.max(size, [=](int64_t k) { return t * w[k * stride]; });
    const double shift = LogMeanExp<double>::shift_of(largest);
    const double sum = team.sum(size, [=](int64_t k) { return exp_full(t * w[k * stride] - shift); });
    const LogMeanExp<double> total{shift, sum};
    bound += part / t * total.value(size);
    const double factor = part * total.weight_factor();
    team.each(size, [=](int64_t k) { w[k * stride] = factor * exp_full(t * w[k * stride] - shift) + even; });
  }
  return bound;
}

// Everything of datum b but the gradients of the likelihood's parameters, from its log p in p.weights.
template <class T, class Team>
FASTELBO_HD void weigh_datum(const MultiSampleParams& p, int64_t b, const Team& team) {
  const int64_t K = p.fit.K, B = p.fit.B;
  double* weights = p.weights + b;
  T* log_p = static_cast<T*>(p.log_p);
  team.each(K, [=, &p](int64_t k) {
    if (log_p) log_p[k * B + b] = T(weights[k * B]);
    weights[k * B] += double(row_number<T>(p.log_ratio, k, b));
  });
  const double bound = weigh(p.estimator, weights, B, K, team);
  if (team.leads()) p.bound[b] = bound;
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
