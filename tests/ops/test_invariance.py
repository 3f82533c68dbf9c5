"""The same bits for any number of threads and from run to run; every instruction set against the reference."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastelbo

INFO = fastelbo.build_info()


@pytest.fixture(autouse=True)
def _threads_afterwards():
    yield
    torch.set_num_threads(1)


def _fused_gradients(threads: int, samples: int, batch: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    """Of the losses alone, as in training: the gradient that the forward writes."""
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    recon, scale = (torch.randn(samples, batch, size).to(dtype).requires_grad_() for _ in range(2))
    x, latent = torch.rand(batch, size), torch.randn(batch, 700, requires_grad=True)
    log_ratio = torch.randn(samples, batch, requires_grad=True)
    found = []
    for free_bits in (0.0, 0.3):
        loss = fastelbo.elbo_loss((recon, scale), x, latent, latent, likelihood="laplace", free_bits=free_bits)
        found += [loss, *torch.autograd.grad(loss, [recon, scale, latent])]
    loss = fastelbo.iwae_loss((recon, scale), x, log_ratio, likelihood="gaussian")
    return [*found, loss, *torch.autograd.grad(loss, [recon, scale, log_ratio])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 1, 50_000), (40, 2, 900), (2, 3, 9000), (3, 700, 30), (5, 64, 784)], ids=str)
def test_gradients_written_by_the_forward_have_the_same_bits(shape, dtype):
    expected = _fused_gradients(1, *shape, dtype)
    for threads in (2, 3, 8):
        for i, (a, e) in enumerate(zip(_fused_gradients(threads, *shape, dtype), expected, strict=True)):
            assert torch.equal(a, e), f"tensor {i} with {threads} threads"


def _sums_over_samples(threads: int, shape: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    log_ratio = (3 * torch.randn(shape)).to(dtype).requires_grad_()
    recon, x = torch.zeros(*shape, 1), torch.zeros(shape[1], 1)
    kl = fastelbo.iwae_parts(recon.to(dtype), x.to(dtype), log_ratio).kl
    torch.testing.assert_close(kl, -log_ratio.mean(0))
    return [kl, *torch.autograd.grad(kl.sum(), log_ratio), *fastelbo.LogMeanExp().update(log_ratio).result()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(100_000, 1), (32_768, 1), (60_001, 3), (50, 20_011), (300, 1001)], ids=str)
def test_sums_over_many_samples_have_the_same_bits(shape, dtype):
    expected = _sums_over_samples(1, shape, dtype)
    for threads in (2, 3, 8):
        for i, (a, e) in enumerate(zip(_sums_over_samples(threads, shape, dtype), expected, strict=True)):
            assert torch.equal(a, e), f"tensor {i} with {threads} threads"


@pytest.mark.parametrize("layout", ["in place", "half types"])
def test_a_weighted_mask_changes_no_bit_where_the_rows_are_shared_out(layout):
    """Fewer data than threads take another path, in the same arithmetic."""
    torch.manual_seed(0)
    dtype = torch.float32 if layout == "in place" else torch.float16
    logits, x, mask = torch.randn(5, 2, 784).to(dtype).requires_grad_(), torch.rand(2, 784), torch.rand(2, 784)
    before, found = torch.get_num_threads(), []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        loss = fastelbo.iwae_loss(logits, x, torch.zeros(5, 2), mask=mask)
        found.append(torch.autograd.grad(loss, logits)[0])
    torch.set_num_threads(before)
    assert torch.equal(*found)


# ----------------------------------------------------------------------------------------------------------------------
# Instruction sets

TESTS = Path(__file__).parents[1]


def run(isa: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"FASTELBO_CPU_CAPABILITY": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    for name in [n for n in environment if n.startswith("PYTEST_")]:
        del environment[name]
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=TESTS, text=True, capture_output=True, check=False
    )


def test_the_best_instruction_set_is_chosen():
    if "FASTELBO_CPU_CAPABILITY" in os.environ:
        pytest.skip("FASTELBO_CPU_CAPABILITY chooses another one")
    assert INFO["isa"] == INFO["isas_of_this_cpu"][-1]
    assert set(INFO["isas_of_this_cpu"]) <= set(INFO["isas"])
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert "avx2" in INFO["isas_of_this_cpu"]


@pytest.mark.parametrize(
    "isa, files",
    [
        *((isa, ["values"]) for isa in INFO["isas"]),
        # beside the C++ tests of every one, which have the layouts and tails
        pytest.param("avx2", ["likelihood", "latent"], marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_instruction_set_against_the_reference(isa, files):
    """The value and gradient tests once more, in a process that uses it; of the two half types one, but for values."""
    if isa not in INFO["isas_of_this_cpu"]:
        pytest.skip(f"this CPU has no {isa}")
    if "FASTELBO_CPU_CAPABILITY" in os.environ:
        pytest.skip("FASTELBO_CPU_CAPABILITY is set: this is such a process")
    if isa == INFO["isa"]:
        pytest.skip(f"{isa} is the one that all other tests use")
    paths = [f"ops/test_{name}.py" for name in files]
    paths.append("ops/test_multi_sample.py::test_float32_is_as_good_as_eager_pytorch")
    chosen = [] if files == ["values"] else ["-k", "not bfloat16"]
    tests = run(isa, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *chosen, *paths)
    assert tests.returncode == 0, tests.stdout[-4000:] + tests.stderr[-2000:]


def test_the_variable_chooses_the_instruction_set():
    for isa in INFO["isas_of_this_cpu"]:
        chosen = run(isa, "-c", "import fastelbo; print(fastelbo.build_info()['isa'])")
        assert chosen.stdout.strip() == isa, chosen.stderr


def test_unknown_instruction_set_is_refused():
    process = run("sse9", "-c", "import fastelbo; print(fastelbo.build_info()['isa'])")
    assert process.returncode != 0
    assert "FASTELBO_CPU_CAPABILITY must be one of baseline" in process.stderr and "sse9" in process.stderr
