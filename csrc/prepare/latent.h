// The latent ops: checks, outputs, and what the kernels take.
#pragma once

#include "ops.h"
#include "prepare/shapes.h"
#include "prepare/views.h"

namespace fastelbo::prepare {

using namespace ops;
using views::Views;

// mu, logvar and their prior, which broadcasts to them: [B, *latent].
inline Latents latents(Views& views, const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                       const OptionalTensor& prior_logvar) {
  const auto prior = [&](const OptionalTensor& t) { return t.has_value() ? views.in(t->expand(mu.sizes())) : View{}; };
  return {mu.size(0),         mu.size(0) ? mu.numel() / mu.size(0) : 0, views.in(mu), views.in(logvar), prior(prior_mu),
          prior(prior_logvar)};
}

// The gradients of mu, logvar and their prior; undefined where not wanted. That of a prior of another shape is written
// in the shape of mu, and summed.
class LatentOutputs {
  std::array<Tensor, 4> whole_, own_;

 public:
  LatentOutputs(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                const OptionalTensor& prior_logvar, const std::array<bool, 4>& needs) {
    const std::array<OptionalTensor, 4> inputs{mu, logvar, prior_mu, prior_logvar};
    for (int i = 0; i < 4; ++i) {
      own_[i] = whole_[i] = shapes::grad_like(inputs[i], needs[i]);
      if (own_[i].defined() && !checks::same_shape(own_[i].sym_sizes(), mu.sym_sizes())) {
        whole_[i] = at::empty_symint(mu.sym_sizes(), shapes::compute_options(mu));
      }
    }
  }
  LatentGrads views(Views& views) const {
    return {views.out(whole_[0]), views.out(whole_[1]), views.out(whole_[2]), views.out(whole_[3])};
  }
  // After the views are finished.
  const std::array<Tensor, 4>& sums() {
    for (int i = 2; i < 4; ++i) {
      if (own_[i].is_same(whole_[i]) || own_[i].is_meta()) continue;
      own_[i].copy_(shapes::sum_to(whole_[i], own_[i].sizes()));
      whole_[i].reset();  // its memory is that of the next sum
    }
    return own_;
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
                              const OptionalTensor& prior_logvar, const OptionalTensor& free_bits) {
  checks::latent(mu, logvar, prior_mu, prior_logvar);
  checks::free_bits(free_bits, mu);
  GaussianKl op{shapes::batch_like(mu, mu), views::is_double(mu), Views(mu.dim() - 1)};
  if (mu.is_meta()) return op;
  op.params.q = latents(op.views, mu, logvar, prior_mu, prior_logvar);
  op.params.free_bits = views::number_of(free_bits, 0);
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
    const auto& g = grads.sums();
    return {g[0], g[1], g[2], g[3]};
  }
};

inline GaussianKlBackward gaussian_kl_backward(const Tensor& grad, const Tensor& mu, const Tensor& logvar,
                                               const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                                               const OptionalTensor& free_bits, std::array<bool, 4> needs) {
  checks::latent(mu, logvar, prior_mu, prior_logvar);
  checks::free_bits(free_bits, mu);
  checks::upstream("grad", grad, {mu.sym_size(0)}, mu);
  GaussianKlBackward op{mu, {mu, logvar, prior_mu, prior_logvar, needs}, views::is_double(mu), Views(mu.dim() - 1)};
  if (mu.is_meta()) return op;
  op.params.q = latents(op.views, mu, logvar, prior_mu, prior_logvar);
  op.params.grad = op.grads.views(op.views);
  op.params.factor = views::rows_of(grad);
  op.params.free_bits = views::number_of(free_bits, 0);
  return op;
}

// Where the noise comes from, and which samples are drawn.
template <class Params>
void set_draws(Params& p, Views& views, const SampleInputs& in) {
  p.q = latents(views, in.mu, in.logvar, in.prior_mu, in.prior_logvar);
  p.K = in.num_samples ? in.num_samples->expect_int() : 1;
  p.first_sample = in.first_sample.expect_int();
  p.seed = in.seed.has_value() ? in.seed->const_data_ptr<int64_t>() : nullptr;
  p.eps = views.in(in.eps);
}

struct RSample {
  Tensor z, kl, log_ratio, log_q, gates;
  bool is_double = false;
  Views views{0};
  Tensor sample, datum;  // contiguous
  SampleParams params;

