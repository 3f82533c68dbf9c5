// Autograd of the objectives.
//
// A loss that is reduced to a scalar has its gradient computed in the forward, while each row is in the cache; the
// backward multiplies it by the upstream gradient, which is mostly 1. Everything else (reduction "none", half types,
// gradients of the returned parts, a graph of the gradient, a gradient for x) is put together in the backward from the
// backward ops of the likelihood and of the KL: composite/objective.cpp.
#include "composite/objective.h"
#include "autograd/common.h"

namespace fastelbo::autograd {
namespace {

struct LogMeanExp : public Function<LogMeanExp> {
  static variable_list forward(AutogradContext* ctx, const Tensor& log_w, int64_t dim) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({log_w});
    ctx->saved_data["dim"] = dim;
    return {ops::log_mean_exp(log_w, dim)};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    BelowAutogradUnlessGraph guard;
    return {ops::log_mean_exp_backward(grads[0], ctx->get_saved_variables()[0], ctx->saved_data["dim"].toInt()),
            Tensor()};
  }
};

// Whether a gradient that is computed in the forward and multiplied by the upstream one in the backward is as good as
// one computed in the backward. float16 loses by it: what is too small for it is gone before a gradient scaler's 2^16,
// which exists to save just that. bfloat16 has the range of float, and a scaler's power of two multiplies exactly.
bool keeps_precision(const Tensor& t) { return !wants_grad(t) || t.scalar_type() != at::kHalf; }
// The weights of a K-sample bound would have to be rounded to bfloat16, too, before they are multiplied.
bool keeps_weighted_precision(const Tensor& t) { return !wants_grad(t) || t.element_size() >= 4; }

// Hands out the gradients of a scalar loss that its forward computed and saved, times the upstream gradient.
class Given {
  const variable_list& saved_;
  const Tensor& grad_loss_;
  const bool owned_;

 public:
  Given(AutogradContext* ctx, const variable_list& saved, const Tensor& grad_loss)
      : saved_(saved), grad_loss_(grad_loss), owned_(owns_saved(ctx)) {}
  Tensor operator()(size_t i) const { return scaled(saved_[i], grad_loss_, owned_); }
  // no gradient, but factors, which carry no upstream one: math/estimator.h
  Tensor factors(size_t i) const { return !saved_[i].defined() || owned_ ? saved_[i] : saved_[i].clone(); }
};

struct ElboLoss : public Function<ElboLoss> {
  // what is saved: the parameters, these inputs, the KL, and the gradients that the forward computed
  enum { kX, kMu, kLogvar, kPriorMu, kPriorLogvar, kMask, kBeta, kFreeBits, kKl, kGrads };

