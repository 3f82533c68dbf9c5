// The kernels of one instruction set: included once by every isa_*.cpp, after its target pragma.
//
// The standard headers come before that pragma (isa_*.cpp includes kernels/std.h first): what they define stays
// baseline code, since the linker keeps one copy of an inline function for the whole library.
#pragma once

#include "kernels/latent.h"
#include "kernels/likelihood.h"
#include "kernels/objective.h"
#include "kernels/ppca.h"

namespace fastelbo::FASTELBO_ISA {

template <class L>
void add_likelihood(KernelTable& table, int index) {
  table.log_prob[index][0][0] = log_prob_kernel<L, false, float>;
  table.log_prob[index][0][1] = log_prob_kernel<L, false, double>;
  if constexpr (L::takes_scale) {
    table.log_prob[index][1][0] = log_prob_kernel<L, true, float>;
    table.log_prob[index][1][1] = log_prob_kernel<L, true, double>;
  }
}

template <class... L>
KernelTable make_table(TypeList<L...>) {
  static_assert(sizeof...(L) <= kMaxLikelihoods);
  KernelTable table{
      .kl = {kl_kernel<float>, kl_kernel<double>},
      .kl_dims = {kl_dims_kernel<float>, kl_dims_kernel<double>},
      .sample = {sample_kernel<float>, sample_kernel<double>},
      .sample_backward = {sample_backward_kernel<float>, sample_backward_kernel<double>},
      .log_mean_exp = {log_mean_exp_kernel<float>, log_mean_exp_kernel<double>},
      .log_mean_exp_backward = {log_mean_exp_backward_kernel<float>, log_mean_exp_backward_kernel<double>},
      .scale_row = {scale_row_kernel<float>, scale_row_kernel<double>},
      .ppca_factor = ppca_factor_kernel,
      .ppca_project = ppca_project_kernel,
      .ppca_rest = ppca_rest_kernel,
      .ppca_moments = ppca_moments_kernel,
      .ppca_residual = {ppca_residual_kernel<float>, ppca_residual_kernel<double>},
      .log_prob = {},
  };
  int index = 0;
  (add_likelihood<L>(table, index++), ...);
  return table;
}

const KernelTable& table() {
  static const KernelTable instance = make_table(Likelihoods{});
  return instance;
}

}  // namespace fastelbo::FASTELBO_ISA
