"""The CUDA kernels, run on the host: tests of values and gradients once more, on the very .cu sources.

tests/cuda_host/ says how. `make test` builds what is needed with CMake; where it is not built, this file is skipped and
says so. The tests of the ops run in a process whose fastelbo has the CUDA kernels in place of the CPU's.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
BUILD = TESTS.parent / "build/cmake"

LIBRARY, SANITIZED_LIBRARY = (next(BUILD.glob(f"{name}/*.so"), None) for name in ("cuda_host", "cuda_host_sanitized"))

pytestmark = pytest.mark.skipif(
    LIBRARY is None or SANITIZED_LIBRARY is None, reason="build/cmake has no cuda_host: make test builds it, on x86-64"
)

# file: what is left out, since it draws for minutes where every thread is a fiber, or is of the CPU alone
OPS = {
    "ops/test_likelihood.py": "",
    "ops/test_elements.py": "compiled",
    "ops/test_latent.py": "",
    "ops/test_elbo.py": "",
    "ops/test_iwae.py": "",
    "ops/test_strides.py": "32_bits",
    "ops/test_edges.py": "threads",
    "ops/test_mixture.py": "memory or same_bits",
    "ops/test_multi_sample.py": "expectations or signal_to_noise or bounds_grow or torch_func or compiled",
    "ppca/test_ppca.py": "hundred_thousand or compile or memory or sampling or bic or log_marginal or threads",
    "models/test_kept.py": "refused or threads or memory or autocast or compile or auto or loss_of_every or unbiased",
}
# under AddressSanitizer and UBSan, which make every test some ten times slower
SANITIZED = ["test_shapes", "test_mask", "test_rsample_tails", "test_prior_parameters", "test_nan_and_infinity"]


def run(library: Path | None, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    variables = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST_")} | environment
    variables["FASTELBO_CUDA_HOST"] = str(library)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "cuda_host.plugin",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-x",
    ]
    command += arguments
    return subprocess.run(command, env=variables, cwd=TESTS, text=True, capture_output=True, check=False, timeout=600)


def assert_passed(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout


def test_every_function_and_op():
    assert_passed(run(LIBRARY, "ops/test_values.py", "ops/test_twins.py", "-k", "not (em_takes or noise)"))


@pytest.mark.slow
@pytest.mark.parametrize("file", OPS)
def test_file(file):
    """The half types in the likelihoods alone, and in the values of every function above: all read them alike."""
    halves = "bfloat16" if file == "ops/test_likelihood.py" else "float16"
    assert_passed(run(LIBRARY, file, "-k", f"not ({' or '.join(filter(None, (OPS[file], halves)))})"))


def test_every_kernel_of_the_cpu_is_replaced():
    """Else the tests above would test that one."""
    code = """
import cuda_host.plugin, torch
for op in sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastelbo::")):
    table = torch._C._dispatch_dump_table(op).splitlines()
    print(op, next(line for line in table if line.startswith("CPU:")))
"""
    variables = os.environ | {"FASTELBO_CUDA_HOST": str(LIBRARY)}
    done = subprocess.run([sys.executable, "-c", code], env=variables, cwd=TESTS, text=True, capture_output=True)
    in_use = done.stdout.splitlines()
    assert len(in_use) > 10 and any("csrc/cuda/likelihood.cpp" in line for line in in_use), done.stderr
    of_the_cpu = [line.split()[0] for line in in_use if "csrc/cpu/" in line]
    assert of_the_cpu == ["fastelbo::_csr_matmul", "fastelbo::_csr_matmul_t"], done.stdout  # on the CPU alone


def test_the_kernels_themselves_are_sanitized():
    for library, expected in ((SANITIZED_LIBRARY, True), (LIBRARY, False)):
        symbols = subprocess.run(["nm", "-u", library], text=True, capture_output=True, check=True).stdout
        for name in ("__asan_report_load", "__asan_report_store", "__ubsan_handle"):
            assert (name in symbols) == expected, f"{name} in {library}"


@pytest.mark.parametrize(
    "kernel, message",
    [
        ("skips_a_barrier", "wait at different shuffles or barriers"),
        ("leaves_while_others_wait", "wait at different barriers"),
        ("skips_a_shuffle", "wait at different shuffles or barriers"),
        ("writes_past_shared_memory", "out of bounds"),
        ("reads_past_global_memory", "heap-buffer-overflow"),
        ("is_right", ""),
    ],
)
def test_broken_kernels_are_caught(kernel, message):
    done = subprocess.run([BUILD / "cuda_host_broken", kernel], text=True, capture_output=True)
    assert (done.returncode == 0) == (kernel == "is_right"), done.stderr
    assert message in done.stderr


def test_scale_kernel():
    """In place, read on the device; nothing changes where the factor is 1. Called by the backward on CUDA alone."""
    code = """
import cuda_host.plugin, torch
for dtype in (torch.float32, torch.float64):
    for n in (1, 3, 4, 7, 1000, 5001):
        for offset in range(4):
            t = torch.randn(n + 8, dtype=dtype)
            before, part = t.clone(), t[offset : offset + n]
            for factor in (1.0, -0.3):
                torch.ops.fastelbo._scale_(part, torch.tensor(factor, dtype=dtype))
            assert torch.equal(part, before[offset : offset + n] * torch.tensor(-0.3, dtype=dtype))
            assert torch.equal(t[:offset], before[:offset]) and torch.equal(t[offset + n :], before[offset + n :])
"""
    variables = os.environ | {"FASTELBO_CUDA_HOST": str(LIBRARY)}
    done = subprocess.run([sys.executable, "-c", code], env=variables, cwd=TESTS, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_under_sanitizers():
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], text=True, capture_output=True).stdout.strip()
    options = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    files = [
        "ops/test_likelihood.py",
        "ops/test_latent.py",
        "ops/test_elbo.py",
        "ops/test_iwae.py",
        "ops/test_mixture.py",
        "ops/test_multi_sample.py",
        "ppca/test_ppca.py",
    ]
    done = run(SANITIZED_LIBRARY, *files, "-k", f"({' or '.join(SANITIZED)}) and not (bfloat16 or float64)", **options)
    assert_passed(done)
    assert "runtime error" not in done.stderr
