#include "check.h"
#include "cpu/kernels/std.h"
#if defined(__x86_64__)
FASTELBO_TARGET("avx2,fma,f16c")
#define FASTELBO_ISA avx2
#define FASTELBO_X86_LEVEL 3
#define FASTELBO_NAME "avx2"
#define FASTELBO_RUN math_avx2
#include "math_cases.h"
FASTELBO_END_TARGET
#endif
