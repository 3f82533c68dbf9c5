// Probabilistic PCA on the CPU.
#include <torch/library.h>

#include "cpu/run.h"
#include "ops.h"
#include "prepare/shapes.h"

namespace fastelbo {
namespace cpu {
namespace {

using namespace ops;
using namespace views;

constexpr int64_t kWorkItems = 32;  // of the residual: enough for many threads, whatever N and D are

PpcaProjection ppca_project_cpu(const Tensor& x, const Tensor& W, const Tensor& b) {
  checks::ppca(x, W, b);
  const auto options = W.options().dtype(at::kDouble);
  const Tensor wide = padded(W, kPpcaPanel, at::kDouble), center = b.to(at::kDouble).contiguous();
  const Tensor proj = at::empty({x.size(0), wide.size(1)}, options), square = at::empty({x.size(0)}, options);
  PpcaProjectParams p;
  p.N = x.size(0), p.D = x.size(1), p.lanes = wide.size(1);
  p.x = view_of(x, 1, {}, /*unit=*/true);
  p.b = center.const_data_ptr<double>(), p.W = wide.const_data_ptr<double>();
  p.proj = proj.mutable_data_ptr<double>(), p.square = square.mutable_data_ptr<double>();
  run(kernels().ppca_project, p, (p.N + kPpcaRows - 1) / kPpcaRows, kPpcaRows * p.D * p.lanes / 4);
  return {proj.narrow(1, 0, W.size(1)).contiguous(), square};
}

// The parameters of both kernels of sums, and how many chunks of rows there are: a number that depends on the shapes
// alone, so that threads change no digit.
int64_t set_sums(PpcaSumsParams& p, const Tensor& x, const Tensor& W, const Tensor& center, const Tensor& means,
                 const Tensor& weights) {
  p.N = x.size(0), p.D = x.size(1), p.M = W.size(1), p.lanes = means.size(1);
  const int64_t blocks = (p.N + kPpcaRows - 1) / kPpcaRows, tiles = (p.D + kPpcaTile - 1) / kPpcaTile;
  const int64_t wanted = std::clamp<int64_t>(kWorkItems / std::max<int64_t>(tiles, 1), 1, std::max<int64_t>(blocks, 1));
  p.chunk = std::max<int64_t>((blocks + wanted - 1) / wanted, 1) * kPpcaRows;
  p.x = view_of(x, 1, {}, /*unit=*/true);
  p.b = center.const_data_ptr<double>();
  p.mean = means.const_data_ptr<double>(), p.weight = weights.const_data_ptr<double>();
  return (p.N + p.chunk - 1) / p.chunk;
}

void run_sums(Kernel<PpcaSumsParams> kernel, PpcaSumsParams& p, const Tensor& crosses, const Tensor& sums) {
  p.cross = crosses.mutable_data_ptr(), p.sum = sums.mutable_data_ptr();
  const int64_t tiles = (p.D + kPpcaTile - 1) / kPpcaTile;
  run(kernel, p, sums.size(0) * tiles, p.chunk * kPpcaTile * p.lanes / 4);
}

PpcaResidual ppca_residual_cpu(const Tensor& x, const Tensor& W, const Tensor& b, const Tensor& mean,
                               const Tensor& weight, std::array<bool, 3> needs) {
  checks::ppca_residual(x, W, b, mean, weight);
  PpcaResidual result = shapes::ppca_residual(x, W, needs);
  auto& [residual, cross, sum] = result;
  const auto type = checks::compute_type(W);
  const Tensor center = b.to(at::kDouble).contiguous(), weights = weight.contiguous();
  PpcaSumsParams p;
  if (!needs[0]) {  // without e itself: its sums are those of x - b, less W times small ones
    const Tensor weighted = mean * weights.unsqueeze(1), means = padded(weighted, kPpcaPanel, at::kDouble);
    const int64_t chunks = set_sums(p, x, W, center, means, weights);
    const Tensor crosses = at::empty({chunks, p.D, p.lanes}, means.options());
    const Tensor sums = at::empty({chunks, p.D}, means.options()), wide = W.to(at::kDouble);
    run_sums(kernels().ppca_moments, p, crosses, sums);
    if (needs[1]) {
      cross = crosses.sum(0).narrow(1, 0, p.M).contiguous().addmm_(wide, at::mm(weighted.t(), mean), 1, -1).to(type);
    }
    if (needs[2]) sum = sums.sum(0).addmv_(wide, weighted.sum(0), 1, -1).to(type);
    return result;
  }
  const Tensor means = padded(mean, kPpcaPanel, at::kDouble), rounded = means.to(type);
  const Tensor Wt = padded(W.t(), kPpcaPanel, at::kDouble);
  const int64_t chunks = set_sums(p, x, W, center, means, weights);
  const Tensor crosses = at::empty({chunks, p.D, p.lanes}, rounded.options());
  const Tensor sums = at::empty({chunks, p.D}, rounded.options());
  p.Wt = Wt.const_data_ptr<double>(), p.stride_m = Wt.size(1);
  p.rounded_mean = rounded.const_data_ptr();
  p.residual = residual.mutable_data_ptr();
  run_sums(kernels().ppca_residual[is_double(W)], p, crosses, sums);
  if (needs[1]) cross = crosses.sum(0).narrow(1, 0, p.M).contiguous();
  if (needs[2]) sum = sums.sum(0);
  return result;
}

}  // namespace
}  // namespace cpu

TORCH_LIBRARY_IMPL(fastelbo, CPU, m) {
  m.impl("_ppca_project", cpu::ppca_project_cpu);
  m.impl("_ppca_residual", cpu::ppca_residual_cpu);
}

}  // namespace fastelbo
