// The objectives on the CPU: value and gradient of a loss in one pass over recon and x.
#include <torch/library.h>

#include "cpu/latent.h"
#include "cpu/likelihood.h"
#include "ops.h"
#include "shapes.h"

namespace fastelbo {
namespace {

using namespace ops;
using namespace cpu;
using checks::Reduction;

double scalar_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return *t.const_data_ptr<float>();
    case at::kDouble: return *t.const_data_ptr<double>();
    default: return t.item<double>();
  }
}

// Losses per datum (contiguous doubles) into the returned tensor, summed in order.
void reduce(const double* losses, int64_t B, Reduction reduction, const Tensor& to) {
  if (reduction == Reduction::none) return write(losses, to);
  double sum = 0;
  for (int64_t b = 0; b < B; ++b) sum += losses[b];
  sum *= share(reduction, B);
  write(&sum, to);
}

ElboForward elbo_loss_forward_cpu(const Tensor& recon, const Tensor& x, const Tensor& mu, const Tensor& logvar,
                                  const OptionalTensor& scale, const OptionalTensor& mask, double beta,
                                  const OptionalTensor& beta_tensor, double free_bits, std::string_view likelihood,
                                  std::string_view reduction_name, std::array<bool, 4> needs) {
  const int index = checks::elbo_loss(recon, x, mu, logvar, scale, mask, beta_tensor, free_bits, likelihood);
  const Reduction reduction = checks::reduction(reduction_name);
  if (beta_tensor.has_value()) beta = scalar_of(*beta_tensor);
  const OptionalTensor r = recon, m = mu, lv = logvar;
  ElboForward result{shapes::loss_like(recon, x, reduction), shapes::rows_like(recon, x), shapes::batch_like(recon, x),
                     shapes::grads_like({&r, &m, &lv, &scale}, needs.data())};
  auto& [loss, log_likelihood, kl, grads] = result;

  Views views = data_views(recon, x), latents = latent_views(mu);
  LogProbParams p = log_prob_params(views, recon, x, scale, mask);
  KlParams q;
  set_latent(q, latents, mu, logvar, std::nullopt, std::nullopt);
  p.grad.constant = -share(reduction, p.B) / double(p.K);
  q.grad.constant = beta * share(reduction, p.B);
  size_t next = 0;
  if (needs[0]) p.grad_recon = views.out(grads[next++]);
  if (needs[1]) q.grad_mu = latents.out(grads[next++]);
  if (needs[2]) q.grad_logvar = latents.out(grads[next++]);
  if (needs[3] && scale.has_value()) p.grad_scale = views.out(grads[next]);

  Scratch fit(p.K * p.B), losses(p.B), divergence(p.B), means;
  run_log_prob(log_prob_kernel(index, scale, is_double(recon)), p, fit.data());
  q.out = divergence.data();
  if (free_bits > 0) {
    kl_dim_means(q, is_double(mu), means);
    q.dim_means = means.data(), q.free_bits = free_bits, q.charged = losses.data();
  }
  run_kl(q, is_double(mu));
  views.finish(), latents.finish();

  const double* charged = free_bits > 0 ? losses.data() : divergence.data();
  for (int64_t b = 0; b < p.B; ++b) {
    double sum = 0;
    for (int64_t k = 0; k < p.K; ++k) sum += fit[k * p.B + b];
    losses[b] = beta * charged[b] - sum / double(p.K);
  }
  reduce(losses.data(), p.B, reduction, loss);
  write(fit.data(), log_likelihood);
  write(divergence.data(), kl);
  return result;
}

