// Mixtures on the CPU.
#include <torch/library.h>

#include "cpu/run.h"
#include "prepare/mixture.h"

namespace fastelbo {
namespace cpu {
namespace {

using at::Tensor;

constexpr double kSumBytes = 6.75e6;  // that the sums of all segments of rows may take, unless one takes more
constexpr int64_t kMostSegments = 4;

void run_components(const prepare::Mixture& op) {
  run(kernels().mixture_components[op.is_double], op.components, op.components.C, op.components.M * 8);
}

// What a block of rows takes, in the elements that kGrain counts.
int64_t block_work(const MixtureParams& p) { return mixture_rows(p.N) * p.C * (p.M / 4 + 2) / 2; }

void mixture_log_prob(prepare::MixtureLogProb& op) {
  run_components(op);
  run(kernels().mixture[op.is_double], op.params, mixture_blocks(op.params.N), block_work(op.params));
}

// Segments of rows, each with sums of its own that are then added in order: as many as their memory allows, whatever
// the number of threads.
int64_t segments_of(const MixtureParams& p) {
  const double bytes = 8.0 * double(p.C) * double(2 * p.M + 1);
  const int64_t blocks = std::max<int64_t>(mixture_blocks(p.N), 1);
  const auto wanted = std::clamp<int64_t>(int64_t(kSumBytes / bytes), 1, kMostSegments);
  const int64_t segment = (blocks + wanted - 1) / wanted;
  return (blocks + segment - 1) / segment;
}

void mixture_log_prob_backward(prepare::MixtureLogProbBackward& op) {
  const MixtureParams& of = op.backward.of;
  const auto kernel = kernels().mixture_backward[op.is_double];
  const int64_t blocks = mixture_blocks(of.N), C = of.C, M = of.M, threads = at::get_num_threads();
  run_components(op);
  // rows of the same weights add to the same gradient: all are in one segment, whichever gradients are needed
  const int64_t segments = of.weight_rows > 1 ? 1 : segments_of(of);
  const bool apart = of.weight_rows > 1 && op.own_weights.defined();
  const auto doubles = op.inv_std.options().dtype(at::kDouble);
  Tensor sums, weight_sums;
  MixtureBackwardParams& p = op.backward;
  p.range = C;
  if (op.grad_mu.defined() || op.grad_logvar.defined()) {
    sums = at::empty({segments, 2, C, M}, doubles);
    p.sums = sums.mutable_data_ptr<double>();
  }
  if (op.shared_weights.defined()) {
    weight_sums = at::empty({segments, C}, doubles);
    p.weight_sums = weight_sums.mutable_data_ptr<double>();
  }
  const bool components = op.any_sums() || apart;  // whether there are gradients that sum over rows
  // in one pass, a thread takes a segment; in two, which cost half as much again, all threads work: the same sums
  const bool two = components && p.grad_z && (apart || 2 * threads > 3 * segments);
  if (p.grad_z && (two || !components)) {
    MixtureBackwardParams rows = p;
    rows.sums = rows.weight_sums = nullptr;
    if (apart) rows.grad_weights = {};
    rows.segments = blocks, rows.segment = 1;
    run(kernel, rows, blocks, block_work(of) * 2);
    p.grad_z = {};
    if (!apart) p.grad_weights = {};
  }
  if (components || p.grad_weights) {
    p.segments = segments, p.segment = std::max<int64_t>((blocks + segments - 1) / segments, 1);
    if (!p.grad_z) {
      const int64_t tiles = (C + kMixtureTile - 1) / kMixtureTile, wanted = (2 * threads + segments - 1) / segments;
      p.range = (tiles + wanted - 1) / wanted * kMixtureTile;
      p.ranges = (C + p.range - 1) / p.range;
    }
    run(kernel, p, p.segments * p.ranges, p.segment * block_work(of) * 3 / p.ranges);
  }
  if (!op.any_sums()) return;
  MixtureSumsParams& s = op.sums;
  s.segments = segments, s.sums = p.sums, s.weight_sums = p.weight_sums;
  run(kernels().mixture_sums[op.is_double], s, C, M * segments * 2);
}

}  // namespace
}  // namespace cpu

TORCH_LIBRARY_FRAGMENT(fastelbo, m) {
  on_cpu_and_meta<ops::mixture_log_prob, prepare::mixture_log_prob, cpu::mixture_log_prob>(m, "mixture_log_prob");
  on_cpu_and_meta<ops::mixture_log_prob_backward, prepare::mixture_log_prob_backward, cpu::mixture_log_prob_backward>(
      m, "_mixture_log_prob_backward");
}

}  // namespace fastelbo
