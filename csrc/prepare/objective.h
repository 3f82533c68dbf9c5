// The objectives: checks, outputs, and what the kernels take.
#pragma once

#include "prepare/latent.h"
#include "prepare/likelihood.h"

namespace fastelbo::prepare {

using checks::Reduction;

// Of every datum's loss in the returned one.
inline double datum_weight(Reduction reduction, int64_t B) {
  return reduction == Reduction::mean ? 1.0 / double(B) : 1.0;
}

struct ElboLoss {
  Likelihood rows;
  Reduction reduction;
  OptionalTensor weight;  // beta
  Number beta;
  LatentOutputs latent_grads;
  Tensor loss, log_likelihood, kl;
  ParameterGrads grads;
  Views views{0};  // of the latents
  KlParams kl_params;

  ops::ElboLoss result() {
    rows.views.finish(), views.finish();
    return std::tuple_cat(std::tuple(loss, log_likelihood, kl), grads, latent_grads.sums());
  }
};

// Whether a loss is asked for its gradient number i.
inline bool wants(int64_t needs, size_t i) { return needs >> i & 1; }

inline ElboLoss elbo_loss(const ElboInputs& in) {
  const Tensor &x = in.x, &mu = in.mu;
  Likelihood rows(in.parameters, x, in.mask, in.likelihood);
  const Tensor& recon = in.parameters[0];
  checks::latent(mu, in.logvar, in.prior_mu, in.prior_logvar);
  checks::elbo_loss(recon, x, mu, in.beta);
  checks::free_bits(in.free_bits, mu);
  const auto needs = [&](size_t i) { return wants(in.needs, kMaxParameters + i); };
  ElboLoss op{std::move(rows),
              checks::reduction(in.reduction),
              in.beta,
              {},
              {mu, in.logvar, in.prior_mu, in.prior_logvar, {needs(0), needs(1), needs(2), needs(3)}}};
  op.loss = shapes::loss_like(recon, x, op.reduction);
  op.log_likelihood = shapes::rows_like(recon, x);
  op.kl = shapes::batch_like(recon, x);
  op.grads = op.rows.grads(in.parameters, [&](size_t i) { return wants(in.needs, i); });
  if (recon.is_meta()) return op;
  op.beta = views::number_of(in.beta, 1);
  op.views = Views(mu.dim() - 1);
  op.kl_params.q = latents(op.views, mu, in.logvar, in.prior_mu, in.prior_logvar);
  op.kl_params.grad = op.latent_grads.views(op.views);
  op.kl_params.free_bits = views::number_of(in.free_bits, 0);
  op.rows.params.factor.constant = -datum_weight(op.reduction, op.rows.params.B) / double(op.rows.params.K);
  return op;
}

inline Estimator estimator(const OptionalTensor& elbo_weight, const OptionalTensor& alpha, int64_t groups,
                           at::ArrayRef<double> coefficients) {
  return {views::number_of(elbo_weight, 0),
          views::number_of(alpha, 0),
          groups,
          coefficients[0],
          coefficients[1],
          coefficients[2]};
}

struct MultiSampleLoss {
  Likelihood rows;
  Reduction reduction;
  Tensor loss, log_likelihood, grad_log_ratio, grad_gates;
  ParameterGrads grads;
  Tensor ratio, weights, bound, row_factor;  // [K, B] compute type; [K, B] and [B] float64; [K, B] compute type
  MultiSampleParams params;                  // its fit: the gradients of full size

  ops::MultiSampleLoss result() {
    rows.views.finish();
    return std::tuple_cat(std::tuple(loss, log_likelihood), grads, std::tuple(grad_log_ratio, grad_gates));
  }
};

inline MultiSampleLoss multi_sample_loss(const MultiSampleInputs& in) {
  MultiSampleLoss op{Likelihood(in.parameters, in.x, in.mask, in.likelihood), checks::reduction(in.reduction)};
  const Tensor &recon = in.parameters[0], &x = in.x, &log_ratio = in.log_ratio;
  checks::multi_sample_loss(recon, x, log_ratio);
  checks::gates(in.gates, log_ratio);
  checks::estimator(in.elbo_weight, in.alpha, in.groups, in.coefficients, recon.sym_size(0), recon);
  op.loss = shapes::loss_like(recon, x, op.reduction);
  op.log_likelihood = shapes::rows_like(recon, x);
  op.grads = op.rows.grads(in.parameters, [&](size_t i) { return wants(in.needs, i); });
  op.grad_log_ratio = shapes::grad_like(OptionalTensor(log_ratio), wants(in.needs, kMaxParameters));
  op.grad_gates = shapes::grad_like(in.gates, wants(in.needs, kMaxParameters + 1));
  if (recon.is_meta()) return op;
  const LogProbParams& rows = op.rows.params;
  const auto type = checks::compute_type(recon);
  MultiSampleParams& p = op.params;
  p.fit = rows;
  p.fit.chunk = 1;
  for (SharedGrad& g : p.fit.shared_grad) g = {};
  p.estimator = estimator(in.elbo_weight, in.alpha, in.groups, in.coefficients);
  op.ratio = log_ratio.to(type);
  p.log_ratio = views::rows_of(op.ratio);
  p.datum_weight = datum_weight(op.reduction, rows.B);
  op.weights = at::empty({rows.K, rows.B}, recon.options().dtype(at::kDouble));
  op.bound = at::empty({rows.B}, op.weights.options());
  p.weights = op.weights.mutable_data_ptr<double>(), p.bound = op.bound.mutable_data_ptr<double>();
  p.log_p = op.log_likelihood.mutable_data_ptr();
  // the gradient of the log ratio is the factor of every row's gradient
  if (op.grad_log_ratio.defined()) {
    op.row_factor = op.rows.views.dense(op.grad_log_ratio, type);
  } else if (in.needs) {
    op.row_factor = at::empty({rows.K, rows.B}, op.ratio.options());
  }
  if (op.row_factor.defined()) p.row_factor = op.row_factor.mutable_data_ptr();
  if (op.grad_gates.defined()) p.gates = op.rows.views.dense(op.grad_gates, type).mutable_data_ptr();
  return op;
}

struct MultiSampleWeights {
  Tensor bound, weights, gates, slopes;
  bool is_double = false;
  Tensor double_weights, double_bound, double_slopes;
  MultiSampleParams params;

