// The losses without gradients, and their backwards, put together from other ops: the same code on every device.
#pragma once

#include <string>
#include <vector>

#include "aten.h"
#include "ops.h"

namespace fastelbo::composite {

using namespace ops;

// What the losses read of a likelihood. The tensors that are not there are undefined.
struct LikelihoodInputs {
  Tensor recon, x, second, third, mask;
  std::string likelihood;
};

struct LikelihoodGrads {
  Tensor recon, x, second, third;  // undefined where not wanted
};

struct ElboInputs {
  LikelihoodInputs fit;
  Tensor mu, logvar, prior_mu, prior_logvar, beta_tensor;
  double beta, free_bits;
  std::string reduction;
  Tensor kl;  // [B], the loss's own output, where it was kept: for the gradient by beta_tensor
};

struct ElboNeeds {
  std::array<bool, 4> fit, latent;  // recon, x, second, third; mu, logvar, prior_mu, prior_logvar
  bool beta;
};

struct ElboGrads {
  LikelihoodGrads fit;
  Tensor mu, logvar, prior_mu, prior_logvar, beta;
};

// grad_loss, grad_log_likelihood, grad_kl: upstream gradients; undefined ones are 0.
ElboGrads elbo_loss_backward(const Tensor& grad_loss, const Tensor& grad_log_likelihood, const Tensor& grad_kl,
                             const ElboInputs& in, const ElboNeeds& needs);

struct MultiSampleInputs {
  LikelihoodInputs fit;
  Tensor log_ratio, gates;
  std::vector<double> estimator;
  std::string reduction;
  Tensor log_likelihood;  // [K, B], the loss's own output, where it was kept
};

struct MultiSampleNeeds {
  std::array<bool, 4> fit;
  bool log_ratio, gates;
};

struct MultiSampleGrads {
  LikelihoodGrads fit;
  Tensor log_ratio, gates;
};

MultiSampleGrads multi_sample_loss_backward(const Tensor& grad_loss, const Tensor& grad_log_likelihood,
                                            const MultiSampleInputs& in, const MultiSampleNeeds& needs);

}  // namespace fastelbo::composite
