// log p(x) of probabilistic PCA and its gradient, made of the device's products and of M by M algebra in float64.
//
// No G = W'W + s2 I is built: its condition is the square of that of W. With r = x - b, C = W W' + s2 I,
//   W = U R          U orthonormal (basis), R [M, M] (triangle)
//   P' (R R' + s2 I) P = I          P [M, M] (whiten), from a QR of [R'; sigma I], which needs no product either
//   c = U'r, the coordinates; y = P'c (white); |r - U c|^2 (rest)
// everything is a sum of positive terms, or a product of matrices:
//   log p = -1/2 [D log 2 pi + (D - M) log s2 - 2 log |P| + |r - U c|^2 / s2 + |y|^2]
//   m = R'P y, the posterior mean;   C^-1 r = (r - W m) / s2 = (r - U c) / s2 + U P y;   C^-1 W = U P P'R
//   s2 tr C^-1 = D - M + s2 |P|^2
// Tipping & Bishop 1999, eq. 4 to 8.
#include <torch/library.h>

#include <cmath>

#include "aten.h"
#include "ops.h"
#include "prepare/shapes.h"

namespace fastelbo {
namespace {

using namespace ops;

// Rows [N, K] times a matrix [K, L], float64: torch's product may sum in another order for another number of threads.
Tensor times(const Tensor& rows, const Tensor& matrix) {
  return std::get<0>(ops::ppca_project(rows, matrix, at::zeros_symint({matrix.sym_size(0)}, matrix.options())));
}

PpcaForward ppca_log_prob_forward_composite(const Tensor& x, const Tensor& W, const Tensor& b,
                                            const Tensor& log_sigma2) {
  checks::ppca(x, W, b, log_sigma2);
  const c10::SymInt D = W.sym_size(0), M = W.sym_size(1);
  const auto [basis, triangle, whiten] = ops::ppca_factor(W, log_sigma2);
  const auto [coords, square] = ops::ppca_project(x, basis, b);
  const Tensor rest = ops::ppca_rest(x, basis, b, coords, square), white = times(coords, whiten);
  const Tensor log_s2 = log_sigma2.to(at::kDouble);
  const Tensor log_det = log_s2 * (D - M) - whiten.diagonal().abs().log().sum() * 2;
  const Tensor distance = rest / log_s2.exp() + white.square().sum(1);
  const Tensor log_prob = (distance + log_det + D * std::log(2 * M_PI)) * -0.5;
  return {log_prob.to(checks::compute_type(W)), coords, rest, basis, triangle, whiten};
}

Tensor ppca_log_prob_composite(const Tensor& x, const Tensor& W, const Tensor& b, const Tensor& log_sigma2) {
  return std::get<0>(ops::ppca_log_prob_forward(x, W, b, log_sigma2));
}

PpcaGrads ppca_log_prob_backward_composite(const Tensor& grad, const Tensor& x, const Tensor& W, const Tensor& b,
                                           const Tensor& log_sigma2, const Tensor& coords, const Tensor& rest,
                                           const Tensor& basis, const Tensor& triangle, const Tensor& whiten,
                                           std::array<bool, 4> needs) {
  const Tensor g = grad.to(at::kDouble), s2 = log_sigma2.to(at::kDouble).exp();
  const Tensor white = times(coords, whiten), a = times(white, whiten.t());  // U a is C^-1 r within the basis
  // |C^-1 r|^2 s2, and 1: their sums with the weights g, in an order of their own
  const Tensor slope = rest / s2 + a.square().sum(1) * s2;
  const Tensor sums = times(g.unsqueeze(0), at::stack({slope, at::ones_like(slope)}, 1));
  const Tensor fit = sums.select(1, 0).squeeze(0), total = sums.select(1, 1).squeeze(0);
  PpcaGrads grads;
  auto& [grad_x, grad_W, grad_b, grad_log_sigma2] = grads;
  if (needs[0] || needs[1] || needs[2]) {
    const Tensor white_W = times(whiten.t(), triangle), mean = times(white, white_W);
    // coords - s2 a are those of W m, without the rounding errors of m, which are large where columns are nearly alike
    const auto [residual, cross, sum] =
        ops::ppca_residual(x, basis, b, coords - s2 * a, mean, -g / s2, {needs[0], needs[1], needs[2]});
    if (needs[0]) grad_x = residual.to(x.scalar_type());
    if (needs[1]) {
      const Tensor whitened = times(basis, times(whiten, white_W));  // C^-1 W
      grad_W = at::neg(cross + total * whitened).to(W.scalar_type());
    }
    if (needs[2]) grad_b = at::neg(sum).to(b.scalar_type());
  }
  if (needs[3]) {
    const Tensor trace = s2 * whiten.square().sum(1).sum() + (W.sym_size(0) - W.sym_size(1));  // s2 tr C^-1
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
