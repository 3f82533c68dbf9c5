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

#include "params.h"

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

using Samples = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // z, kl, log_ratio, log_q, gates
inline constexpr Op<"fastelbo::rsample",
                    Samples(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                            const OptionalTensor& prior_logvar, OptionalInt num_samples, const OptionalTensor& seed,
                            const OptionalTensor& eps, const OptionalTensor& sample, const OptionalTensor& datum,
                            c10::SymInt first_sample)>
    rsample;

// The arguments of rsample.
struct SampleInputs {
  Tensor mu, logvar;
  OptionalTensor prior_mu, prior_logvar;
  OptionalInt num_samples;
  OptionalTensor seed, eps, sample, datum;
  c10::SymInt first_sample;
};

using SampleGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // of mu, logvar, prior_mu, prior_logvar, eps
inline constexpr Op<
    "fastelbo::_rsample_backward",
    SampleGrads(const OptionalTensor& grad_z, const OptionalTensor& grad_kl, const OptionalTensor& grad_log_ratio,
                const OptionalTensor& grad_log_q, const OptionalTensor& grad_gates, const Tensor& mu,
                const Tensor& logvar, const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                OptionalInt num_samples, const OptionalTensor& seed, const OptionalTensor& eps,
                const OptionalTensor& sample, const OptionalTensor& datum, c10::SymInt first_sample,
                std::array<bool, 5> needs)>
    rsample_backward;

inline constexpr Op<"fastelbo::gaussian_kl",
                    Tensor(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                           const OptionalTensor& prior_logvar, const OptionalTensor& free_bits)>
    gaussian_kl;

using KlGrads = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // of mu, logvar, prior_mu, prior_logvar
inline constexpr Op<"fastelbo::_gaussian_kl_backward",
                    KlGrads(const Tensor& grad, const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                            const OptionalTensor& prior_logvar, const OptionalTensor& free_bits,
                            std::array<bool, 4> needs)>
    gaussian_kl_backward;

// ---------------------------------------------------------------------------------------------------------------------
// likelihood

using ParameterGrads = std::array<Tensor, kMaxParameters>;

// N tensors of a tuple, from the first that is wanted on.
template <size_t N, size_t from = 0, class... T>
std::array<Tensor, N> some_of(const std::tuple<T...>& all) {
  return [&]<size_t... i>(std::index_sequence<i...>) {
    return std::array<Tensor, N>{std::get<from + i>(all)...};
  }(std::make_index_sequence<N>());
}

inline constexpr Op<"fastelbo::log_prob", Tensor(at::TensorList parameters, const Tensor& x, const OptionalTensor& mask,
                                                 std::string_view likelihood)>
    log_prob;

using LogProbGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // of the parameters, then of x
inline constexpr Op<"fastelbo::_log_prob_backward",
                    LogProbGrads(const Tensor& grad, at::TensorList parameters, const Tensor& x,
                                 const OptionalTensor& mask, std::string_view likelihood, std::array<bool, 5> needs)>
    log_prob_backward;

// ---------------------------------------------------------------------------------------------------------------------
// objective

inline constexpr Op<"fastelbo::log_mean_exp", Tensor(const Tensor& log_w, int64_t dim)> log_mean_exp;
inline constexpr Op<"fastelbo::_log_mean_exp_backward", Tensor(const Tensor& grad, const Tensor& log_w, int64_t dim)>
    log_mean_exp_backward;

// loss, log_likelihood, kl; gradients of the parameters, mu, logvar, prior_mu, prior_logvar
using ElboLoss = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
inline constexpr Op<"fastelbo::elbo_loss",
                    ElboLoss(at::TensorList parameters, const Tensor& x, const Tensor& mu, const Tensor& logvar,
                             const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                             const OptionalTensor& mask, const OptionalTensor& beta, const OptionalTensor& free_bits,
                             std::string_view likelihood, std::string_view reduction, int64_t needs)>
    elbo_loss;

struct ElboInputs {
  at::TensorList parameters;
  Tensor x, mu, logvar;
  OptionalTensor prior_mu, prior_logvar, mask, beta, free_bits;
  std::string_view likelihood, reduction;
  int64_t needs;
};

// loss, log_likelihood; gradients of the parameters, log_ratio, gates
using MultiSampleLoss = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
inline constexpr Op<"fastelbo::multi_sample_loss",
                    MultiSampleLoss(at::TensorList parameters, const Tensor& x, const Tensor& log_ratio,
                                    const OptionalTensor& gates, const OptionalTensor& mask,
                                    const OptionalTensor& elbo_weight, const OptionalTensor& alpha, int64_t groups,
                                    at::ArrayRef<double> steering, std::string_view likelihood,
                                    std::string_view reduction, int64_t needs)>
    multi_sample_loss;

struct MultiSampleInputs {
  at::TensorList parameters;
  Tensor x, log_ratio;
  OptionalTensor gates, mask, elbo_weight, alpha;
  int64_t groups;
  at::ArrayRef<double> steering;
  std::string_view likelihood, reduction;
  int64_t needs;
};

using Weights = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // bound [B], a [K, B], gates [2, K, B], slopes [2, B]
inline constexpr Op<"fastelbo::_multi_sample_weights",
                    Weights(const Tensor& log_w, const OptionalTensor& elbo_weight, const OptionalTensor& alpha,
                            int64_t groups, at::ArrayRef<double> steering, bool slopes)>
    multi_sample_weights;

inline constexpr Op<"fastelbo::minus_bound",
                    Tensor(const Tensor& log_w, const OptionalTensor& gates, const OptionalTensor& elbo_weight,
                           const OptionalTensor& alpha, int64_t groups, at::ArrayRef<double> steering)>
    minus_bound;

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