  Samples result() {
    views.finish();
    return {z, kl, log_ratio, log_q, gates};
  }
};

inline RSample rsample(const SampleInputs& in) {
  const Tensor& mu = in.mu;
  checks::latent(mu, in.logvar, in.prior_mu, in.prior_logvar);
  checks::noise(mu, in.num_samples, in.seed, in.eps, in.sample, in.datum, in.first_sample);
  const c10::SymDimVector shape = checks::samples_shape(mu, in.num_samples, in.sample);
  const c10::SymIntArrayRef rows = c10::SymIntArrayRef(shape).slice(0, in.num_samples ? 2 : 1);
  c10::SymDimVector gates{c10::SymInt(2)};  // zeros, see math/estimator.h; of one sample there is nothing to weigh
  gates.append(rows.begin(), rows.end());
  const auto options = shapes::compute_options(mu);
  const bool weighed = in.num_samples || in.sample.has_value();
  RSample op{at::empty_symint(shape, mu.options()),
             shapes::batch_like(mu, mu),
             at::empty_symint(rows, options),
             at::empty_symint(rows, options),
             weighed ? at::zeros_symint(gates, options) : at::empty({0}, options),
             views::is_double(mu),
             Views(mu.dim() - 1)};
  if (mu.is_meta()) return op;
  SampleParams& p = op.params;
  set_draws(p, op.views, in);
  if (in.sample.has_value()) {
    op.sample = in.sample->contiguous(), op.datum = in.datum->contiguous();
    p.n = op.sample.numel();
    p.sample = op.sample.const_data_ptr<int64_t>(), p.datum = op.datum.const_data_ptr<int64_t>();
  }
  p.z = op.views.out(op.z);
  return op;
}

struct RSampleBackward {
  Tensor mu;
  LatentOutputs grads;
  Tensor grad_eps;
  bool is_double = false;
  Views views{0};
  Tensor sample, datum, order, starts;  // of chosen samples: contiguous; datum in ascending order
  SampleBackwardParams params;

  SampleGrads result() {
    views.finish();
    const auto& g = grads.sums();
    return {g[0], g[1], g[2], g[3], grad_eps};
  }
};

struct SampleBackwardInputs {
  OptionalTensor grad_z, grad_kl, grad_log_ratio, grad_log_q, grad_gates;
  SampleInputs of;
  std::array<bool, 5> needs;
};

inline RSampleBackward rsample_backward(const SampleBackwardInputs& upstream) {
  const SampleInputs& in = upstream.of;
  const Tensor& mu = in.mu;
  checks::latent(mu, in.logvar, in.prior_mu, in.prior_logvar);
  checks::noise(mu, in.num_samples, in.seed, in.eps, in.sample, in.datum, in.first_sample);
  const bool weighed = in.num_samples || in.sample.has_value();
  const OptionalTensor grad_gates = weighed ? upstream.grad_gates : std::nullopt;
  checks::rsample_backward(upstream.grad_z, upstream.grad_kl, upstream.grad_log_ratio, upstream.grad_log_q, grad_gates,
                           mu, checks::samples_shape(mu, in.num_samples, in.sample), in.num_samples ? 2 : 1);
  const auto& needs = upstream.needs;
  RSampleBackward op{mu,
                     {mu, in.logvar, in.prior_mu, in.prior_logvar, {needs[0], needs[1], needs[2], needs[3]}},
                     shapes::grad_like(in.eps, needs[4]),
                     views::is_double(mu),
                     Views(mu.dim() - 1)};
  if (mu.is_meta()) return op;
  SampleBackwardParams& p = op.params;
  set_draws(p, op.views, in);
  p.grad = op.grads.views(op.views);
  p.grad_eps = op.views.out(op.grad_eps);
  p.grad_z = op.views.in(upstream.grad_z);
  const auto rows = [](const OptionalTensor& t) { return t.has_value() ? views::rows_of(*t) : RowScalars{}; };
  p.grad_kl = rows(upstream.grad_kl), p.grad_log_ratio = rows(upstream.grad_log_ratio);
  p.grad_log_q = rows(upstream.grad_log_q);
  if (grad_gates.has_value()) {
    p.gate_path = views::rows_of(grad_gates->select(0, 0)), p.gate_score = views::rows_of(grad_gates->select(0, 1));
  }
  if (in.sample.has_value()) {
    op.sample = in.sample->contiguous();
    std::tie(op.datum, op.order) = at::sort(*in.datum, /*stable=*/true, /*dim=*/0, /*descending=*/false);
    op.starts = at::searchsorted(op.datum, at::arange(mu.size(0) + 1, op.datum.options()));
    p.sample = op.sample.const_data_ptr<int64_t>(), p.order = op.order.const_data_ptr<int64_t>();
    p.starts = op.starts.const_data_ptr<int64_t>();
  }
  return op;
}

}  // namespace fastelbo::prepare