// For a few data, while their K rows are in the cache: log p and its gradient with factor 1, then the weights, then the
// gradient times its weight. Where the first gradient cannot be kept in place and unrounded, in half types and strided
// outputs, it is computed again.
MultiSampleForward multi_sample_loss_forward_cpu(const Tensor& recon, const Tensor& x, const Tensor& log_ratio,
                                                 const OptionalTensor& gates, const OptionalTensor& scale,
                                                 const OptionalTensor& mask, std::string_view likelihood,
                                                 std::string_view reduction_name, double elbo_share, double alpha,
                                                 int64_t groups, double path, double path_weight, double score,
                                                 std::array<bool, 4> needs) {
  const Estimator e{elbo_share, alpha, groups, path, path_weight, score};
  const int index = checks::multi_sample_loss(recon, x, log_ratio, gates, scale, mask, likelihood, e);
  const Reduction reduction = checks::reduction(reduction_name);
  const bool wide = is_double(recon);
  const OptionalTensor r = recon, lr = log_ratio;
  MultiSampleForward result{shapes::loss_like(recon, x, reduction), shapes::rows_like(recon, x),
                            shapes::grads_like({&r, &lr, &gates, &scale}, needs.data())};
  auto& [loss, log_likelihood, grads] = result;

  Views views = data_views(recon, x);
  LogProbParams first = log_prob_params(views, recon, x, scale, mask);
  const int64_t K = first.K, B = first.B, D = first.D, per_row = segments(D);
  Tensor grad_recon, grad_log_ratio, grad_gates, grad_scale;
  size_t next = 0;
  if (needs[0]) grad_recon = grads[next++];
  if (needs[1]) grad_log_ratio = grads[next++];
  if (needs[2] && gates.has_value()) grad_gates = grads[next++];
  if (needs[3] && scale.has_value()) grad_scale = grads[next];
  LogProbParams second = first;
  if (grad_recon.defined()) second.grad_recon = views.out(grad_recon);
  if (grad_scale.defined()) second.grad_scale = views.out(grad_scale);
  const auto keeps_view = [&](const View& v) {
    return !v || (v.dtype == (wide ? DType::f64 : DType::f32) && v.ndim == 1 && v.stride[0] == 1);
  };
  const bool keeps = keeps_view(second.grad_recon) && keeps_view(second.grad_scale);
  if (keeps) first.grad_recon = second.grad_recon, first.grad_scale = second.grad_scale;
  first.grad.constant = 1;
  const bool any_grad = needs[0] || needs[1] || grad_gates.defined() || grad_scale.defined();

  // [K, B] log weights, [K, B] weights a, [groups, B] bounds and upstream gradients: in double, they are few
  const Tensor log_ratios = log_ratio.to(at::kDouble, /*non_blocking=*/false, /*copy=*/true).contiguous();
  double* log_w = log_ratios.mutable_data_ptr<double>();
  Scratch bounds(groups * B), weights(any_grad ? K * B : 0), losses(B);
  const Scratch factor(any_grad ? groups * B : 0, (1 - elbo_share) / double(groups));
  LogMeanExpParams lme;
  lme.K = K / groups, lme.inner = B, lme.stride_outer = lme.K * B, lme.stride_k = B, lme.stride_inner = 1;
  lme.log_w = log_w;
  lme.out = bounds.data();
  lme.grad = factor.data(), lme.grad_log_w = weights.data();
  const double loss_share = share(reduction, B);

  Scratch parts(K * B * per_row), fit(K * B);
  first.out = parts.data();
  const auto kernel = log_prob_kernel(index, scale, wide);
  const auto row_items = [&](int64_t k, int64_t b) { return (k * B + b) * per_row; };

  const auto add_row = [&](int64_t k, int64_t b) {
    const int64_t row = k * B + b;
    add_segments(parts.data() + row * per_row, per_row, 1, fit.data() + row);
    log_w[row] += fit[row];
  };
  const auto weigh_datum = [&](int64_t b) {
    double bound = 0;
    if (elbo_share != 0) {
      for (int64_t k = 0; k < K; ++k) bound += log_w[k * B + b];
      bound *= elbo_share / double(K);
    }
    if (elbo_share != 1) {
      for (int64_t k = 0; alpha != 0 && k < K; ++k) log_w[k * B + b] *= 1 - alpha;
      double sum = 0;
      for (int64_t item = b; item < groups * B; item += B) {
        kernels().log_mean_exp[1](lme, item, item + 1);
        if (any_grad) kernels().log_mean_exp_backward[1](lme, item, item + 1);
        sum += bounds[item];
      }
      bound += sum * (1 - elbo_share) / (double(groups) * (1 - alpha));
    }
    for (int64_t k = 0; any_grad && elbo_share != 0 && k < K; ++k) weights[k * B + b] += elbo_share / double(K);
    losses[b] = -bound;
  };
  const auto scale_row = [&](const View& v, int64_t k, int64_t b, double weight) {
    if (!v) return;
    char* row = static_cast<char*>(v.data) + (k * v.stride_k + b * v.stride_b) * int64_t(wide ? 8 : 4);
    kernels().scale_row[wide](row, D, weight);
  };
  const auto finish_row = [&](int64_t k, int64_t b) {
    if (!second.grad_recon && !second.grad_scale) return;
    const double weight = -loss_share * weights[k * B + b];
    if (keeps) {
      scale_row(first.grad_recon, k, b, weight);
      scale_row(first.grad_scale, k, b, weight);
    } else {
      LogProbParams again = second;
      again.grad.constant = weight;
      kernel(again, row_items(k, b), row_items(k, b) + per_row);
    }
  };

  // Data are taken in blocks whose gradients stay in the cache: next to each other, so that the K runs of memory that
  // a block reads are long enough for the processor to see them coming.
  constexpr int64_t kCache = 1 << 21;  // bytes
  const int64_t datum = std::max<int64_t>(1, K * D * int64_t(wide ? 8 : 4));
  const int64_t block = std::clamp<int64_t>(kCache / datum, 1, std::max<int64_t>(1, B / at::get_num_threads()));
  if (B >= at::get_num_threads()) {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, block * K * D));
    at::parallel_for(0, (B + block - 1) / block, grain, [&](int64_t begin, int64_t end) {
      for (int64_t b0 = begin * block; b0 < std::min(end * block, B); b0 += block) {
        const int64_t b1 = std::min(b0 + block, B);
        for (int64_t k = 0; k < K; ++k) {
          kernel(first, row_items(k, b0), row_items(k, b1));
          for (int64_t b = b0; b < b1; ++b) add_row(k, b);
        }
        for (int64_t b = b0; b < b1; ++b) weigh_datum(b);
        for (int64_t k = 0; k < K; ++k) {
          for (int64_t b = b0; b < b1; ++b) finish_row(k, b);
        }
      }
    });
  } else {  // few data: the rows are shared out instead, in the same arithmetic
    run(kernel, first, K * B * per_row, std::min(D, kSegment));
    for (int64_t row = 0; row < K * B; ++row) add_row(row / B, row % B);
    for (int64_t b = 0; b < B; ++b) weigh_datum(b);
    at::parallel_for(0, K * B, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, D)), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) finish_row(row / B, row % B);
    });
  }

  views.finish();
  reduce(losses.data(), B, reduction, loss);
  write(fit.data(), log_likelihood);
  if (grad_gates.defined()) {
    Scratch factors(2 * K * B, score - 1);
    for (int64_t row = 0; row < K * B; ++row) factors[row] = path_factor(e, weights[row]);
    grad_gates.copy_(at::from_blob(factors.data(), {2, K, B}, at::kDouble));
  }
  if (grad_log_ratio.defined()) {
    for (double& w : weights) w *= -loss_share;
    grad_log_ratio.copy_(at::from_blob(weights.data(), {K, B}, at::kDouble));
  }
  return result;
}

