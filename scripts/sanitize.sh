#!/usr/bin/env bash
# The CPU kernels under AddressSanitizer and UBSan, and under ThreadSanitizer, on every instruction set of this CPU.
#
#   scripts/sanitize.sh          the C++ tests: every kernel, dtype, layout and tail; threads that share out the work
#   scripts/sanitize.sh --ops    the Python tests of the ops as well, under AddressSanitizer and UBSan
#
# Python and PyTorch are not instrumented: ThreadSanitizer would report every loop of theirs that OpenMP shares out.
set -euo pipefail
cd "$(dirname "$0")/.."
export UBSAN_OPTIONS=print_stacktrace=1

build() {  # FOLDER SANITIZERS TARGET...
  local folder=build/$1 sanitizers=$2
  shift 2
  cmake -S . -B "$folder" -G Ninja -DPython_EXECUTABLE="$(command -v python)" -DFASTELBO_SANITIZE="$sanitizers"
  cmake --build "$folder" --target "$@"
  ctest --test-dir "$folder" --output-on-failure
}

build thread thread all
if [[ ${1:-} != --ops ]]; then
  build address address,undefined all
  exit
fi

build address address,undefined all _C
ln -sf "$PWD"/fastelbo/*.py build/address/fastelbo/
runtime=$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libstdc++.so)
for isa in $(python -c 'import fastelbo; print(*fastelbo.build_info()["isas_of_this_cpu"])'); do
  echo "The ops on $isa"
  FASTELBO_CPU_CAPABILITY=$isa LD_PRELOAD=$runtime \
    ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 PYTHONPATH=tests \
    python -m pytest -p sanitized -p no:xdist -p no:cacheprovider -o pythonpath=build/address \
    tests/test_likelihood.py tests/test_latent.py tests/test_elbo.py tests/test_iwae.py tests/test_multi_sample.py \
    tests/test_strides.py tests/test_edges.py tests/test_ppca.py tests/test_random_walk.py \
    -k "not 32_bits and not expectations and not signal_to_noise and not bounds_grow and not compile and not allocat and not copies and not memory and not hundred_thousand and not sampling"
done
