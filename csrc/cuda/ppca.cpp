// Probabilistic PCA on CUDA devices.
#include <torch/library.h>

#include "cuda/device.h"
#include "ops.h"
#include "shapes.h"

namespace fastelbo {
namespace {

using namespace ops;
using namespace cuda;
using namespace views;

// By Householder's reflections, which nothing waits for. Rows of 0 make W as high as it is wide at least.
PpcaFactor ppca_factor_cuda(const Tensor& W, const Tensor& log_sigma2) {
  checks::ppca_factor(W, log_sigma2);
  const OnDeviceOf device(W);
  const int64_t D = W.size(0), M = W.size(1);
  const Tensor wide = at::constant_pad_nd(W.to(at::kDouble), {0, 0, 0, std::max<int64_t>(M - D, 0)});
  const Tensor eye = at::eye(M, wide.options()), sigma = (log_sigma2.to(at::kDouble) * 0.5).exp();
  const auto [basis, triangle] = at::linalg_qr(wide);
  const Tensor factor = std::get<1>(at::linalg_qr(at::cat({triangle.t(), eye * sigma}), "r"));
  const Tensor whiten = at::linalg_solve_triangular(factor, eye, /*upper=*/true);
  return {basis.narrow(0, 0, D).t().contiguous().t(), triangle.contiguous(), whiten.contiguous()};
}

PpcaProjection ppca_project_cuda(const Tensor& x, const Tensor& basis, const Tensor& b) {
  checks::ppca_project(x, basis, b);
  const OnDeviceOf device(x);
  const Tensor wide = basis.contiguous(), center = b.to(at::kDouble).contiguous();
  const Tensor coords = doubles(basis, {x.size(0), basis.size(1)}), square = doubles(basis, {x.size(0)});
  PpcaProjectParams p;
  p.N = x.size(0), p.D = x.size(1), p.lanes = basis.size(1);
  p.x = view_of(x, 1, {}, /*unit=*/true);
  p.b = center.const_data_ptr<double>(), p.W = wide.const_data_ptr<double>();
  p.proj = coords.mutable_data_ptr<double>(), p.square = square.mutable_data_ptr<double>();
  launch_ppca_project(p, device.stream());
  return {coords, square};
}

Tensor ppca_rest_cuda(const Tensor& x, const Tensor& basis, const Tensor& b, const Tensor& coords,
                      const Tensor& square) {
  checks::ppca_rest(x, basis, b, coords, square);
  const OnDeviceOf device(x);
  const Tensor Wt = basis.t().contiguous(), center = b.to(at::kDouble).contiguous();
  const Tensor c = coords.contiguous(), whole = square.contiguous(), rest = at::empty_like(whole);
  PpcaRestParams p;
  p.N = x.size(0), p.D = x.size(1), p.M = basis.size(1), p.share = ppca_safe_share(b);
  p.x = view_of(x, 1, {}, /*unit=*/true);
  p.b = center.const_data_ptr<double>(), p.Wt = Wt.const_data_ptr<double>(), p.stride_m = p.D;
  p.coords = c.const_data_ptr<double>(), p.square = whole.const_data_ptr<double>();
  p.rest = rest.mutable_data_ptr<double>();
  launch_ppca_rest(p, device.stream());
  return rest;
}

// Two products of cuBLAS, which no kernel of ours would beat; e = r - basis coords cancels, so it is made in double.
PpcaResidual ppca_residual_cuda(const Tensor& x, const Tensor& basis, const Tensor& b, const Tensor& coords,
                                const Tensor& mean, const Tensor& weight, std::array<bool, 3> needs) {
  checks::ppca_residual(x, basis, b, coords, mean, weight);
  const OnDeviceOf device(x);
  const auto type = checks::compute_type(b);
  Tensor wide = x.to(at::kDouble);
  if (x.scalar_type() == at::kByte) wide.div_(255);
  wide = wide - b.to(at::kDouble);
  const Tensor e = wide.addmm_(coords, basis.t(), 1, -1).mul_(weight.unsqueeze(1)).to(type);
  const Tensor none = at::empty({0}, e.options());
  return {needs[0] ? e : none, needs[1] ? at::mm(e.t(), mean.to(type)) : none, needs[2] ? e.sum(0) : none};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastelbo, FASTELBO_CUDA_KEY, m) {
  m.impl("_ppca_factor", ppca_factor_cuda);
  m.impl("_ppca_project", ppca_project_cuda);
  m.impl("_ppca_rest", ppca_rest_cuda);
  m.impl("_ppca_residual", ppca_residual_cuda);
}

}  // namespace fastelbo