  template <class... A>
  static variable_list forward(AutogradContext* ctx, const A&... arguments) {
    ElboInputs in{arguments...};
    const std::array<Tensor, 4> latents{in.mu, in.logvar, tensor(in.prior_mu), tensor(in.prior_logvar)};
    variable_list saved(in.parameters.begin(), in.parameters.end());
    saved.insert(saved.end(), {in.x, in.mu, in.logvar, latents[2], latents[3], tensor(in.mask), tensor(in.beta),
                               tensor(in.free_bits)});
    bool fused = in.reduction != "none" && !wants_grad(in.x) && !wants_grad(in.beta);
    in.needs = 0;
    for (size_t i = 0; i < in.parameters.size(); ++i) {
      fused &= keeps_precision(in.parameters[i]);
      in.needs |= int64_t(wants_grad(in.parameters[i])) << i;
    }
    for (size_t i = 0; i < 4; ++i) {
      fused &= keeps_precision(latents[i]);
      in.needs |= int64_t(wants_grad(latents[i])) << (kMaxParameters + i);
    }
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto found = ops::elbo_loss(in.parameters, in.x, in.mu, in.logvar, in.prior_mu, in.prior_logvar, in.mask,
                                      in.beta, in.free_bits, in.likelihood, in.reduction, fused ? in.needs : 0);
    const auto [loss, log_likelihood, kl] = some_of<3>(found);
    // an output is saved only where the backward may need it: its owner may change it in place
    saved.push_back(wants_grad(in.beta) ? kl : Tensor());
    for (const Tensor& grad : some_of<kMaxParameters + 4, 3>(found)) saved.push_back(grad);
    ctx->set_materialize_grads(false);
    save(ctx, std::move(saved));
    ctx->saved_data["options"] = std::tuple<bool, int64_t, std::string, std::string>(
        fused, int64_t(in.parameters.size()), std::string(in.likelihood), std::string(in.reduction));
    return {loss, log_likelihood, kl};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto& options = ctx->saved_data["options"].toTupleRef().elements();
    const size_t n = options[1].toInt();
    variable_list result(n + 11);
    if (options[0].toBool() && !grads[1].defined() && !grads[2].defined() && !at::GradMode::is_enabled()) {
      if (!grads[0].defined()) return result;
      const Given given(ctx, saved, grads[0]);
      for (size_t i = 0; i < n; ++i) result[i] = given(n + kGrads + i);
      for (size_t i = 0; i < 4; ++i) result[n + kMu + i] = given(n + kGrads + kMaxParameters + i);
      return result;
    }
    const auto needed = needs<kMaxParameters + kKl>(ctx, at::TensorList(saved).slice(0, n + kKl));
    const auto at = [&](size_t i) { return optional(saved[n + i]); };
    BelowAutogradUnlessGraph guard;
    const composite::ElboGrads found = composite::elbo_loss_backward(
        grads[0], grads[1], grads[2],
        {at::TensorList(saved).slice(0, n), saved[n + kX], saved[n + kMu], saved[n + kLogvar], at(kPriorMu),
         at(kPriorLogvar), at(kMask), at(kBeta), at(kFreeBits), options[2].toStringRef(), options[3].toStringRef(), 0},
        composite::fit_needs(needed, n),
        {needed[n + kMu], needed[n + kLogvar], needed[n + kPriorMu], needed[n + kPriorLogvar]}, needed[n + kBeta],
        saved[n + kKl]);
    for (size_t i = 0; i < n; ++i) result[i] = found.parameters[i];
    result[n + kX] = found.x, result[n + kBeta] = found.beta;
    for (size_t i = 0; i < 4; ++i) result[n + kMu + i] = found.latents[i];
    return result;
  }
};

struct MultiSampleLoss : public Function<MultiSampleLoss> {
  // what is saved: the parameters, these inputs, log p, and the gradients that the forward computed
  enum { kX, kLogRatio, kGates, kMask, kElboWeight, kAlpha, kLogLikelihood, kGrads };

