// The latent ops on the CPU.
#include "cpu/latent.h"

#include <torch/library.h>

#include "ops.h"
#include "shapes.h"

namespace fastelbo {
namespace cpu {

void kl_dim_means(const KlParams& p, bool is_double, Scratch& means) {
  means.assign(p.D, 0.0);
  KlDimsParams dims;
  dims.B = p.B, dims.D = p.D;
  dims.mu = p.mu, dims.logvar = p.logvar, dims.prior_mu = p.prior_mu, dims.prior_logvar = p.prior_logvar;
  dims.out = means.data();
  run(kernels().kl_dims[is_double], dims, (p.D + kLatentTile - 1) / kLatentTile, p.B * std::min(p.D, kLatentTile));
  for (double& m : means) m /= double(p.B);
}

void run_kl(const KlParams& p, bool is_double) {
  if (p.out && p.D == 0) std::fill_n(p.out, p.B, 0.0);
  if (p.charged && p.D == 0) std::fill_n(p.charged, p.B, 0.0);
  run(kernels().kl[is_double], p, row_blocks(p.B, p.D), rows_per_block(p.D) * p.D * 4);
}

namespace {

using namespace ops;

Tensor gaussian_kl_cpu(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                       const OptionalTensor& prior_logvar, double free_bits) {
  checks::latent(mu, logvar, prior_mu, prior_logvar);
  checks::free_bits(free_bits);
  const Tensor result = shapes::batch_like(mu, mu);
  Views views = latent_views(mu);
  KlParams p;
  set_latent(p, views, mu, logvar, prior_mu, prior_logvar);
  Scratch out(p.B), charged, means;
  p.out = out.data();
  if (free_bits > 0) {
    kl_dim_means(p, is_double(mu), means);
    charged.resize(p.B);
    p.dim_means = means.data(), p.free_bits = free_bits, p.charged = charged.data();
  }
  run_kl(p, is_double(mu));
  write(free_bits > 0 ? charged.data() : out.data(), result);
  return result;
}

Tensors gaussian_kl_backward_cpu(const Tensor& grad, const Tensor& mu, const Tensor& logvar,
                                 const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar, double free_bits,
                                 std::array<bool, 4> needs) {
  checks::latent(mu, logvar, prior_mu, prior_logvar);
  checks::upstream("grad", grad, {mu.sym_size(0)}, mu);
  const OptionalTensor m = mu, lv = logvar;
  const Tensors grads = shapes::grads_like({&m, &lv, &prior_mu, &prior_logvar}, needs.data());
  Views views = latent_views(mu);
  KlParams p;
  set_latent(p, views, mu, logvar, prior_mu, prior_logvar);
  set_grads<4>(views, grads, needs, {&p.grad_mu, &p.grad_logvar, &p.grad_prior_mu, &p.grad_prior_logvar},
               {&m, &lv, &prior_mu, &prior_logvar});
  p.grad = rows_of(grad);
  Scratch means;
  if (free_bits > 0) {
    kl_dim_means(p, is_double(mu), means);
    p.dim_means = means.data(), p.free_bits = free_bits;
  }
  run_kl(p, is_double(mu));
  views.finish();
  return grads;
}

Samples rsample_cpu(const Tensor& mu, const Tensor& logvar, OptionalInt num_samples, const OptionalTensor& prior_mu,
                    const OptionalTensor& prior_logvar, const OptionalTensor& seed, const OptionalTensor& eps,
                    c10::SymInt first_sample) {
  checks::latent(mu, logvar, prior_mu, prior_logvar);
  checks::noise(mu, num_samples, seed, eps, first_sample);
  const Tensor z = shapes::samples_like(mu, num_samples, true);
  const Tensor log_ratio = shapes::samples_like(mu, num_samples, false);
  Views views = latent_views(mu);
  SampleParams p;
  set_latent(p, views, mu, logvar, prior_mu, prior_logvar);
  p.K = num_samples ? num_samples->expect_int() : 1;
  p.first_sample = first_sample.expect_int();
  if (seed.has_value()) p.seed = uint64_t(*seed->const_data_ptr<int64_t>());
  p.eps = views.in(eps);
  p.z = views.out(z);
  Scratch ratios(p.K * p.B, 0.0);
  p.log_ratio = ratios.data();
  const int64_t samples = std::min(p.K, kSampleBlock);
  run(kernels().sample[is_double(mu)], p, row_blocks(p.B, p.D) * sample_blocks(p.K),
      rows_per_block(p.D) * p.D * samples * 2);
  views.finish();
  write(ratios.data(), log_ratio);
  return {z, gaussian_kl_cpu(mu, logvar, prior_mu, prior_logvar, 0.0), log_ratio, shapes::gates_like(mu, num_samples)};
}

Tensors rsample_backward_cpu(const OptionalTensor& grad_z, const OptionalTensor& grad_kl,
                             const OptionalTensor& grad_log_ratio, const OptionalTensor& grad_gates, const Tensor& mu,
                             const Tensor& logvar, OptionalInt num_samples, const OptionalTensor& prior_mu,
                             const OptionalTensor& prior_logvar, const OptionalTensor& seed, const OptionalTensor& eps,
                             c10::SymInt first_sample, std::array<bool, 5> needs) {
  checks::rsample_backward(grad_z, grad_kl, grad_log_ratio, grad_gates, mu, logvar, num_samples, prior_mu, prior_logvar,
                           seed, eps, first_sample);
  const OptionalTensor m = mu, lv = logvar;
  const Tensors grads = shapes::grads_like({&m, &lv, &prior_mu, &prior_logvar, &eps}, needs.data());
  Views views = latent_views(mu);
  SampleBackwardParams p;
  set_sample_grads(p, views, grad_z, grad_kl, grad_log_ratio, grad_gates, mu, logvar, num_samples, prior_mu,
                   prior_logvar, eps, first_sample.expect_int());
  if (seed.has_value()) p.seed = uint64_t(*seed->const_data_ptr<int64_t>());
  set_grads<5>(views, grads, needs, {&p.grad_mu, &p.grad_logvar, &p.grad_prior_mu, &p.grad_prior_logvar, &p.grad_eps},
               {&m, &lv, &prior_mu, &prior_logvar, &eps});
  run(kernels().sample_backward[is_double(mu)], p, row_blocks(p.B, p.D), rows_per_block(p.D) * p.D * p.K * 2);
  views.finish();
  return grads;
}

}  // namespace
}  // namespace cpu

TORCH_LIBRARY_IMPL(fastelbo, CPU, m) {
  m.impl("rsample", cpu::rsample_cpu);
  m.impl("_rsample_backward", cpu::rsample_backward_cpu);
  m.impl("gaussian_kl", cpu::gaussian_kl_cpu);
  m.impl("_gaussian_kl_backward", cpu::gaussian_kl_backward_cpu);
}

}  // namespace fastelbo
