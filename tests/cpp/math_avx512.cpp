#include "check.h"
#include "cpu/kernels/std.h"
#if defined(__x86_64__)
FASTELBO_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#define FASTELBO_ISA avx512
#define FASTELBO_X86_LEVEL 4
#define FASTELBO_NAME "avx512"
#define FASTELBO_RUN math_avx512
#include "math_cases.h"
FASTELBO_END_TARGET
#endif
