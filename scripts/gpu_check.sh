#!/usr/bin/env bash
# One command on a machine with a GPU, a CUDA build of torch and its nvcc, and no network: builds in place, tests, looks
# for memory errors and races, and measures. At most 8 minutes by the limits of the steps. Prints a short table last; its
# exit status is that of the worst step.
#
#   scripts/gpu_check.sh [FOLDER]     logs and tables go to FOLDER (default: build/gpu_check)
#
# Wheels that it needs beside torch, to be brought along: ninja numpy setuptools pytest (build and tests), scikit-learn
# matplotlib tqdm (benchmark); their versions are in requirements.txt and requirements-dev.txt. compute-sanitizer comes
# with the CUDA toolkit, and is left out where it is not.
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
  summary+=("$(printf '%-12s %-8s %4d s  %s' "$name" "$( ((status)) && echo "FAILED" || echo ok)" $((SECONDS - start)) \
    "$(grep -E 'passed|failed|ERROR SUMMARY|RACECHECK SUMMARY|targets:' "$out/$name.log" | tail -n 1)")")
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/gpu.txt" || exit 2
python -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)' || exit 2

step build 200 env FASTELBO_CUDA=1 python setup.py build_ext --inplace
export PYTHONPATH=$PWD
step gpu_tests 90 python -m pytest -q -rs -p no:cacheprovider tests/ops/test_cuda.py
if command -v compute-sanitizer >/dev/null; then
  small='test_cpu_and_cuda_agree and float32 and (elbo or rsample or multi_sample)'
  step memcheck 35 compute-sanitizer --tool memcheck --error-exitcode 9 \
    python -m pytest -q -p no:cacheprovider tests/ops/test_cuda.py -k "$small"
  step racecheck 35 compute-sanitizer --tool racecheck --error-exitcode 9 \
    python -m pytest -q -p no:cacheprovider tests/ops/test_cuda.py -k "$small and elbo_loss"
else
  summary+=("$(printf '%-12s %-8s' sanitizer SKIPPED)  compute-sanitizer is not on PATH")
fi
step benchmark 100 python -m benchmarks --device cuda --out "$out/cuda.csv"
cat "$out/benchmark.log"

echo
printf '%s\n' "${summary[@]}"
exit $worst
