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
  int index;
  bool is_double;
  Views views;
  LogProbParams params;
  c10::SmallVector<SharedOutput, 2> shared;

  Likelihood(const Tensor& recon, const Tensor& x, const OptionalTensor& second, const OptionalTensor& third,
             const OptionalTensor& mask, std::string_view likelihood)
      : index(checks::log_prob(recon, x, second, third, mask, likelihood)),
        is_double(views::is_double(recon)),
        views(x.dim() - 1, recon.is_meta() ? views::Order() : views::event_order(recon, x.dim() - 1)) {
    if (recon.is_meta()) return;
    LogProbParams& p = params;
    p.K = recon.dim() > x.dim() ? recon.size(0) : 1;
    p.B = x.size(0);
    p.D = 1;
    for (int64_t size : x.sizes().slice(1)) p.D *= size;
    p.count = 1 + second.has_value() + third.has_value();
    p.parameter[0] = views.in(recon);
    const auto event = x.sizes().slice(1);
    if (second.has_value()) p.parameter[1] = views.in(second->dim() == 0 ? second->expand(event) : *second);
    if (third.has_value()) p.parameter[2] = views.in(third->dim() == 0 ? third->expand(event) : *third);
    p.x = views.in(x, /*unit=*/likelihood_info(index).domain != Domain::counts);
    p.mask = views.in(mask);
  }

  // The gradient of parameter i, in its own shape; undefined where not wanted. Of a row of numbers that rows share, no
  // gradient of full size is ever written.
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

inline LogProb log_prob(const Tensor& recon, const Tensor& x, const OptionalTensor& second, const OptionalTensor& third,
                        const OptionalTensor& mask, std::string_view likelihood) {
  return {Likelihood(recon, x, second, third, mask, likelihood), shapes::rows_like(recon, x)};
}

struct LogProbBackward {
  Likelihood rows;
  Tensor grad;
  Tensor grad_recon, grad_x, grad_second, grad_third;
  Tensor grad_x_samples;  // [K, B, *event]: x is shared by the samples, and its gradient is the sum of theirs

  LogProbGrads result() {
    rows.views.finish();
    return {grad_recon, grad_x, grad_second, grad_third};
  }
};

inline LogProbBackward log_prob_backward(const Tensor& grad, const Tensor& recon, const Tensor& x,
                                         const OptionalTensor& second, const OptionalTensor& third,
                                         const OptionalTensor& mask, std::string_view likelihood,
                                         std::array<bool, 4> needs) {
  LogProbBackward op{Likelihood(recon, x, second, third, mask, likelihood), grad};
  checks::upstream("grad", grad, recon.sym_sizes().slice(0, recon.dim() - x.dim() + 1), recon);
  op.grad_recon = op.rows.grad(0, recon, needs[0]);
  op.grad_x = shapes::grad_like(OptionalTensor(x), needs[1]);
  op.grad_second = op.rows.grad(1, second, needs[2]);
  op.grad_third = op.rows.grad(2, third, needs[3]);
  if (recon.is_meta()) return op;
  op.rows.params.factor = views::rows_of(grad);
  if (op.grad_x.defined() && recon.dim() > x.dim()) {
    op.grad_x_samples = at::empty(recon.sizes(), shapes::compute_options(recon));
    op.rows.params.grad_x = op.rows.views.out(op.grad_x_samples);
  } else if (op.grad_x.defined()) {
    op.rows.params.grad_x = op.rows.views.out(op.grad_x);
  }
  return op;
}

}  // namespace fastelbo::prepare
