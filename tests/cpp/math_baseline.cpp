#include "check.h"
#include "cpu/kernels/std.h"
#define FASTELBO_ISA baseline
#define FASTELBO_NAME "baseline"
#define FASTELBO_RUN math_baseline
#include "math_cases.h"
