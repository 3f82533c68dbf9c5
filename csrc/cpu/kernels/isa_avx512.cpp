// The kernels for AVX-512 F, BW, DQ and VL (x86-64-v4: Skylake-X, Ice Lake, Zen 4 and later).
#include "cpu/kernels/std.h"
#if defined(__x86_64__)
FASTELBO_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#define FASTELBO_ISA avx512
#define FASTELBO_X86_LEVEL 4
#include "cpu/kernels/table.h"
FASTELBO_END_TARGET
#endif
