// The weights a, b, c of an estimator and its bound, of one datum: math/estimator.h says what they are.
#pragma once

#include "math/estimator.h"
#include "math/log_mean_exp.h"

namespace fastelbo::FASTELBO_ISA {

// b / a - 1. Without path_weight, a counts for nothing: it may be NaN.
FASTELBO_HD double path_gate(const Estimator& e, double a) {
  return (e.path_weight == 0 ? e.path : e.path + e.path_weight * a) - 1;
}
// c / a - 1
FASTELBO_HD double score_gate(const Estimator& e) { return e.score - 1; }

// The bound of one datum from its K log weights log_w[k * stride], which become the weights a.
//
// A Team runs loops over the samples: max(n, f) and sum(n, f) of f(0) .. f(n - 1), and each(n, f). It is one thread of
// a CPU, or a block of threads of a GPU, all of which call this.
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

}  // namespace fastelbo::FASTELBO_ISA
