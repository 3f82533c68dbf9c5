// The objectives on CUDA devices: value and gradient of a loss.
#include <torch/library.h>

#include "cuda/latent.h"
#include "cuda/likelihood.h"
#include "ops.h"
#include "shapes.h"

namespace fastelbo {
namespace {

using namespace ops;
using namespace cuda;
using namespace views;
using checks::Reduction;

// Fewer data than this leave most of a device idle where a block works on each alone.
constexpr int64_t kFewData = 64;

ElboForward elbo_loss_forward_cuda(const Tensor& recon, const Tensor& x, const Tensor& mu, const Tensor& logvar,
                                   const OptionalTensor& scale, const OptionalTensor& mask, double beta,
                                   const OptionalTensor& beta_tensor, double free_bits, std::string_view likelihood,
                                   std::string_view reduction_name, std::array<bool, 4> needs) {
  const int index = checks::elbo_loss(recon, x, mu, logvar, scale, mask, beta_tensor, free_bits, likelihood);
  const Reduction reduction = checks::reduction(reduction_name);
  const OnDeviceOf device(recon);
  const OptionalTensor r = recon, m = mu, lv = logvar;
  ElboForward result{shapes::loss_like(recon, x, reduction), shapes::rows_like(recon, x), shapes::batch_like(recon, x),
                     shapes::grads_like({&r, &m, &lv, &scale}, needs.data())};
  auto& [loss, log_likelihood, kl, grads] = result;

  Views views = data_views(recon, x), latents = latent_views(mu);
  RowsParams p;
  p.fit = log_prob_params(views, recon, x, scale, mask);
  set_latent(p.kl, latents, mu, logvar, std::nullopt, std::nullopt);
  if (beta_tensor.has_value()) beta = 1;
  p.beta = scalar_of(beta_tensor);
  p.fit.grad.constant = p.fit_share = -share(reduction, p.fit.B) / double(p.fit.K);
  p.kl.grad.constant = p.kl_share = beta * share(reduction, p.fit.B);
  size_t next = 0;
  if (needs[0]) p.fit.grad_recon = views.out(grads[next++]);
  if (needs[1]) p.kl.grad_mu = latents.out(grads[next++]);
  if (needs[2]) p.kl.grad_logvar = latents.out(grads[next++]);
  if (needs[3] && scale.has_value()) p.fit.grad_scale = views.out(grads[next]);
  const Tensor means = set_free_bits(p.kl, mu, free_bits, device.stream());
  p.kl_out = kl.mutable_data_ptr();

  TotalMemory memory;
  Tensor charged;
  if (reduction != Reduction::none) {
    p.total = memory.total(recon, loss);
    if (p.fit.B == 0) loss.fill_(reduction == Reduction::mean ? NAN : 0);  // no block, no total
  } else {
    charged = free_bits > 0 ? at::empty_like(kl) : kl;
    if (free_bits > 0) p.charged = charged.mutable_data_ptr();
  }
  RowSums sums(p, recon, log_likelihood);
  launch_rows(p, index, scale.has_value(), is_double(recon), device.stream());
  sums.finish(p, is_double(recon), device.stream());
  views.finish(), latents.finish();
  if (reduction == Reduction::none) {
    const Tensor fit = recon.dim() > x.dim() ? log_likelihood.mean(0) : log_likelihood;
    const Tensor weighted = beta_tensor.has_value() ? charged * beta_tensor->to(charged.scalar_type()) : charged * beta;
    loss.copy_(weighted - fit);
  }
  return result;
}

MultiSampleForward multi_sample_loss_forward_cuda(const Tensor& recon, const Tensor& x, const Tensor& log_ratio,
                                                  const OptionalTensor& gates, const OptionalTensor& scale,
                                                  const OptionalTensor& mask, std::string_view likelihood,
                                                  std::string_view reduction_name, double elbo_share, double alpha,
                                                  int64_t groups, double path, double path_weight, double score,
                                                  std::array<bool, 4> needs) {
  MultiSampleParams p;
  p.estimator = {elbo_share, alpha, groups, path, path_weight, score};
  const int index = checks::multi_sample_loss(recon, x, log_ratio, gates, scale, mask, likelihood, p.estimator);
  const Reduction reduction = checks::reduction(reduction_name);
  const OnDeviceOf device(recon);
  const bool wide = is_double(recon);
  const OptionalTensor r = recon, lr = log_ratio;
  MultiSampleForward result{shapes::loss_like(recon, x, reduction), shapes::rows_like(recon, x),
                            shapes::grads_like({&r, &lr, &gates, &scale}, needs.data())};
  auto& [loss, log_likelihood, grads] = result;

  Views views = data_views(recon, x);
  p.fit = log_prob_params(views, recon, x, scale, mask);
  const int64_t K = p.fit.K, B = p.fit.B, D = p.fit.D;
  const Tensor ratio = log_ratio.to(checks::compute_type(recon));
  p.log_ratio = rows_of(ratio);
  p.log_p = log_likelihood.mutable_data_ptr();
  const Tensor weights = doubles(recon, {K, B});
  p.weights = weights.mutable_data_ptr<double>();
  p.share = share(reduction, B);
  size_t next = 0;
  if (needs[0]) p.fit.grad_recon = views.out(grads[next++]);
  if (needs[1]) p.grad_log_ratio = views.dense(grads[next++], loss.scalar_type()).mutable_data_ptr();
  if (needs[2] && gates.has_value()) {
    p.grad_gates = views.dense(grads[next++], loss.scalar_type()).mutable_data_ptr();
  }
  if (needs[3] && scale.has_value()) p.fit.grad_scale = views.out(grads[next]);
  TotalMemory memory;
  if (reduction == Reduction::none) {
    p.bound = loss.mutable_data_ptr();
  } else {
    p.total = memory.total(recon, loss);
    if (B == 0) loss.fill_(reduction == Reduction::mean ? NAN : 0);
  }
  if (D <= kSegment && (B >= kFewData || K * D < kSegment)) {
    launch_multi_sample(p, index, scale.has_value(), wide, device.stream());
    views.finish();
    return result;
  }
  RowsParams rows;
  rows.fit = p.fit;
  rows.fit.grad_recon = rows.fit.grad_scale = {};
  const Tensor parts = doubles(recon, {K * B * segments(D)});
  p.fit.out = rows.fit.out = parts.mutable_data_ptr<double>();
  launch_rows(rows, index, scale.has_value(), wide, device.stream());
  p.given = true;
  Tensor row_grad;
  if (needs[0] || p.fit.grad_scale) {
    row_grad = at::empty({K, B}, shapes::compute_options(recon));
    p.row_grad = row_grad.mutable_data_ptr();
  }
  launch_multi_sample(p, index, scale.has_value(), wide, device.stream());
  if (p.row_grad) {
    rows.fit = p.fit;
    rows.fit.out = nullptr;
    rows.fit.grad = rows_of(row_grad);
    launch_rows(rows, index, scale.has_value(), wide, device.stream());
  }
  views.finish();
  return result;
}

Tensor log_mean_exp_cuda(const Tensor& log_w, int64_t dim) {
  const int64_t d = checks::log_mean_exp(log_w, dim);
  const OnDeviceOf device(log_w);
  const Tensor result = shapes::reduced_like(log_w, d);
  const Tensor w = log_w.to(result.scalar_type()).contiguous();
  LogMeanExpParams p = log_mean_exp_params(w, d);
  p.out = result.mutable_data_ptr();
  launch_log_mean_exp(p, result.numel(), is_double(w), device.stream());
  return result;
}

Tensor log_mean_exp_backward_cuda(const Tensor& grad, const Tensor& log_w, int64_t dim) {
  const int64_t d = checks::log_mean_exp_backward(grad, log_w, dim);
  const OnDeviceOf device(log_w);
  const Tensor w = log_w.to(checks::compute_type(log_w)).contiguous(), g = grad.contiguous();
  const Tensor result = at::empty_like(w, at::MemoryFormat::Contiguous);
  LogMeanExpParams p = log_mean_exp_params(w, d);
  p.grad = g.const_data_ptr();
  p.grad_log_w = result.mutable_data_ptr();
  launch_log_mean_exp(p, g.numel(), is_double(w), device.stream());
  return result.to(log_w.scalar_type());
}

void scale_cuda(const Tensor& t, const Tensor& factor) {
  const OnDeviceOf device(t);
  launch_scale(view_of(t.as_strided({t.numel()}, {1}), 1), t.numel(), scalar_of(factor), device.stream());
}

}  // namespace

TORCH_LIBRARY_IMPL(fastelbo, FASTELBO_CUDA_KEY, m) {
  m.impl("log_mean_exp", log_mean_exp_cuda);
  m.impl("_log_mean_exp_backward", log_mean_exp_backward_cuda);
  m.impl("_elbo_loss_forward", elbo_loss_forward_cuda);
  m.impl("_multi_sample_loss_forward", multi_sample_loss_forward_cuda);
  m.impl("_scale_", scale_cuda);
}

}  // namespace fastelbo
