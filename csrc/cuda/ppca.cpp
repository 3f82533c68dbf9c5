// Probabilistic PCA on CUDA devices.
#include <torch/library.h>

#include "cuda/device.h"
#include "ops.h"
#include "prepare/shapes.h"

namespace fastelbo {
namespace {

using namespace ops;
using namespace cuda;
using namespace views;

PpcaProjection ppca_project_cuda(const Tensor& x, const Tensor& W, const Tensor& b) {
  checks::ppca(x, W, b);
  const OnDeviceOf device(x);
  const Tensor wide = W.to(at::kDouble).contiguous(), center = b.to(at::kDouble).contiguous();
  const Tensor proj = doubles(W, {x.size(0), W.size(1)}), square = doubles(W, {x.size(0)});
  PpcaProjectParams p;
  p.N = x.size(0), p.D = x.size(1), p.lanes = W.size(1);
  p.x = view_of(x, 1, {}, /*unit=*/true);
  p.b = center.const_data_ptr<double>(), p.W = wide.const_data_ptr<double>();
  p.proj = proj.mutable_data_ptr<double>(), p.square = square.mutable_data_ptr<double>();
  launch_ppca_project(p, device.stream());
  return {proj, square};
}

// Two products of cuBLAS, which no kernel of ours would beat; e = r - W mean cancels, so it is made in double.
PpcaResidual ppca_residual_cuda(const Tensor& x, const Tensor& W, const Tensor& b, const Tensor& mean,
                                const Tensor& weight, std::array<bool, 3> needs) {
  checks::ppca_residual(x, W, b, mean, weight);
  const OnDeviceOf device(x);
  const auto type = checks::compute_type(W);
  Tensor wide = x.to(at::kDouble);
  if (x.scalar_type() == at::kByte) wide.div_(255);
  wide = wide - b.to(at::kDouble);
  const Tensor e = wide.addmm_(mean, W.to(at::kDouble).t(), 1, -1).mul_(weight.unsqueeze(1)).to(type);
  const Tensor none = at::empty({0}, e.options());
  return {needs[0] ? e : none, needs[1] ? at::mm(e.t(), mean.to(type)) : none, needs[2] ? e.sum(0) : none};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastelbo, FASTELBO_CUDA_KEY, m) {
  m.impl("_ppca_project", ppca_project_cuda);
  m.impl("_ppca_residual", ppca_residual_cuda);
}

}  // namespace fastelbo
