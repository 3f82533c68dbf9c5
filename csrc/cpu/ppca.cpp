// Probabilistic PCA on the CPU.
#include <torch/library.h>

#include "cpu/run.h"
#include "ops.h"
#include "shapes.h"

namespace fastelbo {
namespace cpu {
namespace {

using namespace ops;

constexpr int64_t kWorkItems = 32;  // of the residual: enough for many threads, whatever N and D are

PpcaFactor ppca_factor_cpu(const Tensor& W, const Tensor& log_sigma2) {
  checks::ppca_factor(W, log_sigma2);
  const int64_t D = W.size(0), M = W.size(1);
  const auto options = W.options().dtype(at::kDouble);
  const Tensor columns = at::empty({M, D}, options).copy_(W.t()), triangle = at::empty({M, M}, options);
  const Tensor whiten = at::empty({M, M}, options), scratch = at::empty({3 * M, M}, options);
  PpcaFactorParams p;
  p.D = D, p.M = M, p.sigma = std::exp(0.5 * log_sigma2.to(at::kDouble).item<double>());
  p.columns = columns.mutable_data_ptr<double>(), p.triangle = triangle.mutable_data_ptr<double>();
  p.stacked = scratch.mutable_data_ptr<double>(), p.factor = p.stacked + 2 * M * M;
  p.whiten = whiten.mutable_data_ptr<double>();
  kernels().ppca_factor(p, 0, 1);
  return {columns.t(), triangle, whiten};
}

PpcaProjection ppca_project_cpu(const Tensor& x, const Tensor& basis, const Tensor& b) {
  checks::ppca_project(x, basis, b);
  const Tensor wide = padded(basis, kPpcaPanel, at::kDouble), center = b.to(at::kDouble).contiguous();
  const Tensor coords = at::empty({x.size(0), wide.size(1)}, wide.options());
  const Tensor square = at::empty({x.size(0)}, wide.options());
  PpcaProjectParams p;
  p.N = x.size(0), p.D = x.size(1), p.lanes = wide.size(1);
  p.x = view_of(x, 1, {}, /*unit=*/true);
  p.b = center.const_data_ptr<double>(), p.W = wide.const_data_ptr<double>();
  p.proj = coords.mutable_data_ptr<double>(), p.square = square.mutable_data_ptr<double>();
  run(kernels().ppca_project, p, (p.N + kPpcaRows - 1) / kPpcaRows, kPpcaRows * p.D * p.lanes / 4);
  return {coords.narrow(1, 0, basis.size(1)).contiguous(), square};
}

Tensor ppca_rest_cpu(const Tensor& x, const Tensor& basis, const Tensor& b, const Tensor& coords,
                     const Tensor& square) {
  checks::ppca_rest(x, basis, b, coords, square);
  const Tensor Wt = padded(basis.t(), kPpcaPanel, at::kDouble), center = b.to(at::kDouble).contiguous();
  const Tensor c = coords.contiguous(), whole = square.contiguous(), rest = at::empty_like(whole);
  PpcaRestParams p;
  p.N = x.size(0), p.D = x.size(1), p.M = basis.size(1), p.share = ppca_safe_share(b);
  p.x = view_of(x, 1, {}, /*unit=*/true);
  p.b = center.const_data_ptr<double>(), p.Wt = Wt.const_data_ptr<double>(), p.stride_m = Wt.size(1);
  p.coords = c.const_data_ptr<double>(), p.square = whole.const_data_ptr<double>();
  p.rest = rest.mutable_data_ptr<double>();
  run(kernels().ppca_rest, p, (p.N + kPpcaRows - 1) / kPpcaRows, kPpcaRows * p.D * p.M / 4);
  return rest;
}

// The parameters of both kernels of sums, and how many chunks of rows there are: a number that depends on the shapes
// alone, so that threads change no digit.
int64_t set_sums(PpcaSumsParams& p, const Tensor& x, const Tensor& center, const Tensor& means, const Tensor& weights) {
  p.N = x.size(0), p.D = x.size(1), p.lanes = means.size(1);
  const int64_t blocks = (p.N + kPpcaRows - 1) / kPpcaRows, tiles = (p.D + kPpcaTile - 1) / kPpcaTile;
  const int64_t wanted = std::clamp<int64_t>(kWorkItems / std::max<int64_t>(tiles, 1), 1, std::max<int64_t>(blocks, 1));
  p.chunk = std::max<int64_t>((blocks + wanted - 1) / wanted, 1) * kPpcaRows;
  p.x = view_of(x, 1, {}, /*unit=*/true);
  p.b = center.const_data_ptr<double>();
  p.mean = means.const_data_ptr<double>(), p.weight = weights.const_data_ptr<double>();
  return (p.N + p.chunk - 1) / p.chunk;
}

// The sums of all chunks [chunks, ...], in order and in float64.
Tensor add_up(const Tensor& chunks) {
  const Tensor total = at::zeros(chunks.sizes().slice(1), chunks.options().dtype(at::kDouble));
  for (const Tensor& chunk : chunks.unbind()) total.add_(chunk);
  return total;
}

// [D, lanes] and [D]
std::pair<Tensor, Tensor> run_sums(Kernel<PpcaSumsParams> kernel, PpcaSumsParams& p, int64_t chunks,
                                   const at::TensorOptions& options) {
  const Tensor crosses = at::empty({chunks, p.D, p.lanes}, options), sums = at::empty({chunks, p.D}, options);
  p.cross = crosses.mutable_data_ptr(), p.sum = sums.mutable_data_ptr();
  const int64_t tiles = (p.D + kPpcaTile - 1) / kPpcaTile;
  run(kernel, p, chunks * tiles, p.chunk * kPpcaTile * p.lanes / 4);
  return {add_up(crosses), add_up(sums)};
}

// sum (x - b) means' [D, lanes] and sum weight (x - b) [D], float64
std::pair<Tensor, Tensor> moments(const Tensor& x, const Tensor& center, const Tensor& means, const Tensor& weights) {
  PpcaSumsParams p;
  const int64_t chunks = set_sums(p, x, center, means, weights);
  return run_sums(kernels().ppca_moments, p, chunks, means.options());
}

PpcaResidual ppca_residual_cpu(const Tensor& x, const Tensor& basis, const Tensor& b, const Tensor& coords,
                               const Tensor& mean, const Tensor& weight, std::array<bool, 3> needs) {
  checks::ppca_residual(x, basis, b, coords, mean, weight);
  PpcaResidual result = shapes::ppca_residual(x, basis, b, needs);
  auto& [residual, cross, sum] = result;
  const auto type = checks::compute_type(b);
  const int64_t M = basis.size(1);
  const Tensor center = b.to(at::kDouble).contiguous(), weights = weight.contiguous();
  if (!needs[0]) {  // without e itself: its sums are those of x - b, less the basis times small ones
    const Tensor means = padded(mean * weights.unsqueeze(1), kPpcaPanel, at::kDouble);
    const auto [crosses, sums] = moments(x, center, means, weights);
    const Tensor none = at::zeros({M}, means.options());
    const auto [small, smaller] = moments(coords.contiguous(), none, means, weights);
    const Tensor both = at::cat({small.narrow(1, 0, M), smaller.unsqueeze(1)}, 1);
    const Tensor less = std::get<0>(ppca_project_cpu(basis, both, none));
    if (needs[1]) cross = (crosses.narrow(1, 0, M) - less.narrow(1, 0, M)).to(type);
    if (needs[2]) sum = (sums - less.select(1, M)).to(type);
    return result;
  }
  const Tensor means = padded(mean, kPpcaPanel, at::kDouble), rounded = means.to(type), c = coords.contiguous();
  const Tensor Wt = padded(basis.t(), kPpcaPanel, at::kDouble);
  PpcaSumsParams p;
  const int64_t chunks = set_sums(p, x, center, means, weights);
  p.M = M, p.coords = c.const_data_ptr<double>();
  p.Wt = Wt.const_data_ptr<double>(), p.stride_m = Wt.size(1);
  p.rounded_mean = rounded.const_data_ptr();
  p.residual = residual.mutable_data_ptr();
  const auto [crosses, sums] = run_sums(kernels().ppca_residual[is_double(b)], p, chunks, rounded.options());
  if (needs[1]) cross = crosses.narrow(1, 0, M).to(type).contiguous();
  if (needs[2]) sum = sums.to(type);
  return result;
}

}  // namespace
}  // namespace cpu

TORCH_LIBRARY_IMPL(fastelbo, CPU, m) {
  m.impl("_ppca_factor", cpu::ppca_factor_cpu);
  m.impl("_ppca_project", cpu::ppca_project_cpu);
  m.impl("_ppca_rest", cpu::ppca_rest_cpu);
  m.impl("_ppca_residual", cpu::ppca_residual_cpu);
}

}  // namespace fastelbo
