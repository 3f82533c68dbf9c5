// The ops as C++ functions, called through the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "estimator.h"

namespace fastelbo::ops {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalInt = std::optional<c10::SymInt>;
using Tensors = std::vector<Tensor>;

#define FASTELBO_OP(NAME, ...) \
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fastelbo::" NAME, "").typed<__VA_ARGS__>()

inline Tensors rsample_backward(const OptionalTensor& grad_z, const OptionalTensor& grad_kl,
                                const OptionalTensor& grad_log_ratio, const OptionalTensor& grad_gates,
                                const Tensor& mu, const Tensor& logvar, OptionalInt num_samples,
                                const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                                const OptionalTensor& seed, const OptionalTensor& eps, c10::SymInt first_sample,
                                std::array<bool, 5> needs) {
  FASTELBO_OP("_rsample_backward",
              Tensors(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                      const Tensor&, const Tensor&, OptionalInt, const OptionalTensor&, const OptionalTensor&,
                      const OptionalTensor&, const OptionalTensor&, c10::SymInt, std::array<bool, 5>));
  return op.call(grad_z, grad_kl, grad_log_ratio, grad_gates, mu, logvar, std::move(num_samples), prior_mu,
                 prior_logvar, seed, eps, std::move(first_sample), needs);
}

using Samples = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // z, kl, log_ratio, gates
inline Samples rsample(const Tensor& mu, const Tensor& logvar, OptionalInt num_samples, const OptionalTensor& prior_mu,
                       const OptionalTensor& prior_logvar, const OptionalTensor& seed, const OptionalTensor& eps,
                       c10::SymInt first_sample) {
  FASTELBO_OP("rsample", Samples(const Tensor&, const Tensor&, OptionalInt, const OptionalTensor&,
                                 const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, c10::SymInt));
  return op.call(mu, logvar, std::move(num_samples), prior_mu, prior_logvar, seed, eps, std::move(first_sample));
}

inline Tensor gaussian_kl(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                          const OptionalTensor& prior_logvar, double free_bits) {
  FASTELBO_OP("gaussian_kl",
              Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, double));
  return op.call(mu, logvar, prior_mu, prior_logvar, free_bits);
}

inline Tensors gaussian_kl_backward(const Tensor& grad, const Tensor& mu, const Tensor& logvar,
                                    const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                                    double free_bits, std::array<bool, 4> needs) {
  FASTELBO_OP("_gaussian_kl_backward", Tensors(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                               const OptionalTensor&, double, std::array<bool, 4>));
  return op.call(grad, mu, logvar, prior_mu, prior_logvar, free_bits, needs);
}

inline Tensor log_prob(const Tensor& recon, const Tensor& x, const OptionalTensor& scale, const OptionalTensor& mask,
                       std::string_view likelihood) {
  FASTELBO_OP("log_prob",
              Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, std::string_view));
  return op.call(recon, x, scale, mask, likelihood);
}

inline Tensors log_prob_backward(const Tensor& grad, const Tensor& recon, const Tensor& x, const OptionalTensor& scale,
                                 const OptionalTensor& mask, std::string_view likelihood, std::array<bool, 3> needs) {
  FASTELBO_OP("_log_prob_backward", Tensors(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                            const OptionalTensor&, std::string_view, std::array<bool, 3>));
  return op.call(grad, recon, x, scale, mask, likelihood, needs);
}

inline Tensor log_mean_exp(const Tensor& log_w, int64_t dim) {
  FASTELBO_OP("log_mean_exp", Tensor(const Tensor&, int64_t));
  return op.call(log_w, dim);
}

inline Tensor log_mean_exp_backward(const Tensor& grad, const Tensor& log_w, int64_t dim) {
  FASTELBO_OP("_log_mean_exp_backward", Tensor(const Tensor&, const Tensor&, int64_t));
  return op.call(grad, log_w, dim);
}

using ElboForward = std::tuple<Tensor, Tensor, Tensor, Tensors>;
inline ElboForward elbo_loss_forward(const Tensor& recon, const Tensor& x, const Tensor& mu, const Tensor& logvar,
                                     const OptionalTensor& scale, const OptionalTensor& mask, double beta,
                                     const OptionalTensor& beta_tensor, double free_bits, std::string_view likelihood,
                                     std::string_view reduction, std::array<bool, 4> needs) {
  FASTELBO_OP("_elbo_loss_forward",
              ElboForward(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                          const OptionalTensor&, double, const OptionalTensor&, double, std::string_view,
                          std::string_view, std::array<bool, 4>));
  return op.call(recon, x, mu, logvar, scale, mask, beta, beta_tensor, free_bits, likelihood, reduction, needs);
}

