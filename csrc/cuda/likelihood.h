// What the objectives use of the likelihoods.
#pragma once

#include "cuda/device.h"

namespace fastelbo::cuda {

// Where the sums of rows go: into `rows` [K?, B] at once, or by way of those of their segments where rows are long.
class RowSums {
  at::Tensor parts_, rows_;

 public:
  RowSums(RowsParams& p, const at::Tensor& like, const at::Tensor& rows) : rows_(rows) {
    if (segments(p.fit.D) == 1) {
      p.log_p = rows.mutable_data_ptr();
    } else {
      parts_ = doubles(like, {p.fit.K * p.fit.B * segments(p.fit.D)});
      p.fit.out = parts_.mutable_data_ptr<double>();
    }
  }
  void finish(const RowsParams& p, bool wide, cudaStream_t stream) const {
    if (p.log_p) return;
    launch_add_segments(p.fit.out, segments(p.fit.D), p.fit.K * p.fit.B, rows_.mutable_data_ptr(), wide, stream);
  }
};

}  // namespace fastelbo::cuda
