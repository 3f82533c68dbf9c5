// The objectives on the CPU: value and gradient of a loss in one pass over recon and x.
#include <torch/library.h>

#include "cpu/latent.h"
#include "cpu/likelihood.h"
#include "math/elementary.h"
#include "prepare/objective.h"

namespace fastelbo {
namespace cpu {
namespace {

using prepare::Reduction;

// Losses per datum into the returned tensor, summed in order.
void reduce(const double* losses, int64_t B, Reduction reduction, const at::Tensor& to) {
  if (reduction == Reduction::none) return write(losses, to);
  double sum = 0;
  for (int64_t b = 0; b < B; ++b) sum += losses[b];
  sum *= prepare::datum_weight(reduction, B);
  write(&sum, to);
}

void elbo_loss(prepare::ElboLoss& op) {
  const LogProbParams& p = op.rows.params;
  const int64_t K = p.K, B = p.B;
  const double beta = op.beta.value;
  const bool floored = !op.kl_params.free_bits.is_zero();
  Scratch log_p(K * B), kl(B), floored_kl(floored ? B : 0), losses(B);
  run_rows(op.rows, log_p.data());
  op.kl_params.factor.constant = beta * prepare::datum_weight(op.reduction, B);
  run_kl(op.kl_params, op.rows.is_double, kl.data(), floored_kl.data());
  const Scratch& penalty = floored ? floored_kl : kl;
  for (int64_t b = 0; b < B; ++b) {
    double sum = 0;
    for (int64_t k = 0; k < K; ++k) sum += log_p[k * B + b];
    losses[b] = baseline::times(beta, penalty[b]) - sum / double(K);
  }
  reduce(losses.data(), B, op.reduction, op.loss);
  write(log_p.data(), op.log_likelihood);
  write(kl.data(), op.kl);
}

void multi_sample_loss(prepare::MultiSampleLoss& op) {
  const MultiSampleParams& p = op.params;
  const int64_t K = p.fit.K, B = p.fit.B, D = p.fit.D;
  const bool is_double = op.rows.is_double;
  // few data: the rows are shared out instead, in the same arithmetic
  const bool by_rows = B < at::get_num_threads();
  LogProbParams& rows = op.rows.params;
  if (by_rows) {
    prepare::Likelihood values = op.rows;
    values.shared.clear();
    values.params = p.fit;
    for (View& grad : values.params.grad) grad = {};
    run_rows(values, p.weights);
    run(kernels().weigh[is_double], p, B, K * 4);
  } else {
    run(kernels().multi_sample[op.rows.info.kernel][rows.count - 1][is_double], p, B, K * D);
    for (View& grad : rows.grad) grad = {};
  }
  bool rest = !op.rows.shared.empty();
  for (const View& grad : rows.grad) rest |= bool(grad);
  if (rest) {
    rows.factor = views::rows_of(op.row_factor);
    run_rows(op.rows, nullptr);
  }
  Scratch losses(B);
  for (int64_t b = 0; b < B; ++b) losses[b] = -p.bound[b];
  reduce(losses.data(), B, op.reduction, op.loss);
}

void multi_sample_weights(prepare::MultiSampleWeights& op) {
  run(kernels().weigh[op.is_double], op.params, op.params.fit.B, op.params.fit.K * 4);
}

void log_mean_exp(prepare::LogMeanExp& op) {
  run(kernels().log_mean_exp[op.is_double], op.params, op.value.numel(), op.params.K * 2);
}

void log_mean_exp_backward(prepare::LogMeanExpBackward& op) {
  run(kernels().log_mean_exp_backward[op.is_double], op.params, op.grad.numel(), op.params.K * 3);
}

}  // namespace
}  // namespace cpu

TORCH_LIBRARY_FRAGMENT(fastelbo, m) {
  on_cpu_and_meta<ops::log_mean_exp, prepare::log_mean_exp, cpu::log_mean_exp>(m, "log_mean_exp");
  on_cpu_and_meta<ops::log_mean_exp_backward, prepare::log_mean_exp_backward, cpu::log_mean_exp_backward>(
      m, "_log_mean_exp_backward");
  on_cpu_and_meta<ops::elbo_loss, prepare::elbo_loss, cpu::elbo_loss>(m, "elbo_loss");
  on_cpu_and_meta<ops::multi_sample_loss, prepare::multi_sample_loss, cpu::multi_sample_loss>(m, "multi_sample_loss");
  on_cpu_and_meta<ops::multi_sample_weights, prepare::multi_sample_weights, cpu::multi_sample_weights>(
      m, "_multi_sample_weights");
}

}  // namespace fastelbo