  Weights result() {
    if (double_bound.defined()) bound.copy_(double_bound);
    if (double_slopes.defined()) slopes.copy_(double_slopes);
    return {bound, weights, gates, slopes};
  }
};

inline MultiSampleWeights multi_sample_weights(const Tensor& log_w, const OptionalTensor& elbo_weight,
                                               const OptionalTensor& alpha, int64_t groups,
                                               at::ArrayRef<double> coefficients, bool slopes) {
  checks::floating("log_w", log_w);
  TORCH_CHECK_VALUE(log_w.dim() == 2, "log_w must be [K, B]; got ", checks::shape_text(log_w));
  const c10::SymInt K = log_w.sym_size(0), B = log_w.sym_size(1);
  TORCH_CHECK_VALUE(K != 0, "log_w must hold at least one sample; got the shape ", checks::shape_text(log_w));
  checks::estimator(elbo_weight, alpha, groups, coefficients, K, log_w);
  const auto options = shapes::compute_options(log_w);
  MultiSampleWeights op{at::empty_symint({B}, options), at::empty_symint({K, B}, options),
                        at::empty_symint({2, K, B}, options), slopes ? at::empty_symint({2, B}, options) : Tensor(),
                        views::is_double(log_w)};
  if (log_w.is_meta()) return op;
  op.double_weights = log_w.to(at::kDouble, /*non_blocking=*/false, /*copy=*/true).contiguous();
  op.double_bound = at::empty({log_w.size(1)}, op.double_weights.options());
  MultiSampleParams& p = op.params;
  p.fit.K = log_w.size(0), p.fit.B = log_w.size(1);
  p.estimator = estimator(elbo_weight, alpha, groups, coefficients);
  p.datum_weight = -1;  // the weights themselves
  p.weights = op.double_weights.mutable_data_ptr<double>(), p.bound = op.double_bound.mutable_data_ptr<double>();
  p.row_factor = op.weights.mutable_data_ptr(), p.gates = op.gates.mutable_data_ptr();
  if (slopes) {
    op.double_slopes = at::empty({2, log_w.size(1)}, op.double_weights.options());
    p.slopes = op.double_slopes.mutable_data_ptr<double>();
  }
  return op;
}

struct LogMeanExp {
  Tensor value;
  bool is_double = false;
  Tensor log_w;  // contiguous, in the compute type
  LogMeanExpParams params;

  Tensor result() { return value; }
};

inline LogMeanExp log_mean_exp(const Tensor& log_w, int64_t dim) {
  const int64_t d = checks::log_mean_exp(log_w, dim);
  LogMeanExp op{shapes::reduced_like(log_w, d), views::is_double(log_w)};
  if (log_w.is_meta()) return op;
  op.log_w = log_w.to(op.value.scalar_type()).contiguous();
  op.params = views::log_mean_exp_params(op.log_w, d);
  op.params.out = op.value.mutable_data_ptr();
  return op;
}

struct LogMeanExpBackward {
  Tensor grad_log_w;
  bool is_double = false;
  Tensor log_w, grad, computed;  // contiguous, in the compute type
  LogMeanExpParams params;

  Tensor result() {
    if (computed.defined() && !computed.is_same(grad_log_w)) grad_log_w.copy_(computed);
    return grad_log_w;
  }
};

inline LogMeanExpBackward log_mean_exp_backward(const Tensor& grad, const Tensor& log_w, int64_t dim) {
  const int64_t d = checks::log_mean_exp_backward(grad, log_w, dim);
  LogMeanExpBackward op{at::empty_like(log_w, at::MemoryFormat::Contiguous), views::is_double(log_w)};
  if (log_w.is_meta()) return op;
  const auto type = checks::compute_type(log_w);
  op.log_w = log_w.to(type).contiguous(), op.grad = grad.contiguous();
  op.computed = op.grad_log_w.scalar_type() == type ? op.grad_log_w : at::empty_like(op.log_w);
  op.params = views::log_mean_exp_params(op.log_w, d);
  op.params.grad = op.grad.const_data_ptr();
  op.params.grad_log_w = op.computed.mutable_data_ptr();
  return op;
}

}  // namespace fastelbo::prepare
