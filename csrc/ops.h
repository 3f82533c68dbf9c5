// The ops as C++ functions, called through the dispatcher: ops::log_prob(recon, x, ...). Their arguments are explained
// in library.cpp.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>
#include <utility>

namespace fastelbo::ops {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalInt = std::optional<c10::SymInt>;

// An undefined tensor, which autograd and composite code pass around, as an absent argument of an op.
inline OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

template <size_t N>
struct Name {
  char text[N];
  constexpr Name(const char (&literal)[N]) {
    for (size_t i = 0; i < N; ++i) text[i] = literal[i];
  }
};

template <Name name, class Signature>
struct Op;

template <Name name, class R, class... A>
struct Op<name, R(A...)> {
  R operator()(A... arguments) const {
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.text, "").template typed<R(A...)>();
    return op.call(std::forward<A>(arguments)...);
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// latent

using Samples = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // z, kl, log_ratio, gates
inline constexpr Op<"fastelbo::rsample",
                    Samples(const Tensor& mu, const Tensor& logvar, OptionalInt num_samples,
                            const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                            const OptionalTensor& seed, const OptionalTensor& eps, c10::SymInt first_sample)>
    rsample;

using SampleGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // of mu, logvar, prior_mu, prior_logvar, eps
inline constexpr Op<
    "fastelbo::_rsample_backward",
    SampleGrads(const OptionalTensor& grad_z, const OptionalTensor& grad_kl, const OptionalTensor& grad_log_ratio,
                const OptionalTensor& grad_gates, const Tensor& mu, const Tensor& logvar, OptionalInt num_samples,
                const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar, const OptionalTensor& seed,
                const OptionalTensor& eps, c10::SymInt first_sample, std::array<bool, 5> needs)>
    rsample_backward;

using KeptSamples = std::tuple<Tensor, Tensor, Tensor>;  // z, log_ratio, gates
inline constexpr Op<"fastelbo::_rsample_kept",
                    KeptSamples(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                                const OptionalTensor& prior_logvar, const Tensor& sample, const Tensor& datum,
                                const Tensor& seed)>
    rsample_kept;

using KeptGrads = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // of mu, logvar, prior_mu, prior_logvar
inline constexpr Op<"fastelbo::_rsample_kept_backward",
                    KeptGrads(const OptionalTensor& grad_z, const OptionalTensor& grad_log_ratio,
                              const OptionalTensor& grad_gates, const Tensor& mu, const Tensor& logvar,
                              const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar, const Tensor& sample,
                              const Tensor& datum, const Tensor& seed, std::array<bool, 4> needs)>
    rsample_kept_backward;

inline constexpr Op<"fastelbo::gaussian_kl",
                    Tensor(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                           const OptionalTensor& prior_logvar, double free_bits)>
    gaussian_kl;

using KlGrads = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // of mu, logvar, prior_mu, prior_logvar
inline constexpr Op<"fastelbo::_gaussian_kl_backward",
                    KlGrads(const Tensor& grad, const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                            const OptionalTensor& prior_logvar, double free_bits, std::array<bool, 4> needs)>
    gaussian_kl_backward;

// ---------------------------------------------------------------------------------------------------------------------
// likelihood

inline constexpr Op<"fastelbo::log_prob",
                    Tensor(const Tensor& recon, const Tensor& x, const OptionalTensor& second,
                           const OptionalTensor& third, const OptionalTensor& mask, std::string_view likelihood)>
    log_prob;

using LogProbGrads = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // of recon, x, second, third
inline constexpr Op<"fastelbo::_log_prob_backward",
                    LogProbGrads(const Tensor& grad, const Tensor& recon, const Tensor& x, const OptionalTensor& second,
                                 const OptionalTensor& third, const OptionalTensor& mask, std::string_view likelihood,
                                 std::array<bool, 4> needs)>
    log_prob_backward;

// ---------------------------------------------------------------------------------------------------------------------
// objective

inline constexpr Op<"fastelbo::log_mean_exp", Tensor(const Tensor& log_w, int64_t dim)> log_mean_exp;
inline constexpr Op<"fastelbo::_log_mean_exp_backward", Tensor(const Tensor& grad, const Tensor& log_w, int64_t dim)>
    log_mean_exp_backward;

using ElboLoss = std::tuple<Tensor, Tensor, Tensor>;  // loss, log_likelihood, kl
inline constexpr Op<"fastelbo::elbo_loss",
                    ElboLoss(const Tensor& recon, const Tensor& x, const Tensor& mu, const Tensor& logvar,
                             const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                             const OptionalTensor& second, const OptionalTensor& third, const OptionalTensor& mask,
                             double beta, const OptionalTensor& beta_tensor, double free_bits,
                             std::string_view likelihood, std::string_view reduction)>
    elbo_loss;

// the same, and the gradients of recon, mu, logvar, prior_mu, prior_logvar, second, third
using ElboForward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
inline constexpr Op<"fastelbo::_elbo_loss_forward",
                    ElboForward(const Tensor& recon, const Tensor& x, const Tensor& mu, const Tensor& logvar,
                                const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                                const OptionalTensor& second, const OptionalTensor& third, const OptionalTensor& mask,
                                double beta, const OptionalTensor& beta_tensor, double free_bits,
                                std::string_view likelihood, std::string_view reduction, std::array<bool, 7> needs)>
    elbo_loss_forward;

using MultiSampleLoss = std::tuple<Tensor, Tensor>;  // loss, log_likelihood
inline constexpr Op<"fastelbo::multi_sample_loss",
                    MultiSampleLoss(
                        const Tensor& recon, const Tensor& x, const Tensor& log_ratio, const OptionalTensor& gates,
                        const OptionalTensor& second, const OptionalTensor& third, const OptionalTensor& mask,
                        std::string_view likelihood, at::ArrayRef<double> estimator, std::string_view reduction)>
    multi_sample_loss;

// the same, and the gradients of recon, log_ratio, gates, second, third
using MultiSampleForward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
inline constexpr Op<"fastelbo::_multi_sample_loss_forward",
                    MultiSampleForward(const Tensor& recon, const Tensor& x, const Tensor& log_ratio,
                                       const OptionalTensor& gates, const OptionalTensor& second,
                                       const OptionalTensor& third, const OptionalTensor& mask,
                                       std::string_view likelihood, at::ArrayRef<double> estimator,
                                       std::string_view reduction, std::array<bool, 5> needs)>
    multi_sample_loss_forward;

using Weights = std::tuple<Tensor, Tensor, Tensor>;  // bound [B], a [K, B], gates [2, K, B]
inline constexpr Op<"fastelbo::_multi_sample_weights", Weights(const Tensor& log_w, at::ArrayRef<double> estimator)>
    multi_sample_weights;

inline constexpr Op<"fastelbo::_scale_", void(const Tensor& t, const Tensor& factor)> scale_;

// ---------------------------------------------------------------------------------------------------------------------
// ppca

inline constexpr Op<"fastelbo::ppca_log_prob",
                    Tensor(const Tensor& x, const Tensor& W, const Tensor& b, const Tensor& log_sigma2)>
    ppca_log_prob;

// log_prob, coords, rest, basis, triangle, whiten
using PpcaForward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
inline constexpr Op<"fastelbo::_ppca_log_prob_forward",
                    PpcaForward(const Tensor& x, const Tensor& W, const Tensor& b, const Tensor& log_sigma2)>
    ppca_log_prob_forward;

using PpcaGrads = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // of x, W, b, log_sigma2
inline constexpr Op<"fastelbo::_ppca_log_prob_backward",
                    PpcaGrads(const Tensor& grad, const Tensor& x, const Tensor& W, const Tensor& b,
                              const Tensor& log_sigma2, const Tensor& coords, const Tensor& rest, const Tensor& basis,
                              const Tensor& triangle, const Tensor& whiten, std::array<bool, 4> needs)>
    ppca_log_prob_backward;

using PpcaFactors = std::tuple<Tensor, Tensor, Tensor>;  // basis, triangle, whiten
inline constexpr Op<"fastelbo::_ppca_factor", PpcaFactors(const Tensor& W, const Tensor& log_sigma2)> ppca_factor;

using PpcaInverses = std::tuple<Tensor, Tensor>;  // inverses, log_det
inline constexpr Op<"fastelbo::_ppca_invert", PpcaInverses(const Tensor& matrices)> ppca_invert;

using PpcaCoordinates = std::tuple<Tensor, Tensor>;  // coords, square
inline constexpr Op<"fastelbo::_ppca_project", PpcaCoordinates(const Tensor& x, const Tensor& basis, const Tensor& b)>
    ppca_project;

inline constexpr Op<"fastelbo::_ppca_rest", Tensor(const Tensor& x, const Tensor& basis, const Tensor& b,
                                                   const Tensor& coords, const Tensor& square)>
    ppca_rest;

using PpcaSums = std::tuple<Tensor, Tensor, Tensor>;  // residual, cross, sum
inline constexpr Op<"fastelbo::_ppca_residual",
                    PpcaSums(const Tensor& x, const Tensor& basis, const Tensor& b, const Tensor& coords,
                             const Tensor& mean, const Tensor& weight, std::array<bool, 3> needs)>
    ppca_residual;

}  // namespace fastelbo::ops
