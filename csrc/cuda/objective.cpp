// The objectives on CUDA devices: value and gradient of a loss.
#include <torch/library.h>

#include "cuda/latent.h"
#include "cuda/likelihood.h"
#include "prepare/implement.h"
#include "prepare/objective.h"

namespace fastelbo {
namespace cuda {
namespace {

using at::Tensor;
using prepare::Reduction;

// Whether a block for every datum leaves at most a third of the device idle, by the last wave of blocks. Three launches
// that share out the samples keep all of it busy, for 12 bytes per element in place of 8.
bool fills_device(int64_t data) {
  const int64_t slots = kRowBlocks * multiprocessors(), waves = (data + slots - 1) / slots;
  return 3 * data >= 2 * slots * waves;
}

void elbo_loss(prepare::ElboLoss& op) {
  const OnDeviceOf device(op.loss);
  const bool is_double = op.rows.is_double;
  RowsParams p;
  p.fit = op.rows.params;
  p.kl = op.kl_params;
  p.beta = op.beta;
  p.fit_weight = p.fit.factor.constant;
  p.kl.factor.constant = p.kl_weight = prepare::datum_weight(op.reduction, p.fit.B);
  const Tensor means = set_dim_means(p.kl, op.kl, is_double, device.stream());
  p.kl_out = op.kl.mutable_data_ptr();

  TotalMemory memory;
  Tensor penalty = op.kl;
  if (op.reduction != Reduction::none) {
    p.total = memory.total(op.kl, op.loss);
    if (p.fit.B == 0) op.loss.fill_(op.reduction == Reduction::mean ? NAN : 0);  // no block, no total
  } else if (means.defined()) {
    penalty = at::empty_like(op.kl);
    p.floored_kl = penalty.mutable_data_ptr();
  }
  RowSums sums(p, op.log_likelihood);
  launch_rows(p, op.rows.info.kernel, is_double, device.stream());
  sums.finish(p, is_double, device.stream());
  run_shared_grads(op.rows, device.stream());
  if (op.reduction == Reduction::none) {
    const Tensor fit = op.log_likelihood.dim() == 2 ? op.log_likelihood.mean(0) : op.log_likelihood;
    if (op.weight.has_value()) {  // a weight of 0 leaves no KL, even an infinite one
      const Tensor beta = op.weight->to(penalty.scalar_type());
      penalty = (penalty * beta).masked_fill(penalty.isinf().logical_and(beta.eq(0)), 0);
    }
    op.loss.copy_(penalty - fit);
  }
}

void multi_sample_loss(prepare::MultiSampleLoss& op) {
  const OnDeviceOf device(op.loss);
  const bool is_double = op.rows.is_double;
  MultiSampleParams& p = op.params;
  const int64_t K = p.fit.K, B = p.fit.B, D = p.fit.D;
  TotalMemory memory;
  Total total;
  if (op.reduction != Reduction::none) {
    total = memory.total(op.weights, op.loss);
    if (B == 0) op.loss.fill_(op.reduction == Reduction::mean ? NAN : 0);
  }
  LogProbParams& rest = op.rows.params;  // what is left for a launch after the weights
  Tensor parts;
  // a tempered bound takes the other way: see math/weights.h
  if (!op.rows.info.by_element && p.estimator.alpha.is_zero() && D <= kSegment &&
      (fills_device(B) || K * D < kSegment)) {
    launch_multi_sample(p, total, op.rows.info.kernel, is_double, device.stream());
    for (View& grad : rest.grad) grad = {};
  } else {
    RowsParams values;
    values.fit = p.fit;
    for (View& grad : values.fit.grad) grad = {};
    parts = doubles(op.weights, {K * B * segments(D)});
    p.fit.log_p = values.fit.log_p = parts.mutable_data_ptr<double>();
    launch_rows(values, op.rows.info.kernel, is_double, device.stream());
    launch_weigh(p, total, is_double, device.stream());
  }
  if (op.row_factor.defined()) rest.factor = views::rows_of(op.row_factor);
  if (rest.any_grad()) {
    RowsParams grads;
    grads.fit = rest;
    launch_rows(grads, op.rows.info.kernel, is_double, device.stream());
  }
  run_shared_grads(op.rows, device.stream());
  if (op.reduction == Reduction::none) op.loss.copy_(op.bound.neg());
}

void multi_sample_weights(prepare::MultiSampleWeights& op) {
  const OnDeviceOf device(op.weights);
  launch_weigh(op.params, Total(), op.is_double, device.stream());
}

void log_mean_exp(prepare::LogMeanExp& op) {
  const OnDeviceOf device(op.value);
  launch_log_mean_exp(op.params, op.value.numel(), op.is_double, device.stream());
}

void log_mean_exp_backward(prepare::LogMeanExpBackward& op) {
  const OnDeviceOf device(op.grad);
  launch_log_mean_exp(op.params, op.grad.numel(), op.is_double, device.stream());
}

void scale(const Tensor& t, const Tensor& factor) {
  const OnDeviceOf device(t);
  launch_scale(views::view_of(t.as_strided({t.numel()}, {1}), 1), t.numel(), views::number_of(factor, 1),
               device.stream());
}

}  // namespace
}  // namespace cuda

TORCH_LIBRARY_IMPL(fastelbo, FASTELBO_CUDA_KEY, m) {
  m.impl("log_mean_exp", implement<ops::log_mean_exp, prepare::log_mean_exp, cuda::log_mean_exp>);
  m.impl("_log_mean_exp_backward",
         implement<ops::log_mean_exp_backward, prepare::log_mean_exp_backward, cuda::log_mean_exp_backward>);
  m.impl("elbo_loss", implement<ops::elbo_loss, prepare::elbo_loss, cuda::elbo_loss>);
  m.impl("multi_sample_loss", implement<ops::multi_sample_loss, prepare::multi_sample_loss, cuda::multi_sample_loss>);
  m.impl("_multi_sample_weights",
         implement<ops::multi_sample_weights, prepare::multi_sample_weights, cuda::multi_sample_weights>);
  m.impl("_scale_", cuda::scale);
}

}  // namespace fastelbo
