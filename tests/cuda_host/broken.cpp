// Kernels that are wrong on purpose: the host's CUDA has to notice. `broken NAME` runs one; test_cuda_host.py expects
// it to abort, with AddressSanitizer where memory is concerned.
#include <memory>
#include <string>

#include <cuda_runtime.h>

namespace {

void skips_a_barrier(float*) {
  if (threadIdx.x != 77) __syncthreads();
}
void leaves_while_others_wait(float*) {
  if (threadIdx.x >= 32) return;
  __syncthreads();
}
void skips_a_shuffle(float* out) {
  float sum = 1;
  if (threadIdx.x != 5) sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  out[threadIdx.x] = sum;
}
void writes_past_shared_memory(float* out) {
  __shared__ float buffer[256];
  buffer[threadIdx.x + 1] = 1;
  out[threadIdx.x] = buffer[threadIdx.x];
}
void reads_past_global_memory(float* out) { out[threadIdx.x] += out[threadIdx.x + 1]; }
void is_right(float* out) {
  __shared__ float buffer[256];
  buffer[threadIdx.x] = float(threadIdx.x);
  __syncthreads();
  float sum = buffer[255 - threadIdx.x];
  for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
  out[threadIdx.x] = sum;
}

struct {
  const char* name;
  void (*kernel)(float*);
} const kKernels[] = {
    {"skips_a_barrier", skips_a_barrier},
    {"leaves_while_others_wait", leaves_while_others_wait},
    {"skips_a_shuffle", skips_a_shuffle},
    {"writes_past_shared_memory", writes_past_shared_memory},
    {"reads_past_global_memory", reads_past_global_memory},
    {"is_right", is_right},
};

}  // namespace

int main(int argc, char** argv) {
  const auto out = std::make_unique<float[]>(256);
  for (const auto& k : kKernels) {
    if (argc != 2 || std::string(argv[1]) != k.name) continue;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(2), config.blockDim = dim3(256);
    if (cudaLaunchKernelEx(&config, k.kernel, out.get()) != cudaSuccess) return 3;
    return out[0] == 32 * 224 + 496 ? 0 : 4;  // lanes 0 .. 31 hold 255 .. 224
  }
  return 2;
}
