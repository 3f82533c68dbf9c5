// What the objectives use of the likelihoods.
#pragma once

#include "cpu/run.h"
#include "prepare/likelihood.h"

namespace fastelbo::cpu {

// Every row and its gradients; the sums of log p into log_p [K * B] unless that is null.
void run_rows(prepare::Likelihood& rows, double* log_p);

}  // namespace fastelbo::cpu
