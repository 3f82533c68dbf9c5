// The CUDA execution model on a host, as far as csrc/cuda/kernels/*.cu use it: the same sources are compiled by g++ and
// run, under sanitizers too. Test only; found in place of CUDA's own header by the include path.
//
// The threads of a block are fibers, run one after another, warp by warp; blocks run in order. A fiber runs up to its
// next shuffle or barrier. All 32 lanes of a warp have to meet at the same shuffle and all warps of a block at the same
// barrier: threads that skip one, or leave early while others wait, abort the program with a message. __shared__ is
// static memory, so that AddressSanitizer sees what is out of range.
#pragma once

#if !defined(__x86_64__)
#error "the switch between fibers is written for x86-64"
#endif

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) ushort4 {
  uint16_t x, y, z, w;
};
struct alignas(4) uchar4 {
  uint8_t x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline ushort4 make_ushort4(uint16_t x, uint16_t y, uint16_t z, uint16_t w) { return {x, y, z, w}; }

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace cuda_host {

// Saves the callee-saved registers and the stack pointer, takes those of the other side.
extern "C" void fastelbo_switch_fiber(void** save, void* load);
asm(R"(
.pushsection .text
.weak fastelbo_switch_fiber
.type fastelbo_switch_fiber, @function
fastelbo_switch_fiber:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size fastelbo_switch_fiber, .-fastelbo_switch_fiber
.popsection
)");

enum class State { running, at_shuffle, at_barrier, done };

struct Fiber {
  void* stack_pointer = nullptr;
  State state = State::done;
};

inline constexpr int kMaxThreads = 1024, kWarp = 32;
inline constexpr size_t kStack = 64 << 10;

struct Block {
  std::vector<char> stacks = std::vector<char>(kStack * kMaxThreads);  // allocated once: that would dominate
  Fiber fibers[kMaxThreads];
  void* scheduler = nullptr;  // its stack pointer
  int current = 0;
  const std::function<void()>* kernel = nullptr;
  alignas(16) char slots[2][kMaxThreads][16];  // what shuffles exchange, in turns
  int turn[kMaxThreads] = {};
  void* fake_stack[kMaxThreads + 1] = {};
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
};
inline Block& block() {
  static Block instance;
  return instance;
}

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA on the host: %s (block %u)\n", what, blockIdx.x);
  std::abort();
}

inline void to_scheduler(State state) {
  Block& b = block();
  const int self = b.current;
  b.fibers[self].state = state;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(state == State::done ? nullptr : &b.fake_stack[self], b.scheduler_bottom,
                                 b.scheduler_size);
#endif
  fastelbo_switch_fiber(&b.fibers[self].stack_pointer, b.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(b.fake_stack[self], &b.scheduler_bottom, &b.scheduler_size);
#endif
}

inline void fiber_main() {
  Block& b = block();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &b.scheduler_bottom, &b.scheduler_size);
#endif
  (*b.kernel)();
  to_scheduler(State::done);
}

inline void resume(int thread) {
  Block& b = block();
  b.current = thread;
  threadIdx = dim3(unsigned(thread));
  b.fibers[thread].state = State::running;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&b.fake_stack[kMaxThreads], b.stacks.data() + kStack * thread, kStack);
#endif
  fastelbo_switch_fiber(&b.scheduler, b.fibers[thread].stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(b.fake_stack[kMaxThreads], nullptr, nullptr);
#endif
}

// Runs a warp until it waits at a barrier, or is done.
inline State run_warp(int first) {
  Block& b = block();
  for (;;) {
    for (int t = first; t < first + kWarp; ++t) {
      if (b.fibers[t].state != State::done) resume(t);
    }
    const State state = b.fibers[first].state;
    for (int t = first; t < first + kWarp; ++t) {
      if (b.fibers[t].state != state) fail("the threads of a warp wait at different shuffles or barriers");
    }
    if (state != State::at_shuffle) return state;
  }
}

inline void run_block(int threads, const std::function<void()>& kernel) {
  Block& b = block();
  b.kernel = &kernel;
  for (int t = 0; t < threads; ++t) {
    void** top = reinterpret_cast<void**>(b.stacks.data() + kStack * (t + 1)) - 2;
    *top = reinterpret_cast<void*>(&fiber_main);
    b.fibers[t] = {top - 6, State::running};
    b.turn[t] = 0;
  }
  for (;;) {
    const State state = run_warp(0);
    for (int first = kWarp; first < threads; first += kWarp) {
      if (run_warp(first) != state) fail("the warps of a block wait at different barriers");
    }
    if (state == State::done) return;
  }
}

template <class T>
T shuffle(T value, int from) {
  static_assert(sizeof(T) <= 16);
  Block& b = block();
  const int self = b.current, turn = b.turn[self];
  std::memcpy(b.slots[turn][self], &value, sizeof(T));
  b.turn[self] = 1 - turn;
  to_scheduler(State::at_shuffle);
  std::memcpy(&value, b.slots[turn][from], sizeof(T));
  return value;
}

}  // namespace cuda_host

inline void __syncthreads() { cuda_host::to_scheduler(cuda_host::State::at_barrier); }
inline void __threadfence() {}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  if (mask != 0xffffffffu) cuda_host::fail("shuffles of part of a warp are not supported");
  return cuda_host::shuffle(value, cuda_host::block().current ^ lanes);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int lanes) {
  if (mask != 0xffffffffu) cuda_host::fail("shuffles of part of a warp are not supported");
  const int self = cuda_host::block().current, from = self + lanes;
  return cuda_host::shuffle(value, from / cuda_host::kWarp == self / cuda_host::kWarp ? from : self);
}

inline unsigned atomicAdd(unsigned* p, unsigned value) {
  const unsigned before = *p;
  *p += value;
  return before;
}

template <class... P>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), P... arguments) {
  const unsigned threads = config->blockDim.x;
  if (config->gridDim.x == 0 || threads == 0 || threads > cuda_host::kMaxThreads || threads % cuda_host::kWarp) {
    return cudaErrorInvalidConfiguration;
  }
  gridDim = config->gridDim, blockDim = config->blockDim;
  const std::function<void()> run = [&] { kernel(arguments...); };
  for (unsigned i = 0; i < gridDim.x; ++i) {
    blockIdx = dim3(i);
    cuda_host::run_block(int(threads), run);
  }
  return cudaSuccess;
}
