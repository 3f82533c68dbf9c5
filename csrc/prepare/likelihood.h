// The likelihood ops: checks, outputs, and what the kernels take. The objectives prepare their likelihood here, too.
#pragma once

#include "ops.h"
#include "prepare/shapes.h"
#include "prepare/views.h"

namespace fastelbo::prepare {

using namespace ops;
using views::Views;

// A gradient [*event] or 0-d that is summed over rows: first over those of each chunk, by the kernel.
struct SharedOutput {
  Tensor sums;   // [chunks, D or segments(D)], in the compute type
  Tensor total;  // the gradient, in the compute type and the order of the walk
};

// Rows of log p(x | parameters), with the gradients that are wanted.
struct Likelihood {
  const LikelihoodInfo& info;
  bool is_double;
  Views views;
  LogProbParams params;
  c10::SmallVector<SharedOutput, 2> shared;

  Likelihood(at::TensorList parameters, const Tensor& x, const OptionalTensor& mask, std::string_view likelihood)
      : info(checks::log_prob(parameters, x, mask, likelihood)),
        is_double(views::is_double(parameters[0])),
        views(x.dim() - 1, x.is_meta() ? views::Order() : views::event_order(parameters[0], x.dim() - 1)) {
    if (x.is_meta()) return;
    LogProbParams& p = params;
    p.K = parameters[0].dim() > x.dim() ? parameters[0].size(0) : 1;
    p.B = x.size(0);
    p.D = 1;
    const auto event = x.sizes().slice(1);
    for (int64_t size : event) p.D *= size;
    p.count = int(parameters.size());
    p.added = info.added;
    for (int i = 0; i < p.count; ++i) {
      p.parameter[i] = views.in(parameters[i].dim() == 0 ? parameters[i].expand(event) : parameters[i]);
    }
    p.x = views.in(x, /*unit=*/info.domain != Domain::counts);
    p.mask = views.in(mask);
  }

  // The gradients of the parameters, each in its own shape; undefined where not wanted.
  template <class Wanted>
  ParameterGrads grads(at::TensorList parameters, Wanted wanted) {
    ParameterGrads found;
    for (size_t i = 0; i < parameters.size(); ++i) found[i] = grad(int(i), parameters[i], wanted(i));
    return found;
  }

 private:
  // Of numbers that rows share, no gradient of full size is ever written.
  Tensor grad(int i, const OptionalTensor& parameter, bool needed) {
    // by shapes alone, so that threads change no digit; a chunk is summed in the compute type, so it is short
    constexpr int64_t kChunks = 32, kMaxChunk = 64;
    const Tensor grad = shapes::grad_like(parameter, needed);
    if (!grad.defined() || grad.is_meta()) return grad;
    LogProbParams& p = params;
    if (grad.dim() > views.event_dims()) {
      p.grad[i] = views.out(grad);
      return grad;
    }
    p.chunk = std::clamp<int64_t>((p.rows() + kChunks - 1) / kChunks, 1, kMaxChunk);
    SharedGrad& g = p.shared_grad[i];
    g.scalar = grad.dim() == 0;
    g.size = g.scalar ? segments(p.D) : p.D;
    const auto options = shapes::compute_options(grad);
    shared.push_back(
        {at::empty({p.chunks(), g.size}, options), views.walked(grad, at::typeMetaToScalarType(options.dtype()))});
    g.sums = shared.back().sums.mutable_data_ptr();
    return grad;
  }
};

struct LogProb {
  Likelihood rows;
  Tensor log_prob;

  Tensor result() { return log_prob; }
};

inline LogProb log_prob(at::TensorList parameters, const Tensor& x, const OptionalTensor& mask,
                        std::string_view likelihood) {
  Likelihood rows(parameters, x, mask, likelihood);
  return {std::move(rows), shapes::rows_like(parameters[0], x)};
}

struct LogProbBackward {
  Likelihood rows;
  Tensor grad;
  ParameterGrads grads;
  Tensor grad_x, grad_x_samples;  // [K, B, *event]: x is shared by the samples, and its gradient is the sum of theirs

  LogProbGrads result() {
    rows.views.finish();
    return std::tuple_cat(grads, std::tuple(grad_x));
  }
};

// The outputs, for the rows of op.
inline LogProbBackward with_grads(LogProbBackward op, at::TensorList parameters, const Tensor& x,
                                  std::array<bool, 5> needs) {
  const Tensor& recon = parameters[0];
  op.grads = op.rows.grads(parameters, [&](size_t i) { return needs[i]; });
  op.grad_x = shapes::grad_like(OptionalTensor(x), needs[kMaxParameters]);
  if (recon.is_meta() || !op.grad_x.defined()) return op;
  const bool several = recon.dim() > x.dim();
  if (several) op.grad_x_samples = at::empty(recon.sizes(), shapes::compute_options(recon));
  op.rows.params.grad_x = op.rows.views.out(several ? op.grad_x_samples : op.grad_x);
  return op;
}

inline LogProbBackward log_prob_backward(const Tensor& grad, at::TensorList parameters, const Tensor& x,
                                         const OptionalTensor& mask, std::string_view likelihood,
                                         std::array<bool, 5> needs) {
  LogProbBackward op{Likelihood(parameters, x, mask, likelihood), grad};
  const Tensor& recon = parameters[0];
  checks::upstream("grad", grad, recon.sym_sizes().slice(0, recon.dim() - x.dim() + 1), recon);
  if (!recon.is_meta()) op.rows.params.factor = views::rows_of(grad);
  return with_grads(std::move(op), parameters, x, needs);
}

struct LogProbElements {
  Likelihood rows;
  Tensor log_prob;  // [K?, B, *event]

  Tensor result() {
    rows.views.finish();
    return log_prob;
  }
};

inline LogProbElements log_prob_elements(at::TensorList parameters, const Tensor& x, const OptionalTensor& mask,
                                         std::string_view likelihood) {
  LogProbElements op{Likelihood(parameters, x, mask, likelihood)};
  const Tensor& recon = parameters[0];
  op.log_prob = at::empty_symint(recon.sym_sizes(), shapes::compute_options(recon));
  if (!recon.is_meta()) op.rows.params.value = op.rows.views.out(op.log_prob);
  return op;
}

// The upstream gradient of an element stands where its weight does, whose row factor is then 1.
inline LogProbBackward log_prob_elements_backward(const Tensor& grad, at::TensorList parameters, const Tensor& x,
                                                  const OptionalTensor& mask, std::string_view likelihood,
                                                  std::array<bool, 5> needs) {
  const Tensor& recon = parameters[0];
  checks::upstream("grad", grad, recon.sym_sizes(), recon);
  LogProbBackward op{Likelihood(parameters, x, mask, likelihood), grad};
  if (!recon.is_meta()) {
    // nothing of what reaches a masked element is left, NaN neither
    if (mask.has_value()) op.grad = at::where(mask->eq(0), at::zeros({}, grad.options()), grad * *mask);
    op.rows.params.mask = op.rows.views.in(op.grad);
    op.rows.params.factor.constant = 1;
  }
  return with_grads(std::move(op), parameters, x, needs);
}

}  // namespace fastelbo::prepare
