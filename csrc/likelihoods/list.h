// Every likelihood. To add one: a header beside this file, its include, and its name in the list.
#pragma once

#include "likelihoods/bernoulli.h"
#include "likelihoods/bernoulli_probs.h"
#include "likelihoods/gaussian.h"
#include "likelihoods/laplace.h"
#include "likelihoods/nb.h"
#include "likelihoods/poisson.h"
#include "likelihoods/student_t.h"
#include "likelihoods/zinb.h"

namespace fastelbo::FASTELBO_ISA {

template <class... L>
struct TypeList {
  static constexpr int size = sizeof...(L);
};

using Likelihoods = TypeList<Bernoulli, BernoulliProbs, Gaussian, Laplace, StudentT, Poisson, Nb, Zinb>;

}  // namespace fastelbo::FASTELBO_ISA
