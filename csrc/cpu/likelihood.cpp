// The likelihood ops on the CPU.
#include "cpu/likelihood.h"

#include <torch/library.h>

namespace fastelbo {
namespace cpu {
namespace {

// The sums of the chunks, in order: [chunks, D] to the gradient [D], or [chunks, segments] to the one number.
template <class T>
void add_chunks(const prepare::SharedOutput& shared) {
  const int64_t chunks = shared.sums.size(0), size = shared.sums.size(1), n = shared.total.numel();
  const T* sums = shared.sums.const_data_ptr<T>();
  T* to = shared.total.mutable_data_ptr<T>();
  Scratch total(n, 0.0);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t i = 0; i < size; ++i) total[n == 1 ? 0 : i] += double(sums[chunk * size + i]);
  }
  for (int64_t i = 0; i < n; ++i) to[i] = T(total[i]);
}

// Sums of rows from the sums of their segments, in order.
void add_segments(const double* parts, int64_t per_row, int64_t rows, double* out) {
  for (int64_t r = 0; r < rows; ++r) {
    double sum = 0;
    for (int64_t s = 0; s < per_row; ++s) sum += parts[r * per_row + s];
    out[r] = sum;
  }
}

}  // namespace

void run_rows(prepare::Likelihood& rows, double* log_p) {
  LogProbParams& p = rows.params;
  const int64_t per_row = segments(p.D);
  const bool in_parts = log_p && per_row > 1;
  Scratch parts;
  if (in_parts) parts.resize_for_overwrite(p.rows() * per_row);
  p.log_p = in_parts ? parts.data() : log_p;
  run(kernels().log_prob[rows.info.kernel][p.count - 1][rows.is_double], p, p.chunks() * per_row,
      std::min(p.D, kSegment) * p.chunk);
  if (in_parts) add_segments(parts.data(), per_row, p.rows(), log_p);
  for (const prepare::SharedOutput& shared : rows.shared) {
    rows.is_double ? add_chunks<double>(shared) : add_chunks<float>(shared);
  }
}

namespace {

void log_prob(prepare::LogProb& op) {
  Scratch log_p(op.rows.params.rows());
  run_rows(op.rows, log_p.data());
  write(log_p.data(), op.log_prob);
}

void log_prob_elements(prepare::LogProbElements& op) { run_rows(op.rows, nullptr); }

void log_prob_backward(prepare::LogProbBackward& op) {
  run_rows(op.rows, nullptr);
  if (!op.grad_x_samples.defined()) return;
  op.rows.views.finish();
  at::Tensor sum = op.grad_x_samples[0];
  for (int64_t k = 1; k < op.grad_x_samples.size(0); ++k) sum.add_(op.grad_x_samples[k]);  // in order
  op.grad_x.copy_(sum);
}

}  // namespace
}  // namespace cpu

TORCH_LIBRARY_FRAGMENT(fastelbo, m) {
  on_cpu_and_meta<ops::log_prob, prepare::log_prob, cpu::log_prob>(m, "log_prob");
  on_cpu_and_meta<ops::log_prob_backward, prepare::log_prob_backward, cpu::log_prob_backward>(m, "_log_prob_backward");
  on_cpu_and_meta<ops::log_prob_elements, prepare::log_prob_elements, cpu::log_prob_elements>(m, "log_prob_elements");
  on_cpu_and_meta<ops::log_prob_elements_backward, prepare::log_prob_elements_backward, cpu::log_prob_backward>(
      m, "_log_prob_elements_backward");
}

}  // namespace fastelbo
