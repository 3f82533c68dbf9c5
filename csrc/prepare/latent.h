// The latent ops: checks, outputs, and what the kernels take.
#pragma once

#include "ops.h"
#include "prepare/shapes.h"
#include "prepare/views.h"

namespace fastelbo::prepare {

using namespace ops;
using views::Views;

// mu, logvar and their prior, [B, *latent].
inline Latents latents(Views& views, const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                       const OptionalTensor& prior_logvar) {
  Latents q;
  q.B = mu.size(0);
  q.D = q.B ? mu.numel() / q.B : 0;
  q.mu = views.in(mu), q.logvar = views.in(logvar);
  q.prior_mu = views.in(prior_mu), q.prior_logvar = views.in(prior_logvar);
  return q;
}

// The gradients of mu, logvar and their prior; undefined where not wanted.
struct LatentOutputs {
  Tensor mu, logvar, prior_mu, prior_logvar;

  LatentOutputs(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                const OptionalTensor& prior_logvar, const bool* needs)
      : mu(shapes::grad_like(OptionalTensor(mu), needs[0])),
        logvar(shapes::grad_like(OptionalTensor(logvar), needs[1])),
        prior_mu(shapes::grad_like(prior_mu, needs[2])),
        prior_logvar(shapes::grad_like(prior_logvar, needs[3])) {}

  LatentGrads views(Views& views) const {
    return {views.out(mu), views.out(logvar), views.out(prior_mu), views.out(prior_logvar)};
  }
};

struct GaussianKl {
  Tensor kl;
  bool is_double = false;
  Views views{0};
  KlParams params;

  Tensor result() { return kl; }
};

inline GaussianKl gaussian_kl(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                              const OptionalTensor& prior_logvar, double free_bits) {
  checks::latent(mu, logvar, prior_mu, prior_logvar);
  checks::free_bits(free_bits);
  GaussianKl op{shapes::batch_like(mu, mu), views::is_double(mu), Views(mu.dim() - 1)};
  if (mu.is_meta()) return op;
  op.params.q = latents(op.views, mu, logvar, prior_mu, prior_logvar);
  op.params.free_bits = free_bits;
  return op;
}

struct GaussianKlBackward {
  Tensor mu;
  LatentOutputs grads;
  bool is_double = false;
  Views views{0};
  KlParams params;

  KlGrads result() {
    views.finish();
    return {grads.mu, grads.logvar, grads.prior_mu, grads.prior_logvar};
  }
};

inline GaussianKlBackward gaussian_kl_backward(const Tensor& grad, const Tensor& mu, const Tensor& logvar,
                                               const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                                               double free_bits, std::array<bool, 4> needs) {
  checks::latent(mu, logvar, prior_mu, prior_logvar);
  checks::free_bits(free_bits);
  checks::upstream("grad", grad, {mu.sym_size(0)}, mu);
  GaussianKlBackward op{
      mu, {mu, logvar, prior_mu, prior_logvar, needs.data()}, views::is_double(mu), Views(mu.dim() - 1)};
  if (mu.is_meta()) return op;
  op.params.q = latents(op.views, mu, logvar, prior_mu, prior_logvar);
  op.params.grad = op.grads.views(op.views);
  op.params.factor = views::rows_of(grad);
  op.params.free_bits = free_bits;
  return op;
}

inline const int64_t* seed_of(const OptionalTensor& seed) {
  return seed.has_value() ? seed->const_data_ptr<int64_t>() : nullptr;
}

struct RSample {
  Tensor z, kl, log_ratio, gates;
  bool is_double = false;
  Views views{0};
  SampleParams params;

  Samples result() {
    views.finish();
    return {z, kl, log_ratio, gates};
  }
};

inline RSample rsample(const Tensor& mu, const Tensor& logvar, OptionalInt num_samples, const OptionalTensor& prior_mu,
                       const OptionalTensor& prior_logvar, const OptionalTensor& seed, const OptionalTensor& eps,
                       c10::SymInt first_sample) {
  checks::latent(mu, logvar, prior_mu, prior_logvar);
  checks::noise(mu, num_samples, seed, eps, first_sample);
  RSample op{shapes::samples_like(mu, num_samples, true),
             shapes::batch_like(mu, mu),
             shapes::samples_like(mu, num_samples, false),
             shapes::gates_like(mu, num_samples),
             views::is_double(mu),
             Views(mu.dim() - 1)};
  if (mu.is_meta()) return op;
  SampleParams& p = op.params;
  p.q = latents(op.views, mu, logvar, prior_mu, prior_logvar);
  p.K = num_samples ? num_samples->expect_int() : 1;
  p.first_sample = first_sample.expect_int();
  p.seed = seed_of(seed);
  p.eps = op.views.in(eps);
  p.z = op.views.out(op.z);
  return op;
}

struct RSampleBackward {
  Tensor mu;
  LatentOutputs grads;
  Tensor grad_eps;
  bool is_double = false;
  Views views{0};
  SampleBackwardParams params;