using MultiSampleForward = std::tuple<Tensor, Tensor, Tensors>;
inline MultiSampleForward multi_sample_loss_forward(const Tensor& recon, const Tensor& x, const Tensor& log_ratio,
                                                    const OptionalTensor& gates, const OptionalTensor& scale,
                                                    const OptionalTensor& mask, std::string_view likelihood,
                                                    std::string_view reduction, const Estimator& e,
                                                    std::array<bool, 4> needs) {
  FASTELBO_OP("_multi_sample_loss_forward",
              MultiSampleForward(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                 const OptionalTensor&, const OptionalTensor&, std::string_view, std::string_view,
                                 double, double, int64_t, double, double, double, std::array<bool, 4>));
  return op.call(recon, x, log_ratio, gates, scale, mask, likelihood, reduction, e.elbo_share, e.alpha, e.groups,
                 e.path, e.path_weight, e.score, needs);
}

inline void scale_(const Tensor& t, const Tensor& factor) {
  FASTELBO_OP("_scale_", void(const Tensor&, const Tensor&));
  op.call(t, factor);
}

inline Tensor ppca_log_prob(const Tensor& x, const Tensor& W, const Tensor& b, const Tensor& log_sigma2) {
  FASTELBO_OP("ppca_log_prob", Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&));
  return op.call(x, W, b, log_sigma2);
}

// log_prob, coords, rest, basis, triangle, whiten
using PpcaForward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
inline PpcaForward ppca_log_prob_forward(const Tensor& x, const Tensor& W, const Tensor& b, const Tensor& log_sigma2) {
  FASTELBO_OP("_ppca_log_prob_forward", PpcaForward(const Tensor&, const Tensor&, const Tensor&, const Tensor&));
  return op.call(x, W, b, log_sigma2);
}

inline Tensors ppca_log_prob_backward(const Tensor& grad, const Tensor& x, const Tensor& W, const Tensor& b,
                                      const Tensor& log_sigma2, const Tensor& coords, const Tensor& rest,
                                      const Tensor& basis, const Tensor& triangle, const Tensor& whiten,
                                      std::array<bool, 4> needs) {
  FASTELBO_OP("_ppca_log_prob_backward",
              Tensors(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                      const Tensor&, const Tensor&, const Tensor&, const Tensor&, std::array<bool, 4>));
  return op.call(grad, x, W, b, log_sigma2, coords, rest, basis, triangle, whiten, needs);
}

using PpcaFactor = std::tuple<Tensor, Tensor, Tensor>;  // basis, triangle, whiten
inline PpcaFactor ppca_factor(const Tensor& W, const Tensor& log_sigma2) {
  FASTELBO_OP("_ppca_factor", PpcaFactor(const Tensor&, const Tensor&));
  return op.call(W, log_sigma2);
}

using PpcaProjection = std::tuple<Tensor, Tensor>;  // coords, square
inline PpcaProjection ppca_project(const Tensor& x, const Tensor& basis, const Tensor& b) {
  FASTELBO_OP("_ppca_project", PpcaProjection(const Tensor&, const Tensor&, const Tensor&));
  return op.call(x, basis, b);
}

inline Tensor ppca_rest(const Tensor& x, const Tensor& basis, const Tensor& b, const Tensor& coords,
                        const Tensor& square) {
  FASTELBO_OP("_ppca_rest", Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&));
  return op.call(x, basis, b, coords, square);
}

using PpcaResidual = std::tuple<Tensor, Tensor, Tensor>;  // residual, cross, sum
inline PpcaResidual ppca_residual(const Tensor& x, const Tensor& basis, const Tensor& b, const Tensor& coords,
                                  const Tensor& mean, const Tensor& weight, std::array<bool, 3> needs) {
  FASTELBO_OP("_ppca_residual", PpcaResidual(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                             const Tensor&, std::array<bool, 3>));
  return op.call(x, basis, b, coords, mean, weight, needs);
}

#undef FASTELBO_OP

}  // namespace fastelbo::ops
