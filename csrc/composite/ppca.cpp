// log p(x) of probabilistic PCA and its gradient, made of the device's two products and of M by M algebra in float64.
//
// With r = x - b, G = W'W + s2 I, m = G^-1 W'r (the posterior mean) and C = W W' + s2 I:
//   log p = -1/2 [D log 2 pi + (D - M) log s2 + log |G| + r' C^-1 r],   r' C^-1 r = (|r|^2 - (W'r)' m) / s2
//   C^-1 r = (r - W m) / s2 = e / s2,   C^-1 W = W G^-1,   |e|^2 = s2 (r' C^-1 r - |m|^2)
// Tipping & Bishop 1999, eq. 4 to 8.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <cmath>

#include "ops.h"
#include "prepare/shapes.h"

namespace fastelbo {
namespace {

using namespace ops;

PpcaForward ppca_log_prob_forward_composite(const Tensor& x, const Tensor& W, const Tensor& b,
                                            const Tensor& log_sigma2) {
  checks::ppca(x, W, b, log_sigma2);
  const c10::SymInt D = W.sym_size(0), M = W.sym_size(1);
  const Tensor wide = W.to(at::kDouble), log_s2 = log_sigma2.to(at::kDouble), s2 = log_s2.exp();
  const Tensor eye = at::eye_symint(M, wide.options());
  const auto [factor, info] = at::linalg_cholesky_ex(at::mm(wide.t(), wide) + s2 * eye);
  const Tensor inverse = at::cholesky_inverse(factor);
  const auto [proj, square] = ops::ppca_project(x, W, b);
  const Tensor mean = at::mm(proj, inverse);
  const Tensor distance = (square - (proj * mean).sum(1)) / s2;
  const Tensor constant = log_s2 * (D - M) + factor.diagonal().log().sum() * 2 + D * std::log(2 * M_PI);
  const Tensor log_prob = at::where(info == 0, (distance + constant) * -0.5, NAN);
  return {log_prob.to(checks::compute_type(W)), mean, distance, inverse};
}

Tensor ppca_log_prob_composite(const Tensor& x, const Tensor& W, const Tensor& b, const Tensor& log_sigma2) {
  return std::get<0>(ops::ppca_log_prob_forward(x, W, b, log_sigma2));
}

PpcaGrads ppca_log_prob_backward_composite(const Tensor& grad, const Tensor& x, const Tensor& W, const Tensor& b,
                                         const Tensor& log_sigma2, const Tensor& mean, const Tensor& distance,
                                         const Tensor& inverse, std::array<bool, 4> needs) {
  const Tensor g = grad.to(at::kDouble), s2 = log_sigma2.to(at::kDouble).exp(), total = g.sum();
  PpcaGrads grads;
  auto& [grad_x, grad_W, grad_b, grad_log_sigma2] = grads;
  if (needs[0] || needs[1] || needs[2]) {
    const auto [residual, cross, sum] = ops::ppca_residual(x, W, b, mean, -g / s2, {needs[0], needs[1], needs[2]});
    if (needs[0]) grad_x = residual.to(x.scalar_type());
    if (needs[1]) {
      const Tensor whitened = at::mm(W.to(at::kDouble), inverse);  // C^-1 W
      grad_W = at::neg(cross + total * whitened).to(W.scalar_type());
    }
    if (needs[2]) grad_b = at::neg(sum).to(b.scalar_type());
  }
  if (needs[3]) {
    const c10::SymInt rest = W.sym_size(0) - W.sym_size(1);
    const Tensor trace = s2 * inverse.diagonal().sum() + rest;  // s2 tr C^-1
    const Tensor fit = (g * (distance - mean.square().sum(1))).sum();
    grad_log_sigma2 = ((fit - total * trace) * 0.5).to(log_sigma2.scalar_type());
  }
  return grads;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastelbo, CompositeExplicitAutograd, m) {
  m.impl("ppca_log_prob", ppca_log_prob_composite);
  m.impl("_ppca_log_prob_forward", ppca_log_prob_forward_composite);
  m.impl("_ppca_log_prob_backward", ppca_log_prob_backward_composite);
}

}  // namespace fastelbo
