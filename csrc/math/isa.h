// What lets one source serve every instruction set and both compilers.
//
// Everything in math/, likelihoods/ and kernels/ that is compiled more than once lives in namespace
// fastelbo::FASTELBO_ISA. The file that includes it names the instruction set; without a name it is "baseline".
#pragma once

#ifndef FASTELBO_ISA
#define FASTELBO_ISA baseline
#endif

// The x86-64 level of that instruction set, 0 on other machines. Said by the isa_*.cpp files: in C++, a target pragma
// does not define __AVX2__ and its like.
#ifndef FASTELBO_X86_LEVEL
#if defined(__x86_64__) && !defined(__CUDACC__)
#define FASTELBO_X86_LEVEL 2
#else
#define FASTELBO_X86_LEVEL 0
#endif
#endif

// What that level has. Code asks for these properties: intrinsics exist only where they hold.
#define FASTELBO_VECTOR_BYTES \
  (FASTELBO_X86_LEVEL >= 4 ? 64 : FASTELBO_X86_LEVEL >= 3 ? 32 : 16)  // of a vector register; 16 on other machines
#define FASTELBO_HAS_SSE (FASTELBO_X86_LEVEL >= 2)
#define FASTELBO_HAS_F16C (FASTELBO_X86_LEVEL >= 3)  // converts eight half-precision numbers at a time
#if defined(__aarch64__) && !defined(__CUDACC__)
#define FASTELBO_HAS_NEON 1  // converts four; bfloat16 is shifted, since only ARMv8.6 converts it
#else
#define FASTELBO_HAS_NEON 0
#endif

namespace fastelbo::FASTELBO_ISA {
inline constexpr int kVectorBytes = FASTELBO_VECTOR_BYTES;
}

#if defined(__CUDACC__)
#define FASTELBO_HD __host__ __device__ __forceinline__
#else
#define FASTELBO_HD inline __attribute__((always_inline))
#endif
