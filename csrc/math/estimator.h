// A K-sample bound and the gradient estimator that goes with it, as six numbers: three of the bound, and three
// coefficients of the gradient.
//
//   bound = elbo_weight mean_k log w_k + (1 - elbo_weight) / groups sum_g 1/t log mean_{k in g} w_k^t,  t = 1 - alpha
//           (t = 0: its limit, the mean)
//   a_k = d bound / d log w_k: the weight of grad_theta log p(x, z_k)
//   b_k = a_k (path + path_weight a_k): the weight of the path derivative (d log w_k / d z_k) (d z_k / d phi)
//   c_k = a_k score: the weight of -grad_phi log q(z_k | x) at fixed z_k
//
// The rows, with their names and papers, are in fastelbo/estimators.py. a is the gradient of the bound by the log
// weights; b and c reach the encoder as the "gradient" that the loss returns for rsample's output `gates` [2, K, B]:
// the factors b / a - 1 and c / a - 1. rsample's backward multiplies the gradient of z, and the path and the score part
// of that of the log ratio, by 1 + them. So the decoder runs backward once, with a, and the encoder once.
// The bound, a, b and c of one datum are computed in math/weights.h.
#pragma once

#include "math/number.h"

namespace fastelbo {

struct Estimator {
  Number elbo_weight, alpha;
  int64_t groups = 1;
  double path = 1, path_weight = 0, score = 1;
};

}  // namespace fastelbo