  template <class... A>
  static variable_list forward(AutogradContext* ctx, const A&... arguments) {
    MultiSampleInputs in{arguments...};
    variable_list saved(in.parameters.begin(), in.parameters.end());
    saved.insert(saved.end(),
                 {in.x, in.log_ratio, tensor(in.gates), tensor(in.mask), tensor(in.elbo_weight), tensor(in.alpha)});
    bool fused = in.reduction != "none" && !wants_grad(in.x) && !wants_grad(in.elbo_weight) && !wants_grad(in.alpha) &&
                 keeps_weighted_precision(in.log_ratio);
    in.needs = int64_t(wants_grad(in.log_ratio)) << kMaxParameters | int64_t(wants_grad(in.gates))
                                                                         << (kMaxParameters + 1);
    for (size_t i = 0; i < in.parameters.size(); ++i) {
      fused &= keeps_weighted_precision(in.parameters[i]);
      in.needs |= int64_t(wants_grad(in.parameters[i])) << i;
    }
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto found =
        ops::multi_sample_loss(in.parameters, in.x, in.log_ratio, in.gates, in.mask, in.elbo_weight, in.alpha,
                               in.groups, in.coefficients, in.likelihood, in.reduction, fused ? in.needs : 0);
    const auto [loss, log_likelihood] = some_of<2>(found);
    saved.push_back(fused ? Tensor() : log_likelihood);
    for (const Tensor& grad : some_of<kMaxParameters + 2, 2>(found)) saved.push_back(grad);
    ctx->set_materialize_grads(false);
    save(ctx, std::move(saved));
    ctx->saved_data["options"] = std::tuple<bool, int64_t, int64_t, std::vector<double>, std::string, std::string>(
        fused, int64_t(in.parameters.size()), in.groups, in.coefficients.vec(), std::string(in.likelihood),
        std::string(in.reduction));
    return {loss, log_likelihood};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto& options = ctx->saved_data["options"].toTupleRef().elements();
    const size_t n = options[1].toInt();
    variable_list result(n + 11);
    if (options[0].toBool() && !grads[1].defined() && !at::GradMode::is_enabled()) {
      if (!grads[0].defined()) return result;
      const Given given(ctx, saved, grads[0]);
      for (size_t i = 0; i < n; ++i) result[i] = given(n + kGrads + i);
      result[n + kLogRatio] = given(n + kGrads + kMaxParameters);
      result[n + kGates] = given.factors(n + kGrads + kMaxParameters + 1);
      return result;
    }
    const auto needed = needs<kMaxParameters + kLogLikelihood>(ctx, at::TensorList(saved).slice(0, n + kLogLikelihood));
    const auto at = [&](size_t i) { return optional(saved[n + i]); };
    const auto coefficients = options[3].toDoubleVector();
    BelowAutogradUnlessGraph guard;
    const composite::MultiSampleGrads found = composite::multi_sample_loss_backward(
        grads[0], grads[1],
        {at::TensorList(saved).slice(0, n), saved[n + kX], saved[n + kLogRatio], at(kGates), at(kMask), at(kElboWeight),
         at(kAlpha), options[2].toInt(), coefficients, options[4].toStringRef(), options[5].toStringRef(), 0},
        composite::fit_needs(needed, n),
        {needed[n + kLogRatio], needed[n + kGates], needed[n + kElboWeight], needed[n + kAlpha]},
        saved[n + kLogLikelihood]);
    for (size_t i = 0; i < n; ++i) result[i] = found.parameters[i];
    result[n + kX] = found.x, result[n + kLogRatio] = found.bound.log_w, result[n + kGates] = found.bound.gates;
    result[n + kElboWeight] = found.bound.elbo_weight, result[n + kAlpha] = found.bound.alpha;
    return result;
  }
};

// Minus the bound of log w [K, B]: [B].
struct MinusBound : public Function<MinusBound> {
  enum { kLogW, kGates, kElboWeight, kAlpha, kWeights, kFactors, kSaved };

  static variable_list forward(AutogradContext* ctx, const Tensor& log_w, const OptionalTensor& gates,
                               const OptionalTensor& elbo_weight, const OptionalTensor& alpha, int64_t groups,
                               at::ArrayRef<double> coefficients) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [bound, weights, factors, slopes] =
        ops::multi_sample_weights(log_w, elbo_weight, alpha, groups, coefficients, false);
    ctx->save_for_backward({log_w, tensor(gates), tensor(elbo_weight), tensor(alpha), weights, factors});
    ctx->saved_data["options"] = std::tuple<int64_t, std::vector<double>>(groups, coefficients.vec());
    return {bound.neg()};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto& options = ctx->saved_data["options"].toTupleRef().elements();
    const auto needed = needs<4>(ctx, saved);
    const auto coefficients = options[1].toDoubleVector();
    BelowAutogradUnlessGraph guard;
    const composite::BoundGrads found = composite::minus_bound_backward(
        grads[0], saved[kLogW], optional(saved[kGates]), optional(saved[kElboWeight]), optional(saved[kAlpha]),
        options[0].toInt(), coefficients, needed, saved[kWeights], saved[kFactors]);
    return {
        found.log_w.to(saved[kLogW].scalar_type()), found.gates, found.elbo_weight, found.alpha, Tensor(), Tensor()};
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastelbo, Autograd, m) {
  m.impl("log_mean_exp", Apply<LogMeanExp, decltype(ops::log_mean_exp)>::call);
  m.impl("elbo_loss", Apply<ElboLoss, decltype(ops::elbo_loss)>::call);
  m.impl("multi_sample_loss", Apply<MultiSampleLoss, decltype(ops::multi_sample_loss)>::call);
  m.impl("minus_bound", Apply<MinusBound, decltype(ops::minus_bound)>::call);
}

}  // namespace fastelbo::autograd
