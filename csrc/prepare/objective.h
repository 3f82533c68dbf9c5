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

struct ElboLossForward {
  Likelihood rows;
  Reduction reduction;
  double beta;
  OptionalTensor beta_tensor;
  LatentOutputs latent_grads;
  Tensor loss, log_likelihood, kl, grad_recon, grad_second, grad_third;
  Views views{0};  // of the latents
  KlParams kl_params;

  ElboForward result() {
    rows.views.finish(), views.finish();
    const LatentOutputs& g = latent_grads;
    return {loss, log_likelihood, kl, grad_recon, g.mu, g.logvar, g.prior_mu, g.prior_logvar, grad_second, grad_third};
  }
};

inline ElboLossForward elbo_loss_forward(const Tensor& recon, const Tensor& x, const Tensor& mu, const Tensor& logvar,
                                         const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                                         const OptionalTensor& second, const OptionalTensor& third,
                                         const OptionalTensor& mask, double beta, const OptionalTensor& beta_tensor,
                                         double free_bits, std::string_view likelihood, std::string_view reduction,
                                         std::array<bool, 7> needs) {
  Likelihood rows(recon, x, second, third, mask, likelihood);
  checks::latent(mu, logvar, prior_mu, prior_logvar);
  checks::elbo_loss(recon, x, mu, beta_tensor);
  checks::free_bits(free_bits);
  ElboLossForward op{std::move(rows),
                     checks::reduction(reduction),
                     beta,
                     beta_tensor,
                     {mu, logvar, prior_mu, prior_logvar, needs.data() + 1}};
  op.loss = shapes::loss_like(recon, x, op.reduction);
  op.log_likelihood = shapes::rows_like(recon, x);
  op.kl = shapes::batch_like(recon, x);
  op.grad_recon = op.rows.grad(0, recon, needs[0]);
  op.grad_second = op.rows.grad(1, second, needs[5]);
  op.grad_third = op.rows.grad(2, third, needs[6]);
  if (recon.is_meta()) return op;
  op.views = Views(mu.dim() - 1);
  op.kl_params.q = latents(op.views, mu, logvar, prior_mu, prior_logvar);
  op.kl_params.grad = op.latent_grads.views(op.views);
  op.kl_params.free_bits = free_bits;
  op.rows.params.factor.constant = -datum_weight(op.reduction, op.rows.params.B) / double(op.rows.params.K);
  return op;
}

struct MultiSampleLossForward {
  Likelihood rows;
  Reduction reduction;
  Tensor loss, log_likelihood, grad_recon, grad_log_ratio, grad_gates, grad_second, grad_third;
  Tensor ratio, weights, bound, row_factor;  // [K, B] compute type; [K, B] and [B] float64; [K, B] compute type
  MultiSampleParams params;                  // its fit: the gradients of full size

  MultiSampleForward result() {
    rows.views.finish();
    return {loss, log_likelihood, grad_recon, grad_log_ratio, grad_gates, grad_second, grad_third};
  }
};

inline MultiSampleLossForward multi_sample_loss_forward(const Tensor& recon, const Tensor& x, const Tensor& log_ratio,
                                                        const OptionalTensor& gates, const OptionalTensor& second,
                                                        const OptionalTensor& third, const OptionalTensor& mask,
                                                        std::string_view likelihood, at::ArrayRef<double> estimator,
                                                        std::string_view reduction, std::array<bool, 5> needs) {
  MultiSampleLossForward op{Likelihood(recon, x, second, third, mask, likelihood), checks::reduction(reduction)};
  checks::multi_sample_loss(recon, x, log_ratio, gates);
  const Estimator e = checks::estimator(estimator, recon.sym_size(0));
  op.loss = shapes::loss_like(recon, x, op.reduction);
  op.log_likelihood = shapes::rows_like(recon, x);
  op.grad_recon = op.rows.grad(0, recon, needs[0]);
  op.grad_log_ratio = shapes::grad_like(OptionalTensor(log_ratio), needs[1]);
  op.grad_gates = shapes::grad_like(gates, needs[2]);
  op.grad_second = op.rows.grad(1, second, needs[3]);
  op.grad_third = op.rows.grad(2, third, needs[4]);
  if (recon.is_meta()) return op;
  LogProbParams& rows = op.rows.params;
  const int64_t K = rows.K, B = rows.B;
  const auto type = checks::compute_type(recon);
  MultiSampleParams& p = op.params;
  p.fit = rows;
  p.fit.chunk = 1;
  for (SharedGrad& g : p.fit.shared_grad) g = {};
  p.estimator = e;
  op.ratio = log_ratio.to(type);
  p.log_ratio = views::rows_of(op.ratio);
  p.datum_weight = datum_weight(op.reduction, B);
  op.weights = at::empty({K, B}, recon.options().dtype(at::kDouble));
  op.bound = at::empty({B}, op.weights.options());
  p.weights = op.weights.mutable_data_ptr<double>(), p.bound = op.bound.mutable_data_ptr<double>();
  p.log_p = op.log_likelihood.mutable_data_ptr();
  // the gradient of the log ratio is the factor of every row's gradient
  if (op.grad_log_ratio.defined()) {
    op.row_factor = op.rows.views.dense(op.grad_log_ratio, type);
  } else if (needs[0] || !op.rows.shared.empty() || needs[3] || needs[4]) {
    op.row_factor = at::empty({K, B}, op.ratio.options());
  }
  if (op.row_factor.defined()) p.row_factor = op.row_factor.mutable_data_ptr();
  if (op.grad_gates.defined()) p.gates = op.rows.views.dense(op.grad_gates, type).mutable_data_ptr();
  return op;
}

struct MultiSampleWeights {
  Tensor bound, weights, gates;
  bool is_double = false;
  Tensor double_weights, double_bound;
  MultiSampleParams params;

  Weights result() {
    if (double_bound.defined()) bound.copy_(double_bound);
    return {bound, weights, gates};
  }
};

inline MultiSampleWeights multi_sample_weights(const Tensor& log_w, at::ArrayRef<double> estimator) {
  checks::floating("log_w", log_w);
  TORCH_CHECK_VALUE(log_w.dim() == 2, "log_w must be [K, B]; got ", checks::shape_text(log_w));
  const c10::SymInt K = log_w.sym_size(0), B = log_w.sym_size(1);
  TORCH_CHECK_VALUE(K != 0, "log_w must hold at least one sample; got the shape ", checks::shape_text(log_w));
  const Estimator e = checks::estimator(estimator, K);
  const auto options = shapes::compute_options(log_w);
  MultiSampleWeights op{at::empty_symint({B}, options), at::empty_symint({K, B}, options),
                        at::empty_symint({2, K, B}, options), views::is_double(log_w)};
  if (log_w.is_meta()) return op;
  op.double_weights = log_w.to(at::kDouble, /*non_blocking=*/false, /*copy=*/true).contiguous();
  op.double_bound = at::empty({log_w.size(1)}, op.double_weights.options());
  MultiSampleParams& p = op.params;
  p.fit.K = log_w.size(0), p.fit.B = log_w.size(1);
  p.estimator = e;
  p.datum_weight = -1;  // the weights themselves
  p.weights = op.double_weights.mutable_data_ptr<double>(), p.bound = op.double_bound.mutable_data_ptr<double>();
  p.row_factor = op.weights.mutable_data_ptr(), p.gates = op.gates.mutable_data_ptr();
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
