// The kernels for every CPU of the architecture (SSE2 on x86-64, NEON on AArch64).
#define FASTELBO_ISA baseline
#include "cpu/kernels/std.h"
#include "cpu/kernels/table.h"
