// The backwards of the losses, put together from other ops: the same code on every device.
#pragma once

#include "aten.h"
#include "ops.h"

namespace fastelbo::composite {

using namespace ops;

using FitNeeds = std::array<bool, kMaxParameters + 1>;  // the parameters of the likelihood, then x

// Of the inputs of a loss, n parameters and x in front.
template <size_t N>
FitNeeds fit_needs(const std::array<bool, N>& needed, size_t n) {
  FitNeeds result{};
  std::copy_n(needed.begin(), n, result.begin());
  result[kMaxParameters] = needed[n];
  return result;
}

// Gradients, here and below undefined where not wanted.
struct FitGrads {
  ParameterGrads parameters;
  Tensor x;
};

struct ElboGrads : FitGrads {
  std::array<Tensor, 4> latents;  // mu, logvar, prior_mu, prior_logvar
  Tensor beta;
};

// grad_loss, grad_log_likelihood, grad_kl: upstream gradients; undefined ones are 0. kl [B]: the loss's own output,
// where it was kept, for the gradient by beta.
ElboGrads elbo_loss_backward(const Tensor& grad_loss, const Tensor& grad_log_likelihood, const Tensor& grad_kl,
                             const ElboInputs& in, const FitNeeds& fit, const std::array<bool, 4>& latents, bool beta,
                             const Tensor& kl);

struct BoundGrads {
  Tensor log_w, gates, elbo_weight, alpha;
};

// Of minus the bound [B] of log w, with the upstream gradient [B]. weights, factors: as the forward computed them,
// where they were kept.
BoundGrads minus_bound_backward(const Tensor& grad, const Tensor& log_w, const OptionalTensor& gates,
                                const OptionalTensor& elbo_weight, const OptionalTensor& alpha, int64_t groups,
                                at::ArrayRef<double> coefficients, const std::array<bool, 4>& needs,
                                const Tensor& weights = {}, const Tensor& factors = {});

struct MultiSampleGrads : FitGrads {
  BoundGrads bound;  // its log_w: of the log ratio
};

// log_likelihood [K, B]: the loss's own output, where it was kept.
MultiSampleGrads multi_sample_loss_backward(const Tensor& grad_loss, const Tensor& grad_log_likelihood,
                                            const MultiSampleInputs& in, const FitNeeds& fit,
                                            const std::array<bool, 4>& bound, const Tensor& log_likelihood);

}  // namespace fastelbo::composite
