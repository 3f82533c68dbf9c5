// What the objectives use of the latent side.
#pragma once

#include "cpu/run.h"

namespace fastelbo::cpu {

// KL of every row [B] into `kl` and, with free bits, into `floored_kl`, either of which may be null; its gradients.
void run_kl(KlParams& p, bool is_double, double* kl, double* floored_kl);

}  // namespace fastelbo::cpu
