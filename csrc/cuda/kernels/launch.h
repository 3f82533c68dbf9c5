// The one way in which kernels are started. cudaLaunchKernelEx in place of <<<>>> keeps the sources plain C++.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/kernels/kernels.h"

namespace fastelbo::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Blocks for that many work items, of which a block takes `per_block` at a time.
inline int64_t blocks_for(int64_t items, int64_t per_block) {
  return std::min((items + per_block - 1) / per_block, kMaxBlocks);
}

template <class... P, class... A>
void launch(void (*kernel)(P...), int64_t blocks, cudaStream_t stream, A... arguments) {
  if (blocks == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, P(arguments)...), "fastelbo could not start a CUDA kernel");
}

}  // namespace fastelbo::cuda
