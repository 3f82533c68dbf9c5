// Probabilistic PCA on CUDA devices.
#include <torch/library.h>

#include "cuda/device.h"
#include "prepare/implement.h"
#include "prepare/ppca.h"

namespace fastelbo {
namespace cuda {
namespace {

using at::Tensor;

// By Householder's reflections, which nothing waits for. Rows of 0 make W as high as it is wide at least.
void ppca_factor(prepare::PpcaFactor& op) {
  const OnDeviceOf device(op.W);
  const int64_t D = op.W.size(0), M = op.W.size(1);
  const Tensor high = at::constant_pad_nd(op.W.to(at::kDouble), {0, 0, 0, std::max<int64_t>(M - D, 0)});
  const Tensor eye = at::eye(M, high.options()), sigma = (op.log_sigma2.to(at::kDouble) * 0.5).exp();
  const auto [basis, triangle] = at::linalg_qr(high);
  const Tensor factor = std::get<1>(at::linalg_qr(at::cat({triangle.t(), eye * sigma}), "r"));
  op.columns.copy_(basis.narrow(0, 0, D).t());
  op.triangle.copy_(triangle);
  op.whiten.copy_(at::linalg_solve_triangular(factor, eye, /*upper=*/true));
}

void ppca_invert(prepare::PpcaInvert& op) {
  const OnDeviceOf device(op.matrices);
  const auto [factor, info] = at::linalg_cholesky_ex(op.matrices);
  const Tensor log_det = factor.diagonal(0, 1, 2).log().sum(1) * 2;
  op.log_det.copy_(at::where(info == 0, log_det, NAN));
  op.inverses.copy_(at::cholesky_inverse(factor));
}

void ppca_project(prepare::PpcaProject& op) {
  const OnDeviceOf device(op.x);
  const Tensor basis = op.basis.contiguous(), center = op.b.to(at::kDouble).contiguous();
  PpcaProjectParams p;
  p.N = op.x.size(0), p.D = op.x.size(1), p.lanes = basis.size(1);
  p.x = views::view_of(op.x, 1, {}, /*unit=*/true);
  p.b = center.const_data_ptr<double>(), p.W = basis.const_data_ptr<double>();
  p.proj = op.coords.mutable_data_ptr<double>(), p.square = op.square.mutable_data_ptr<double>();
  launch_ppca_project(p, device.stream());
}

void ppca_rest(prepare::PpcaRest& op) {
  const OnDeviceOf device(op.x);
  const Tensor Wt = op.basis.t().contiguous(), center = op.b.to(at::kDouble).contiguous();
  const Tensor coords = op.coords.contiguous(), square = op.square.contiguous();
  PpcaRestParams p;
  p.N = op.x.size(0), p.D = op.x.size(1), p.M = op.basis.size(1), p.share = op.safe_share;
  p.x = views::view_of(op.x, 1, {}, /*unit=*/true);
  p.b = center.const_data_ptr<double>(), p.Wt = Wt.const_data_ptr<double>(), p.stride_m = p.D;
  p.coords = coords.const_data_ptr<double>(), p.square = square.const_data_ptr<double>();
  p.rest = op.rest.mutable_data_ptr<double>();
  launch_ppca_rest(p, device.stream());
}

// Two products of cuBLAS, which no kernel of ours would beat; e = r - basis coords cancels, so it is made in double.
void ppca_residual(prepare::PpcaResidual& op) {
  const OnDeviceOf device(op.x);
  const auto type = checks::compute_type(op.b);
  Tensor r = op.x.to(at::kDouble);
  if (op.x.scalar_type() == at::kByte) r.div_(255);
  r = r - op.b.to(at::kDouble);
  const Tensor e = r.addmm_(op.coords, op.basis.t(), 1, -1).mul_(op.weight.unsqueeze(1)).to(type);
  if (op.residual.defined()) op.residual.copy_(e);
  if (op.cross.defined()) op.cross.copy_(at::mm(e.t(), op.mean.to(type)));
  if (op.sum.defined()) op.sum.copy_(e.sum(0));
}

}  // namespace
}  // namespace cuda

TORCH_LIBRARY_IMPL(fastelbo, FASTELBO_CUDA_KEY, m) {
  m.impl("_ppca_factor", implement<ops::ppca_factor, prepare::ppca_factor, cuda::ppca_factor>);
  m.impl("_ppca_invert", implement<ops::ppca_invert, prepare::ppca_invert, cuda::ppca_invert>);
  m.impl("_ppca_project", implement<ops::ppca_project, prepare::ppca_project, cuda::ppca_project>);
  m.impl("_ppca_rest", implement<ops::ppca_rest, prepare::ppca_rest, cuda::ppca_rest>);
  m.impl("_ppca_residual", implement<ops::ppca_residual, prepare::ppca_residual, cuda::ppca_residual>);
}

}  // namespace fastelbo
