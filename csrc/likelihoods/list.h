// Every likelihood. To add one: a header beside this file, its include, and its name in the list.
#pragma once

#include "likelihoods/bernoulli.h"
#include "likelihoods/bernoulli_probs.h"
#include "likelihoods/beta_binomial.h"
#include "likelihoods/gamma_poisson.h"
#include "likelihoods/gaussian.h"
#include "likelihoods/laplace.h"
#include "likelihoods/nb.h"
#include "likelihoods/nb_logits.h"
#include "likelihoods/nb_mean.h"
#include "likelihoods/nb_mixture.h"
#include "likelihoods/poisson.h"
#include "likelihoods/student_t.h"
#include "likelihoods/zinb.h"

namespace fastelbo::FASTELBO_ISA {

template <class... L>
struct TypeList {
  static constexpr int size = sizeof...(L);
};

using Likelihoods = TypeList<Bernoulli, BernoulliProbs, Gaussian, Laplace, StudentT, Poisson, Nb, Zinb, NbMean,
                             NbLogits, GammaPoisson, ZinbMean, NbMixture, BetaBinomial>;

// Names of likelihoods with a number added to every mean and to theta, as scvi-tools computes them.
struct Shifted {
  const char *name, *of;
  double added;
};
inline constexpr Shifted kShifted[] = {
    {"scvi_nb", "nb_mean", 1e-8}, {"scvi_zinb", "zinb_mean", 1e-8}, {"scvi_nb_mixture", "nb_mixture", 1e-8}};

}  // namespace fastelbo::FASTELBO_ISA
