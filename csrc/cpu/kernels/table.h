// The kernels of one instruction set: included once by every isa_*.cpp, after its target pragma.
//
// The standard headers come before that pragma (isa_*.cpp includes cpu/kernels/std.h first): what they define stays
// baseline code, since the linker keeps one copy of an inline function for the whole library.
#pragma once

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/latent.h"
#include "cpu/kernels/likelihood.h"
#include "cpu/kernels/mixture.h"
#include "cpu/kernels/objective.h"
#include "cpu/kernels/ppca.h"
#include "cpu/kernels/sparse.h"

namespace fastelbo::FASTELBO_ISA {

template <class L, int kCount>
void add_likelihood(KernelTable& table, int index) {
  table.log_prob[index][kCount - 1][0] = log_prob_kernel<L, kCount, float>;
  table.log_prob[index][kCount - 1][1] = log_prob_kernel<L, kCount, double>;
  table.multi_sample[index][kCount - 1][0] = multi_sample_kernel<L, kCount, float>;
  table.multi_sample[index][kCount - 1][1] = multi_sample_kernel<L, kCount, double>;
  if constexpr (kCount < kParameters<L>) add_likelihood<L, kCount + 1>(table, index);
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
      .weigh = {weigh_kernel<float>, weigh_kernel<double>},
      .ppca_factor = ppca_factor_kernel,
      .ppca_invert = ppca_invert_kernel,
      .ppca_project = ppca_project_kernel,
      .ppca_rest = ppca_rest_kernel,
      .ppca_moments = ppca_moments_kernel,
      .ppca_residual = {ppca_residual_kernel<float>, ppca_residual_kernel<double>},
      .csr_matmul = {csr_matmul_kernel<float>, csr_matmul_kernel<double>},
      .csr_matmul_t = {csr_matmul_t_kernel<float>, csr_matmul_t_kernel<double>},
      .mixture_components = {mixture_components_kernel<float>, mixture_components_kernel<double>},
      .mixture = {mixture_kernel<float>, mixture_kernel<double>},
      .mixture_backward = {mixture_backward_kernel<float>, mixture_backward_kernel<double>},
      .mixture_sums = {mixture_sums_kernel<float>, mixture_sums_kernel<double>},
      .log_prob = {},
      .multi_sample = {},
  };
  int index = 0;
  (add_likelihood<L, L::kFewest>(table, index++), ...);
  return table;
}

const KernelTable& table() {
  static const KernelTable instance = make_table(Likelihoods{});
  return instance;
}

}  // namespace fastelbo::FASTELBO_ISA
