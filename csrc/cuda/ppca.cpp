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

// Two products of cuBLAS, which no kernel of ours would beat; e [N, D] is written once.
PpcaResidual ppca_residual_cuda(const Tensor& x, const Tensor& W, const Tensor& b, const Tensor& mean,
                                const Tensor& weight, std::array<bool, 3> needs) {
  checks::ppca_residual(x, W, b, mean, weight);
  const OnDeviceOf device(x);
  const auto type = checks::compute_type(W);
  const Tensor data = x.scalar_type() == at::kByte ? x.to(type).div_(255) : x.to(type);
  const Tensor means = mean.to(type);
  Tensor e = data - b.to(type);
  e.addmm_(means, W.to(type).t(), 1, -1).mul_(weight.to(type).unsqueeze(1));
  const Tensor none = at::empty({0}, e.options());
  return {needs[0] ? e : none, needs[1] ? at::mm(e.t(), means) : none, needs[2] ? e.sum(0) : none};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastelbo, FASTELBO_CUDA_KEY, m) {
  m.impl("_ppca_project", ppca_project_cuda);
  m.impl("_ppca_residual", ppca_residual_cuda);
}

}  // namespace fastelbo
