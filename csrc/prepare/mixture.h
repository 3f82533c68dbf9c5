// Mixtures: checks, outputs, and what the kernels take.
#pragma once

#include "ops.h"
#include "prepare/shapes.h"
#include "prepare/views.h"

namespace fastelbo::prepare {

using namespace ops;
using views::Views;

// The rows, which are the leading dimensions of z: those along which the weights differ come first, so that rows with
// the same weights are neighbours.
class MixtureRows {
  int64_t lead_;
  c10::SmallVector<int64_t, 8> order_;
  Tensor weights_;  // [*lead or 1, C]
  int64_t distinct_ = 1;

 public:
  MixtureRows(const Tensor& z, const OptionalTensor& log_weights) : lead_(z.dim() - 1) {
    c10::SmallVector<int64_t, 8> shared;
    if (log_weights.has_value()) weights_ = whole(*log_weights);
    for (int64_t d = 0; d < lead_; ++d) {
      const bool differ = weights_.defined() && weights_.size(d) == z.size(d) && z.size(d) != 1;
      (differ ? order_ : shared).push_back(d);
      if (differ) distinct_ *= z.size(d);
    }
    order_.append(shared.begin(), shared.end());
  }

  Views views() const { return Views(lead_); }
  bool share_weights() const { return distinct_ == 1; }
  const Tensor& weights() const { return weights_; }
  // Rows of the same weights.
  int64_t together(int64_t rows) const { return distinct_ ? rows / distinct_ : 1; }

  // [..., C], with a dimension for each of z.
  Tensor whole(Tensor t) const {
    while (t.dim() <= lead_) t = t.unsqueeze(0);
    return t;
  }
  // [*lead, X] -> [X, rows], and [*lead] -> [1, rows], as a View takes it
  Tensor rows_last(const Tensor& t) const {
    const Tensor wide = t.dim() > lead_ ? t : t.unsqueeze(-1);
    c10::SmallVector<int64_t, 8> dims{lead_};
    dims.append(order_.begin(), order_.end());
    return wide.permute(dims);
  }
};

// In the compute type; what is expanded stays expanded.
inline Tensor converted(Tensor t, at::ScalarType type) {
  if (t.scalar_type() == type) return t;
  const c10::SmallVector<int64_t, 8> shape(t.sizes().begin(), t.sizes().end());
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.stride(d) == 0 && t.size(d) > 1) t = t.narrow(d, 0, 1);
  }
  return t.to(type).expand(shape);
}

// What forward and backward share: z, the components, and where a device leaves what depends on them alone.
struct Mixture {
  bool is_double = false;
  std::optional<MixtureRows> rows;
  Views views{0};
  Tensor mu, inv_std, base, weights;  // [C, M], [C, M], [C] or [C, M]; [..., C]: in the compute type
  MixtureComponentsParams components;
  MixtureParams params;  // without log_prob

  Mixture(const Tensor& z, const Tensor& mu_in, const Tensor& logvar, const OptionalTensor& log_weights,
          bool per_dimension)
      : is_double(views::is_double(z)) {
    if (z.is_meta()) return;
    rows.emplace(z, log_weights), views = rows->views();
    const auto type = checks::compute_type(z);
    const auto options = z.options().dtype(type);
    const int64_t C = mu_in.size(0), M = mu_in.size(1);
    const bool copies = mu_in.scalar_type() != type || !mu_in.is_contiguous();
    mu = copies ? at::empty({C, M}, options) : mu_in;
    inv_std = at::empty({C, M}, options);
    base = at::empty(per_dimension ? at::IntArrayRef{C, M} : at::IntArrayRef{C}, options);
    MixtureComponentsParams& c = components;
    c.C = C, c.M = M, c.per_dimension = per_dimension;
    c.mu = views::view_of(mu_in, 1), c.logvar = views::view_of(logvar, 1);
    c.inv_std = inv_std.mutable_data_ptr(), c.base = base.mutable_data_ptr();
    if (copies) c.copied_mu = mu.mutable_data_ptr();
    MixtureParams& p = params;
    p.N = M ? z.numel() / M : c10::multiply_integers(z.sizes().slice(0, z.dim() - 1));
    p.C = C, p.M = M, p.per_dimension = per_dimension;
    p.z = views.in(rows->rows_last(z));
    p.mu = mu.const_data_ptr(), p.inv_std = c.inv_std, p.base = c.base;
    if (!log_weights.has_value()) {
      c.log_weight = -std::log(double(C));
    } else {
      weights = converted(rows->weights(), type);
      if (rows->share_weights()) {
        c.weights = weights.const_data_ptr(), c.stride_weights = weights.stride(-1);
      } else {
        p.weights = views.in(rows->rows_last(weights)), p.weight_rows = rows->together(p.N);
      }
    }
  }
};

