#!/usr/bin/env bash
# One command on a machine with a GPU, a CUDA build of torch and its nvcc, and no network: builds in place, tests, looks
# for memory errors and races, measures. Prints a short table last; its exit status is that of the worst step.
#
#   scripts/gpu_check.sh [FOLDER]     logs and tables go to FOLDER (default: build/gpu_check)
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/gpu_check}
mkdir -p "$out"
worst=0
summary=()

step() {  # NAME SECONDS COMMAND...: its output goes to a log, its verdict into the table
  local name=$1 limit=$2 start=$SECONDS status=0
  shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  if ((status)); then
    worst=1
    echo "--- $name failed ($status); the end of $out/$name.log:"
    tail -n 25 "$out/$name.log"
  fi
  summary+=("$(printf '%-22s %-8s %4d s  %s' "$name" "$( ((status)) && echo "FAILED" || echo ok)" $((SECONDS - start)) \
    "$(grep -E 'passed|failed|ERROR SUMMARY|RACECHECK SUMMARY|kernels compiled' "$out/$name.log" | tail -n 1)")")
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || exit 2
python -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)' || exit 2

step build 240 env FASTELBO_CUDA=1 python setup.py build_ext --inplace
export PYTHONPATH=$PWD
step gpu_tests 150 python -m pytest -q -rs -p no:cacheprovider tests/test_cuda.py
if command -v compute-sanitizer >/dev/null; then
  small='test_cpu_and_cuda_agree and float32 and (elbo or rsample or multi_sample)'
  step memcheck 60 compute-sanitizer --tool memcheck --error-exitcode 9 \
    python -m pytest -q -p no:cacheprovider tests/test_cuda.py -k "$small"
  step racecheck 60 compute-sanitizer --tool racecheck --error-exitcode 9 \
    python -m pytest -q -p no:cacheprovider tests/test_cuda.py -k "$small and elbo_loss"
else
  summary+=("$(printf '%-22s %-8s' sanitizer SKIPPED)  compute-sanitizer is not on PATH")
fi
step benchmark 150 python -m benchmarks --device cuda --out "$out/cuda.csv"
cat "$out/benchmark.log"

echo
printf '%s\n' "${summary[@]}"
exit $worst
