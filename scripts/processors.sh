#!/usr/bin/env bash
# Tests as other processors, and other numbers of threads, compute them: torch's products and loops by the instruction
# sets that this CPU has, and fastelbo's own.
#
#   scripts/processors.sh                those that depend on it most (threads, PCA), by the oldest kernels: 1 minute
#   scripts/processors.sh --all TEST...  these tests, in every setting; tests: all that make test runs
#
# To be called in the environment of the tests. Every row runs; the exit status is 1 where one fails.
set -uo pipefail
cd "$(dirname "$0")/.."
rows=("MKL_ENABLE_INSTRUCTIONS=SSE4_2 ATEN_CPU_CAPABILITY=default")
tests=(tests/ops/test_threads.py tests/ppca/test_ppca.py)
if [[ ${1:-} == --all ]]; then
  tests=("${@:2}")
  rows+=(MKL_CBWR=COMPATIBLE MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2 OMP_NUM_THREADS=1 OMP_NUM_THREADS=2 OMP_NUM_THREADS=3)
  for isa in $(python -c 'import fastelbo; print(*fastelbo.build_info()["isas_of_this_cpu"])'); do
    rows+=("FASTELBO_CPU_CAPABILITY=$isa")
  done
fi
worst=0
for row in "${rows[@]}"; do
  status=0
  read -ra settings <<<"$row"
  log=$(env "${settings[@]}" python -m pytest -n auto --dist worksteal -m "not slow" -p no:cacheprovider "${tests[@]}" 2>&1) || status=$?
  ((status)) && worst=1 && printf '%s\n' "$log" | tail -n 40
  printf '%-66s %s\n' "$row" "$(printf '%s\n' "$log" | tail -n 1)"
done
exit $worst
