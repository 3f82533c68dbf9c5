// What the objectives use of the likelihoods.
#pragma once

#include "cuda/device.h"
#include "prepare/likelihood.h"

namespace fastelbo::cuda {

// Where the sums of rows go: into `rows` [K?, B] at once, or by way of those of their segments where rows are long.
class RowSums {
  at::Tensor parts_, rows_;

 public:
  RowSums(RowsParams& p, const at::Tensor& rows) : rows_(rows) {
    if (segments(p.fit.D) == 1) {
      p.log_p = rows.mutable_data_ptr();
    } else {
      parts_ = doubles(rows, {p.fit.rows() * segments(p.fit.D)});
      p.fit.log_p = parts_.mutable_data_ptr<double>();
    }
  }
  void finish(const RowsParams& p, bool is_double, cudaStream_t stream) const {
    if (p.log_p) return;
    launch_add_segments(p.fit.log_p, segments(p.fit.D), p.fit.rows(), rows_.mutable_data_ptr(), is_double, stream);
  }
};

// The gradients of parameters that rows share, from the row factors in rows.params.
inline void run_shared_grads(const prepare::Likelihood& rows, cudaStream_t stream) {
  if (rows.shared.empty()) return;
  launch_shared_grads(rows.params, rows.info.kernel, rows.is_double, stream);
  for (const prepare::SharedOutput& shared : rows.shared) {
    shared.total.as_strided({shared.total.numel()}, {1})
        .copy_(shared.total.dim() == 0 ? shared.sums.sum().reshape({1}) : shared.sums.sum(0));
  }
}

}  // namespace fastelbo::cuda
