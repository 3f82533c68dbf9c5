// The CPU kernels by instruction set, and which set is in use.
#pragma once

#include "likelihoods/info.h"
#include "params.h"

namespace fastelbo {

template <class Params>
using Kernel = void (*)(const Params&, int64_t begin, int64_t end);

inline constexpr int kMaxLikelihoods = 32;

struct KernelTable {
  // [float or double]
  Kernel<KlParams> kl[2];
  Kernel<KlDimsParams> kl_dims[2];
  Kernel<SampleParams> sample[2];
  Kernel<SampleBackwardParams> sample_backward[2];
  Kernel<LogMeanExpParams> log_mean_exp[2], log_mean_exp_backward[2];
  Kernel<MultiSampleParams> weigh[2];
  Kernel<PpcaFactorParams> ppca_factor;
  Kernel<PpcaInvertParams> ppca_invert;
  Kernel<PpcaProjectParams> ppca_project;
  Kernel<PpcaRestParams> ppca_rest;
  Kernel<PpcaSumsParams> ppca_moments;
  Kernel<PpcaSumsParams> ppca_residual[2];
  Kernel<CsrParams> csr_matmul[2], csr_matmul_t[2];
  Kernel<MixtureComponentsParams> mixture_components[2];
  Kernel<MixtureParams> mixture[2];
  Kernel<MixtureBackwardParams> mixture_backward[2];
  Kernel<MixtureSumsParams> mixture_sums[2];
  // [likelihood][parameters given - 1][float or double]
  Kernel<LogProbParams> log_prob[kMaxLikelihoods][kMaxParameters][2];
  Kernel<MultiSampleParams> multi_sample[kMaxLikelihoods][kMaxParameters][2];
};

// The table of the instruction set in use: the best that the CPU has, or FASTELBO_CPU_CAPABILITY. Chosen once.
const KernelTable& kernels();

struct IsaInfo {
  const char* name;
  bool supported;  // by this CPU
  const KernelTable& (*table)();
};

int isa_count();
const IsaInfo& isa_info(int index);
const IsaInfo& isa_in_use();

}  // namespace fastelbo
