// The ops as C++ functions, called through the dispatcher: ops::log_prob(parameters, x, ...). Their arguments are named
// and explained in library.cpp.
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
using In = const Tensor&;
using Maybe = const OptionalTensor&;

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
                    Samples(In, In, Maybe, Maybe, OptionalInt, Maybe, Maybe, Maybe, Maybe, c10::SymInt)>
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
inline constexpr Op<"fastelbo::_rsample_backward",
                    SampleGrads(Maybe, Maybe, Maybe, Maybe, Maybe, In, In, Maybe, Maybe, OptionalInt, Maybe, Maybe,
                                Maybe, Maybe, c10::SymInt, std::array<bool, 5>)>
    rsample_backward;

inline constexpr Op<"fastelbo::gaussian_kl", Tensor(In, In, Maybe, Maybe, Maybe)> gaussian_kl;

using KlGrads = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // of mu, logvar, prior_mu, prior_logvar
inline constexpr Op<"fastelbo::_gaussian_kl_backward", KlGrads(In, In, In, Maybe, Maybe, Maybe, std::array<bool, 4>)>
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

inline constexpr Op<"fastelbo::log_prob", Tensor(at::TensorList, In, Maybe, std::string_view)> log_prob;

using LogProbGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // of the parameters, then of x
inline constexpr Op<"fastelbo::_log_prob_backward",
                    LogProbGrads(In, at::TensorList, In, Maybe, std::string_view, std::array<bool, 5>)>
    log_prob_backward;

inline constexpr Op<"fastelbo::log_prob_elements", Tensor(at::TensorList, In, Maybe, std::string_view)>
    log_prob_elements;
inline constexpr Op<"fastelbo::_log_prob_elements_backward",
                    LogProbGrads(In, at::TensorList, In, Maybe, std::string_view, std::array<bool, 5>)>
    log_prob_elements_backward;

// ---------------------------------------------------------------------------------------------------------------------
// objective

inline constexpr Op<"fastelbo::log_mean_exp", Tensor(In, int64_t)> log_mean_exp;
inline constexpr Op<"fastelbo::_log_mean_exp_backward", Tensor(In, In, int64_t)> log_mean_exp_backward;

// loss, log_likelihood, kl; gradients of the parameters, mu, logvar, prior_mu, prior_logvar
using ElboLoss = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
inline constexpr Op<"fastelbo::elbo_loss", ElboLoss(at::TensorList, In, In, In, Maybe, Maybe, Maybe, Maybe, Maybe,
                                                    std::string_view, std::string_view, int64_t)>
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
                    MultiSampleLoss(at::TensorList, In, In, Maybe, Maybe, Maybe, Maybe, int64_t, at::ArrayRef<double>,
                                    std::string_view, std::string_view, int64_t)>
    multi_sample_loss;

struct MultiSampleInputs {
  at::TensorList parameters;
  Tensor x, log_ratio;
  OptionalTensor gates, mask, elbo_weight, alpha;
  int64_t groups;
  at::ArrayRef<double> coefficients;
  std::string_view likelihood, reduction;
  int64_t needs;
};

using Weights = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // bound [B], a [K, B], gates [2, K, B], slopes [2, B]
inline constexpr Op<"fastelbo::_multi_sample_weights", Weights(In, Maybe, Maybe, int64_t, at::ArrayRef<double>, bool)>
    multi_sample_weights;

inline constexpr Op<"fastelbo::minus_bound", Tensor(In, Maybe, Maybe, Maybe, int64_t, at::ArrayRef<double>)>
    minus_bound;

inline constexpr Op<"fastelbo::_scale_", void(In, In)> scale_;

// ---------------------------------------------------------------------------------------------------------------------
// mixture

inline constexpr Op<"fastelbo::mixture_log_prob", Tensor(In, In, In, Maybe, bool)> mixture_log_prob;

using MixtureGrads = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // of z, mu, logvar, log_weights
inline constexpr Op<"fastelbo::_mixture_log_prob_backward",
                    MixtureGrads(In, In, In, In, Maybe, bool, In, std::array<bool, 4>)>
    mixture_log_prob_backward;

// ---------------------------------------------------------------------------------------------------------------------
// ppca

inline constexpr Op<"fastelbo::ppca_log_prob", Tensor(In, In, In, In)> ppca_log_prob;

// log_prob, coords, rest, basis, triangle, whiten
using PpcaForward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
inline constexpr Op<"fastelbo::_ppca_log_prob_forward", PpcaForward(In, In, In, In)> ppca_log_prob_forward;

using PpcaGrads = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // of x, W, b, log_sigma2
inline constexpr Op<"fastelbo::_ppca_log_prob_backward",
                    PpcaGrads(In, In, In, In, In, In, In, In, In, In, std::array<bool, 4>)>
    ppca_log_prob_backward;

using PpcaFactors = std::tuple<Tensor, Tensor, Tensor>;  // basis, triangle, whiten
inline constexpr Op<"fastelbo::_ppca_factor", PpcaFactors(In, In)> ppca_factor;

using PpcaInverses = std::tuple<Tensor, Tensor>;  // inverses, log_det
inline constexpr Op<"fastelbo::_ppca_invert", PpcaInverses(In)> ppca_invert;

using PpcaCoordinates = std::tuple<Tensor, Tensor>;  // coords, square
inline constexpr Op<"fastelbo::_ppca_project", PpcaCoordinates(In, In, In)> ppca_project;

inline constexpr Op<"fastelbo::_ppca_rest", Tensor(In, In, In, In, In)> ppca_rest;

using PpcaSums = std::tuple<Tensor, Tensor, Tensor>;  // residual, cross, sum
inline constexpr Op<"fastelbo::_ppca_residual", PpcaSums(In, In, In, In, In, In, std::array<bool, 3>)> ppca_residual;

// ---------------------------------------------------------------------------------------------------------------------
// sparse

inline constexpr Op<"fastelbo::_csr_matmul", Tensor(In, In, In, In)> csr_matmul;
inline constexpr Op<"fastelbo::_csr_matmul_t", Tensor(In, In, In, In, c10::SymInt)> csr_matmul_t;

}  // namespace fastelbo::ops
