// What the objectives use of the latent side.
#pragma once

#include "cpu/views.h"

namespace fastelbo::cpu {

template <class Params>
void set_latent(Params& p, const at::Tensor& mu, const at::Tensor& logvar, const OptionalTensor& prior_mu,
                const OptionalTensor& prior_logvar) {
  const int64_t dims = mu.dim() - 1;
  p.B = mu.size(0);
  p.D = p.B ? mu.numel() / p.B : 0;
  p.mu = view_of(mu, dims);
  p.logvar = view_of(logvar, dims);
  p.prior_mu = view_of(prior_mu, dims);
  p.prior_logvar = view_of(prior_logvar, dims);
}

// [D] batch means of every dimension's KL, for free bits.
void kl_dim_means(const KlParams& p, bool is_double, Scratch& means);

void run_kl(const KlParams& p, bool is_double);

}  // namespace fastelbo::cpu
