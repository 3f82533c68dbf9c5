// What the objectives use of the likelihoods.
#pragma once

#include "cpu/run.h"

namespace fastelbo::cpu {

inline Kernel<LogProbParams> log_prob_kernel(int likelihood, const OptionalTensor& scale, bool is_double) {
  return kernels().log_prob[likelihood][scale.has_value()][is_double];
}

// Sums of rows from the sums of their segments, in order.
inline void add_segments(const double* parts, int64_t per_row, int64_t rows, double* out) {
  for (int64_t r = 0; r < rows; ++r) {
    double sum = 0;
    for (int64_t s = 0; s < per_row; ++s) sum += parts[r * per_row + s];
    out[r] = sum;
  }
}

// Every row, the sums into out [K * B] where it is given.
inline void run_log_prob(Kernel<LogProbParams> kernel, LogProbParams& p, double* out) {
  const int64_t per_row = segments(p.D), rows = p.K * p.B;
  Scratch parts;
  if (out && per_row > 1) parts.resize_for_overwrite(rows * per_row);
  p.out = out && per_row > 1 ? parts.data() : out;
  run(kernel, p, rows * per_row, std::min(p.D, kSegment));
  if (out && per_row > 1) add_segments(parts.data(), per_row, rows, out);
}

}  // namespace fastelbo::cpu