struct MixtureLogProb : Mixture {
  Tensor log_prob;

  Tensor result() {
    views.finish();
    return log_prob;
  }
};

inline MixtureLogProb mixture_log_prob(const Tensor& z, const Tensor& mu, const Tensor& logvar,
                                       const OptionalTensor& log_weights, bool per_dimension) {
  checks::mixture(z, mu, logvar, log_weights);
  MixtureLogProb op{{z, mu, logvar, log_weights, per_dimension},
                    at::empty_symint(checks::mixture_shape(z, per_dimension), shapes::compute_options(z))};
  if (z.is_meta()) return op;
  op.params.log_prob = op.views.out(op.rows->rows_last(op.log_prob));
  return op;
}

struct MixtureLogProbBackward : Mixture {
  Tensor grad_z, grad_mu, grad_logvar, grad_weights;  // undefined where not needed
  Tensor own_weights;  // where rows have weights of their own: the memory of their gradient, see MixtureBackwardParams
  Tensor shared_weights;  // where they share them: that gradient as [C, 1]
  MixtureBackwardParams backward;
  MixtureSumsParams sums;

  bool any_sums() const { return grad_mu.defined() || grad_logvar.defined() || shared_weights.defined(); }
  MixtureGrads result() {
    views.finish();
    return {grad_z, grad_mu, grad_logvar, grad_weights};
  }
};

inline MixtureLogProbBackward mixture_log_prob_backward(const Tensor& grad, const Tensor& z, const Tensor& mu,
                                                        const Tensor& logvar, const OptionalTensor& log_weights,
                                                        bool per_dimension, const Tensor& log_prob,
                                                        std::array<bool, 4> needs) {
  checks::mixture(z, mu, logvar, log_weights);
  const auto shape = checks::mixture_shape(z, per_dimension);
  checks::upstream("grad", grad, shape, z), checks::upstream("log_prob", log_prob, shape, z);
  MixtureLogProbBackward op{{z, mu, logvar, log_weights, per_dimension},
                            shapes::grad_like(OptionalTensor(z), needs[0]),
                            shapes::grad_like(OptionalTensor(mu), needs[1]),
                            shapes::grad_like(OptionalTensor(logvar), needs[2]),
                            shapes::grad_like(log_weights, needs[3])};
  if (z.is_meta()) return op;
  op.params.log_prob = op.views.in(op.rows->rows_last(log_prob));
  MixtureBackwardParams& b = op.backward;
  b.of = op.params;
  b.grad = op.views.in(op.rows->rows_last(grad));
  if (op.grad_z.defined()) b.grad_z = op.views.out(op.rows->rows_last(op.grad_z));
  if (op.grad_weights.defined()) {
    const Tensor whole = op.rows->whole(op.grad_weights);
    if (op.rows->share_weights()) {
      op.shared_weights = whole.flatten().unsqueeze(1);
    } else if (b.of.weight_rows == 1) {
      op.own_weights = op.views.dense(op.grad_weights, checks::compute_type(z));
    } else {
      op.own_weights = op.views.dense(op.grad_weights, at::kDouble).zero_();
    }
    if (op.own_weights.defined()) b.grad_weights = op.views.out(op.rows->rows_last(op.rows->whole(op.own_weights)));
  }
  MixtureSumsParams& s = op.sums;
  s.C = b.of.C, s.M = b.of.M, s.inv_std = b.of.inv_std;
  if (op.grad_mu.defined()) s.grad_mu = views::view_of(op.grad_mu, 1);
  if (op.grad_logvar.defined()) s.grad_logvar = views::view_of(op.grad_logvar, 1);
  if (op.shared_weights.defined()) s.grad_weights = views::view_of(op.shared_weights, 1);
  return op;
}

}  // namespace fastelbo::prepare
