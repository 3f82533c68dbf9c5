// What kernel sources share, to be included before any target pragma: standard headers and the parameter structs.
#pragma once

#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/kernels/kernels.h"

// How either compiler is told what g++ and clang name differently. What is between FASTELBO_TARGET("avx2,fma") and
// FASTELBO_END_TARGET is compiled for these instructions.
#define FASTELBO_PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define FASTELBO_UNROLL(n) FASTELBO_PRAGMA(clang loop unroll(full))
#define FASTELBO_IVDEP FASTELBO_PRAGMA(clang loop vectorize(assume_safety))
#define FASTELBO_INLINED __attribute__((always_inline))  // of a lambda that clang would call
#define FASTELBO_TARGET(names) \
  FASTELBO_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define FASTELBO_END_TARGET FASTELBO_PRAGMA(clang attribute pop)
#else
#define FASTELBO_UNROLL(n) FASTELBO_PRAGMA(GCC unroll n)
#define FASTELBO_IVDEP FASTELBO_PRAGMA(GCC ivdep)
#define FASTELBO_INLINED
// with AVX-512, g++ would choose vectors of half the width
#define FASTELBO_TARGET(names) FASTELBO_PRAGMA(GCC target(names, "prefer-vector-width=512"))
#define FASTELBO_END_TARGET
#endif
