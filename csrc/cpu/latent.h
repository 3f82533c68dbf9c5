// What the objectives use of the latent side.
#pragma once

#include "cpu/run.h"

namespace fastelbo::cpu {

// [D] batch means of every dimension's KL, for free bits.
void kl_dim_means(const KlParams& p, bool is_double, Scratch& means);

void run_kl(const KlParams& p, bool is_double);

}  // namespace fastelbo::cpu
