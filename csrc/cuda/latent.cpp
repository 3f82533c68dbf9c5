// The latent ops on CUDA devices.
#include <torch/library.h>

#include "cuda/latent.h"
#include "ops.h"
#include "shapes.h"

namespace fastelbo {
namespace {

using namespace ops;
using namespace cuda;
using namespace views;

// KL of rows with its gradient: the kernel of the ELBO, without likelihood rows.
void run_kl(const RowsParams& p, const Tensor& like, cudaStream_t stream) {
  launch_rows(p, /*likelihood=*/0, /*scale=*/false, is_double(like), stream);
}

Tensor gaussian_kl_cuda(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                        const OptionalTensor& prior_logvar, double free_bits) {
  checks::latent(mu, logvar, prior_mu, prior_logvar);
  checks::free_bits(free_bits);
  const OnDeviceOf device(mu);
  const Tensor result = shapes::batch_like(mu, mu);
  Views views = latent_views(mu);
  RowsParams p;
  set_latent(p.kl, views, mu, logvar, prior_mu, prior_logvar);
  const Tensor means = set_free_bits(p.kl, mu, free_bits, device.stream());
  p.charged = result.mutable_data_ptr();
  run_kl(p, mu, device.stream());
  return result;
}

Tensors gaussian_kl_backward_cuda(const Tensor& grad, const Tensor& mu, const Tensor& logvar,
                                  const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar, double free_bits,
                                  std::array<bool, 4> needs) {
  checks::latent(mu, logvar, prior_mu, prior_logvar);
  checks::upstream("grad", grad, {mu.sym_size(0)}, mu);
  const OnDeviceOf device(mu);
  const OptionalTensor m = mu, lv = logvar;
  const Tensors grads = shapes::grads_like({&m, &lv, &prior_mu, &prior_logvar}, needs.data());
  Views views = latent_views(mu);
  RowsParams p;
  set_latent(p.kl, views, mu, logvar, prior_mu, prior_logvar);
  set_grads<4>(views, grads, needs, {&p.kl.grad_mu, &p.kl.grad_logvar, &p.kl.grad_prior_mu, &p.kl.grad_prior_logvar},
               {&m, &lv, &prior_mu, &prior_logvar});
  p.kl.grad = rows_of(grad);
  const Tensor means = set_free_bits(p.kl, mu, free_bits, device.stream());
  run_kl(p, mu, device.stream());
  views.finish();
  return grads;
}

Samples rsample_cuda(const Tensor& mu, const Tensor& logvar, OptionalInt num_samples, const OptionalTensor& prior_mu,
                     const OptionalTensor& prior_logvar, const OptionalTensor& seed, const OptionalTensor& eps,
                     c10::SymInt first_sample) {
  checks::latent(mu, logvar, prior_mu, prior_logvar);
  checks::noise(mu, num_samples, seed, eps, first_sample);
  const OnDeviceOf device(mu);
  const Tensor z = shapes::samples_like(mu, num_samples, true);
  const Tensor log_ratio = shapes::samples_like(mu, num_samples, false), kl = shapes::batch_like(mu, mu);
  Views views = latent_views(mu);
  SamplesParams p;
  set_latent(p.p, views, mu, logvar, prior_mu, prior_logvar);
  p.p.K = num_samples ? num_samples->expect_int() : 1;
  p.p.first_sample = first_sample.expect_int();
  p.seed = seed_of(seed);
  p.p.eps = views.in(eps);
  p.p.z = views.out(z);
  p.log_ratio = log_ratio.mutable_data_ptr();
  p.kl = kl.mutable_data_ptr();
  launch_samples(p, is_double(mu), device.stream());
  views.finish();
  return {z, kl, log_ratio, shapes::gates_like(mu, num_samples)};
}

Tensors rsample_backward_cuda(const OptionalTensor& grad_z, const OptionalTensor& grad_kl,
                              const OptionalTensor& grad_log_ratio, const OptionalTensor& grad_gates, const Tensor& mu,
                              const Tensor& logvar, OptionalInt num_samples, const OptionalTensor& prior_mu,
                              const OptionalTensor& prior_logvar, const OptionalTensor& seed, const OptionalTensor& eps,
                              c10::SymInt first_sample, std::array<bool, 5> needs) {
  checks::rsample_backward(grad_z, grad_kl, grad_log_ratio, grad_gates, mu, logvar, num_samples, prior_mu, prior_logvar,
                           seed, eps, first_sample);
  const OnDeviceOf device(mu);
  const OptionalTensor m = mu, lv = logvar;
  const Tensors grads = shapes::grads_like({&m, &lv, &prior_mu, &prior_logvar, &eps}, needs.data());
  Views views = latent_views(mu);
  SamplesBackwardParams q;
  SampleBackwardParams& p = q.p;
  set_sample_grads(p, views, grad_z, grad_kl, grad_log_ratio, grad_gates, mu, logvar, num_samples, prior_mu,
                   prior_logvar, eps, first_sample.expect_int());
  q.seed = seed_of(seed);
  set_grads<5>(views, grads, needs, {&p.grad_mu, &p.grad_logvar, &p.grad_prior_mu, &p.grad_prior_logvar, &p.grad_eps},
               {&m, &lv, &prior_mu, &prior_logvar, &eps});
  launch_samples_backward(q, is_double(mu), device.stream());
  views.finish();
  return grads;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastelbo, FASTELBO_CUDA_KEY, m) {
  m.impl("rsample", rsample_cuda);
  m.impl("_rsample_backward", rsample_backward_cuda);
  m.impl("gaussian_kl", gaussian_kl_cuda);
  m.impl("_gaussian_kl_backward", gaussian_kl_backward_cuda);
}

}  // namespace fastelbo