Tensor log_mean_exp_cpu(const Tensor& log_w, int64_t dim) {
  const int64_t d = checks::log_mean_exp(log_w, dim);
  const Tensor result = shapes::reduced_like(log_w, d);
  if (result.numel() == 0) return result;
  const Tensor w = log_w.to(result.scalar_type()).contiguous();
  LogMeanExpParams p = log_mean_exp_params(w, d);
  p.out = result.mutable_data_ptr();
  run(kernels().log_mean_exp[is_double(w)], p, result.numel(), p.K * 2);
  return result;
}

Tensor log_mean_exp_backward_cpu(const Tensor& grad, const Tensor& log_w, int64_t dim) {
  const int64_t d = checks::log_mean_exp_backward(grad, log_w, dim);
  const Tensor w = log_w.to(checks::compute_type(log_w)).contiguous();
  const Tensor result = at::empty_like(w, at::MemoryFormat::Contiguous);
  if (result.numel() != 0) {
    LogMeanExpParams p = log_mean_exp_params(w, d);
    const Tensor g = grad.contiguous();
    p.grad = g.const_data_ptr();
    p.grad_log_w = result.mutable_data_ptr();
    run(kernels().log_mean_exp_backward[is_double(w)], p, g.numel(), p.K * 3);
  }
  return result.to(log_w.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(fastelbo, CPU, m) {
  m.impl("log_mean_exp", log_mean_exp_cpu);
  m.impl("_log_mean_exp_backward", log_mean_exp_backward_cpu);
  m.impl("_elbo_loss_forward", elbo_loss_forward_cpu);
  m.impl("_multi_sample_loss_forward", multi_sample_loss_forward_cpu);
}

}  // namespace fastelbo
