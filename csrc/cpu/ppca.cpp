// Probabilistic PCA on the CPU.
#include <torch/library.h>

#include "cpu/run.h"
#include "prepare/ppca.h"

namespace fastelbo {
namespace cpu {
namespace {

using at::Tensor;
using views::padded;

constexpr int64_t kWorkItems = 32;  // of the residual: enough for many threads, whatever N and D are

void ppca_factor(prepare::PpcaFactor& op) {
  const int64_t M = op.W.size(1);
  op.columns.copy_(op.W.t());
  const Tensor scratch = at::empty({3 * M, M}, op.whiten.options());
  PpcaFactorParams p;
  p.D = op.W.size(0), p.M = M, p.sigma = std::exp(0.5 * op.log_sigma2.to(at::kDouble).item<double>());
  p.columns = op.columns.mutable_data_ptr<double>(), p.triangle = op.triangle.mutable_data_ptr<double>();
  p.stacked = scratch.mutable_data_ptr<double>(), p.factor = p.stacked + 2 * M * M;
  p.whiten = op.whiten.mutable_data_ptr<double>();
  kernels().ppca_factor(p, 0, 1);
}

void ppca_invert(prepare::PpcaInvert& op) {
  const int64_t N = op.matrices.size(0), M = op.matrices.size(1);
  const Tensor matrices = op.matrices.contiguous(), scratch = at::empty({N, M}, matrices.options());
  PpcaInvertParams p;
  p.M = M, p.matrices = matrices.const_data_ptr<double>(), p.scratch = scratch.mutable_data_ptr<double>();
  p.inverses = op.inverses.mutable_data_ptr<double>(), p.log_det = op.log_det.mutable_data_ptr<double>();
  run(kernels().ppca_invert, p, N, M * M * M);
}

void ppca_project(prepare::PpcaProject& op) {
  const Tensor lanes = padded(op.basis, kPpcaPanel, at::kDouble), center = op.b.to(at::kDouble).contiguous();
  const bool whole = lanes.size(1) == op.coords.size(1);
  const Tensor coords = whole ? op.coords : at::empty({op.x.size(0), lanes.size(1)}, lanes.options());
  PpcaProjectParams p;
  p.N = op.x.size(0), p.D = op.x.size(1), p.lanes = lanes.size(1);
  p.x = views::view_of(op.x, 1, {}, /*unit=*/true);
  p.b = center.const_data_ptr<double>(), p.W = lanes.const_data_ptr<double>();
  p.proj = coords.mutable_data_ptr<double>(), p.square = op.square.mutable_data_ptr<double>();
  run(kernels().ppca_project, p, (p.N + kPpcaRows - 1) / kPpcaRows, kPpcaRows * p.D * p.lanes / 4);
  if (!whole) op.coords.copy_(coords.narrow(1, 0, op.coords.size(1)));
}

void ppca_rest(prepare::PpcaRest& op) {
  const Tensor Wt = padded(op.basis.t(), kPpcaPanel, at::kDouble), center = op.b.to(at::kDouble).contiguous();
  const Tensor coords = op.coords.contiguous(), square = op.square.contiguous();
  PpcaRestParams p;
  p.N = op.x.size(0), p.D = op.x.size(1), p.M = op.basis.size(1), p.share = op.safe_share;
  p.x = views::view_of(op.x, 1, {}, /*unit=*/true);
  p.b = center.const_data_ptr<double>(), p.Wt = Wt.const_data_ptr<double>(), p.stride_m = Wt.size(1);
  p.coords = coords.const_data_ptr<double>(), p.square = square.const_data_ptr<double>();
  p.rest = op.rest.mutable_data_ptr<double>();
  run(kernels().ppca_rest, p, (p.N + kPpcaRows - 1) / kPpcaRows, kPpcaRows * p.D * p.M / 4);
}

// The parameters of both kernels of sums, and how many chunks of rows there are: a number that depends on the shapes
// alone, so that threads change no digit.
int64_t set_sums(PpcaSumsParams& p, const Tensor& x, const Tensor& center, const Tensor& means, const Tensor& weights) {
  p.N = x.size(0), p.D = x.size(1), p.lanes = means.size(1);
  const int64_t blocks = (p.N + kPpcaRows - 1) / kPpcaRows, tiles = (p.D + kPpcaTile - 1) / kPpcaTile;
  const int64_t wanted = std::clamp<int64_t>(kWorkItems / std::max<int64_t>(tiles, 1), 1, std::max<int64_t>(blocks, 1));
  p.chunk = std::max<int64_t>((blocks + wanted - 1) / wanted, 1) * kPpcaRows;
  p.x = views::view_of(x, 1, {}, /*unit=*/true);
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

void ppca_residual(prepare::PpcaResidual& op) {
  const int64_t M = op.basis.size(1);
  const Tensor center = op.b.to(at::kDouble).contiguous(), weights = op.weight.contiguous();
  const Tensor coords = op.coords.contiguous();
  if (!op.residual.defined()) {  // without e itself: its sums are those of x - b, less the basis times small ones
    const Tensor means = padded(op.mean * weights.unsqueeze(1), kPpcaPanel, at::kDouble);
    const auto [crosses, sums] = moments(op.x, center, means, weights);
    const Tensor none = at::zeros({M}, means.options());
    const auto [small, smaller] = moments(coords, none, means, weights);
    const Tensor both = at::cat({small.narrow(1, 0, M), smaller.unsqueeze(1)}, 1);
    prepare::PpcaProject less = prepare::ppca_project(op.basis, both, none);
    ppca_project(less);
    if (op.cross.defined()) op.cross.copy_(crosses.narrow(1, 0, M) - less.coords.narrow(1, 0, M));
    if (op.sum.defined()) op.sum.copy_(sums - less.coords.select(1, M));
    return;
  }
  const Tensor means = padded(op.mean, kPpcaPanel, at::kDouble), rounded = means.to(op.residual.scalar_type());
  const Tensor Wt = padded(op.basis.t(), kPpcaPanel, at::kDouble);
  PpcaSumsParams p;
  const int64_t chunks = set_sums(p, op.x, center, means, weights);
  p.M = M, p.coords = coords.const_data_ptr<double>();
  p.Wt = Wt.const_data_ptr<double>(), p.stride_m = Wt.size(1);
  p.rounded_mean = rounded.const_data_ptr();
  p.residual = op.residual.mutable_data_ptr();
  const auto [crosses, sums] = run_sums(kernels().ppca_residual[views::is_double(op.b)], p, chunks, rounded.options());
  if (op.cross.defined()) op.cross.copy_(crosses.narrow(1, 0, M));
  if (op.sum.defined()) op.sum.copy_(sums);
}

}  // namespace
}  // namespace cpu

TORCH_LIBRARY_FRAGMENT(fastelbo, m) {
  on_cpu_and_meta<ops::ppca_factor, prepare::ppca_factor, cpu::ppca_factor>(m, "_ppca_factor");
  on_cpu_and_meta<ops::ppca_invert, prepare::ppca_invert, cpu::ppca_invert>(m, "_ppca_invert");
  on_cpu_and_meta<ops::ppca_project, prepare::ppca_project, cpu::ppca_project>(m, "_ppca_project");
  on_cpu_and_meta<ops::ppca_rest, prepare::ppca_rest, cpu::ppca_rest>(m, "_ppca_rest");
  on_cpu_and_meta<ops::ppca_residual, prepare::ppca_residual, cpu::ppca_residual>(m, "_ppca_residual");
}

}  // namespace fastelbo