  SampleGrads result() {
    views.finish();
    return {grads.mu, grads.logvar, grads.prior_mu, grads.prior_logvar, grad_eps};
  }
};

inline RSampleBackward rsample_backward(const OptionalTensor& grad_z, const OptionalTensor& grad_kl,
                                        const OptionalTensor& grad_log_ratio, const OptionalTensor& grad_gates,
                                        const Tensor& mu, const Tensor& logvar, OptionalInt num_samples,
                                        const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                                        const OptionalTensor& seed, const OptionalTensor& eps, c10::SymInt first_sample,
                                        std::array<bool, 5> needs) {
  checks::rsample_backward(grad_z, grad_kl, grad_log_ratio, grad_gates, mu, logvar, num_samples, prior_mu, prior_logvar,
                           seed, eps, first_sample);
  RSampleBackward op{mu,
                     {mu, logvar, prior_mu, prior_logvar, needs.data()},
                     shapes::grad_like(eps, needs[4]),
                     views::is_double(mu),
                     Views(mu.dim() - 1)};
  if (mu.is_meta()) return op;
  SampleBackwardParams& p = op.params;
  p.q = latents(op.views, mu, logvar, prior_mu, prior_logvar);
  p.grad = op.grads.views(op.views);
  p.grad_eps = op.views.out(op.grad_eps);
  p.K = num_samples ? num_samples->expect_int() : 1;
  p.first_sample = first_sample.expect_int();
  p.seed = seed_of(seed);
  p.eps = op.views.in(eps);
  p.grad_z = op.views.in(grad_z);
  if (grad_kl.has_value()) p.grad_kl = views::rows_of(*grad_kl);
  if (grad_log_ratio.has_value()) p.grad_log_ratio = views::rows_of(*grad_log_ratio);
  if (grad_gates.has_value() && num_samples) {
    p.gate_path = views::rows_of(grad_gates->select(0, 0)), p.gate_score = views::rows_of(grad_gates->select(0, 1));
  }
  return op;
}

struct RSampleKept {
  Tensor z, log_ratio, gates;
  bool is_double = false;
  Views views{0};
  Tensor sample, datum;  // contiguous
  KeptParams params;

  KeptSamples result() {
    views.finish();
    return {z, log_ratio, gates};
  }
};

inline RSampleKept rsample_kept(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                                const OptionalTensor& prior_logvar, const Tensor& sample, const Tensor& datum,
                                const Tensor& seed) {
  checks::latent(mu, logvar, prior_mu, prior_logvar);
  checks::seed(seed, mu);
  checks::kept(sample, datum, mu);
  c10::SymDimVector shape(mu.sym_sizes().begin(), mu.sym_sizes().end());
  const c10::SymInt n = shape[0] = sample.sym_size(0);
  RSampleKept op{at::empty_symint(shape, mu.options()), at::empty_symint({n}, shapes::compute_options(mu)),
                 at::zeros_symint({2, n}, shapes::compute_options(mu)), views::is_double(mu), Views(mu.dim() - 1)};
  if (mu.is_meta()) return op;
  op.sample = sample.contiguous(), op.datum = datum.contiguous();
  KeptParams& p = op.params;
  p.q = latents(op.views, mu, logvar, prior_mu, prior_logvar);
  p.n = sample.size(0);
  p.sample = op.sample.const_data_ptr<int64_t>(), p.datum = op.datum.const_data_ptr<int64_t>();
  p.seed = seed.const_data_ptr<int64_t>();
  p.z = op.views.out(op.z);
  return op;
}

struct RSampleKeptBackward {
  Tensor mu;
  LatentOutputs grads;
  bool is_double = false;
  Views views{0};
  Tensor sample, datum, order, starts;  // contiguous; datum in ascending order
  KeptBackwardParams params;

  KeptGrads result() {
    views.finish();
    return {grads.mu, grads.logvar, grads.prior_mu, grads.prior_logvar};
  }
};

inline RSampleKeptBackward rsample_kept_backward(const OptionalTensor& grad_z, const OptionalTensor& grad_log_ratio,
                                                 const OptionalTensor& grad_gates, const Tensor& mu,
                                                 const Tensor& logvar, const OptionalTensor& prior_mu,
                                                 const OptionalTensor& prior_logvar, const Tensor& sample,
                                                 const Tensor& datum, const Tensor& seed, std::array<bool, 4> needs) {
  checks::latent(mu, logvar, prior_mu, prior_logvar);
  checks::seed(seed, mu);
  checks::kept(sample, datum, mu);
  checks::rsample_kept_backward(grad_z, grad_log_ratio, grad_gates, mu, sample.sym_size(0));
  RSampleKeptBackward op{
      mu, {mu, logvar, prior_mu, prior_logvar, needs.data()}, views::is_double(mu), Views(mu.dim() - 1)};
  if (mu.is_meta()) return op;
  op.sample = sample.contiguous();
  std::tie(op.datum, op.order) = at::sort(datum, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  op.starts = at::searchsorted(op.datum, at::arange(mu.size(0) + 1, datum.options()));
  KeptBackwardParams& p = op.params;
  p.q = latents(op.views, mu, logvar, prior_mu, prior_logvar);
  p.sample = op.sample.const_data_ptr<int64_t>(), p.order = op.order.const_data_ptr<int64_t>();
  p.starts = op.starts.const_data_ptr<int64_t>();
  p.seed = seed.const_data_ptr<int64_t>();
  p.grad_z = op.views.in(grad_z);
  if (grad_log_ratio.has_value()) p.grad_log_ratio = views::rows_of(*grad_log_ratio);
  if (grad_gates.has_value()) {
    p.gate_path = views::rows_of(grad_gates->select(0, 0)), p.gate_score = views::rows_of(grad_gates->select(0, 1));
  }
  p.grad = op.grads.views(op.views);
  return op;
}

}  // namespace fastelbo::prepare
