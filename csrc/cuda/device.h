// What the CUDA bindings need of the device: its guard, the current stream, scratch memory.
#pragma once

#include "aten.h"
#include "cuda/kernels/kernels.h"
#include "prepare/views.h"

#if defined(FASTELBO_HOST_CUDA)  // the kernels on the host, for tests: see tests/cuda_host
#define FASTELBO_CUDA_KEY CPU
#else
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>
#define FASTELBO_CUDA_KEY CUDA
#endif

namespace fastelbo::cuda {

// Makes the tensor's device the current one, as long as it lives.
class OnDeviceOf {
#if defined(FASTELBO_HOST_CUDA)
 public:
  explicit OnDeviceOf(const at::Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
#else
  c10::cuda::CUDAGuard guard_;

 public:
  explicit OnDeviceOf(const at::Tensor& t) : guard_(t.device()) {}
  cudaStream_t stream() const { return at::cuda::getCurrentCUDAStream(); }
#endif
};

// Of the current device. The host has few, so that small tests meet both sides of a choice.
inline int64_t multiprocessors() {
#if defined(FASTELBO_HOST_CUDA)
  return 2;
#else
  return at::cuda::getCurrentDeviceProperties()->multiProcessorCount;
#endif
}

inline at::Tensor doubles(const at::Tensor& like, at::IntArrayRef shape) {
  return at::empty(shape, like.options().dtype(at::kDouble));
}

// Where the blocks leave their sums for a total. The ticket costs a 4-byte memset beside the kernel: one that is kept
// between calls would not survive two streams, or two captured graphs, at the same time.
struct TotalMemory {
  at::Tensor sums, ticket;

  Total total(const at::Tensor& like, const at::Tensor& out) {
    sums = doubles(like, {kMaxBlocks});
    ticket = at::zeros({1}, like.options().dtype(at::kInt));
    return {out.mutable_data_ptr(), sums.mutable_data_ptr<double>(),
            reinterpret_cast<unsigned*>(ticket.mutable_data_ptr<int>())};
  }
};

}  // namespace fastelbo::cuda
