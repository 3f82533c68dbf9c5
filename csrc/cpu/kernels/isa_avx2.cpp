// The kernels for AVX2, FMA and F16C (x86-64-v3: Haswell, Zen and later).
#include "cpu/kernels/std.h"
#if defined(__x86_64__)
FASTELBO_TARGET("avx2,fma,f16c")
#define FASTELBO_ISA avx2
#define FASTELBO_X86_LEVEL 3
#include "cpu/kernels/table.h"
FASTELBO_END_TARGET
#endif
