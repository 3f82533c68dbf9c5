#!/usr/bin/env bash
# The CPU kernels under AddressSanitizer and UBSan on every instruction set of this CPU, and under ThreadSanitizer on the
# widest.
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
}

targets=(all)
[[ ${1:-} == --ops ]] && targets+=(_C)
build thread thread all
build address address,undefined "${targets[@]}"
ctest --test-dir build/thread --output-on-failure &  # either takes one core
ctest --test-dir build/address --output-on-failure
wait $!
[[ ${1:-} == --ops ]] || exit 0

ln -sf "$PWD"/fastelbo/*.py build/address/fastelbo/
export PYTHONPATH=$PWD/build/address:$PWD/tests
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0
runtime=$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libstdc++.so)
files=(tests/ops/test_{values,likelihood,latent,elbo,iwae,mixture,multi_sample,strides,edges,random_walk}.py tests/ppca/test_ppca.py)
# statistics, memory and compilation: what the kernels do in them is in the others too
left_out='32_bits or expectations or signal_to_noise or bounds_grow or compile or allocat or copies or memory'
left_out+=' or hundred_thousand or sampling'
for isa in $(LD_PRELOAD=$runtime python -P -c 'import fastelbo; print(*fastelbo.build_info()["isas_of_this_cpu"])'); do
  echo "The ops on $isa"
  FASTELBO_CPU_CAPABILITY=$isa LD_PRELOAD=$runtime \
    python -P -m pytest -p sanitized -p no:xdist -p no:cacheprovider --capture=sys -o pythonpath=build/address \
    -k "not ($left_out)" "${files[@]}"
done
