"""On a GPU: the same values and gradients as on the CPU, on any stream, in graphs, compiled; nothing synchronizes.

The kernels themselves are tested on every machine by test_cuda_host.py. This file needs a GPU and a CUDA build, and is
skipped, with that reason, where one is missing.
"""

import pytest
import torch
from functions import FUNCTIONS, K
from oracle import gradients, tensors_of, upstream_for
from torch import Tensor

import fastelbo

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and fastelbo.build_info()["cuda"]),
    reason="needs a GPU and a CUDA build of fastelbo",
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((4, 5), (130, 784), (3, 9001), (1, 20_000))


def inputs_of(name: str, b: int, d: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    torch.manual_seed(0)
    return [t.to(dtype).to(device).requires_grad_() for t in FUNCTIONS[name].make(b, d)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_cpu_and_cuda_agree(name, dtype):
    for b, d in SHAPES:
        results = []
        for device in ("cpu", "cuda"):
            inputs = inputs_of(name, b, d, dtype, device)
            outputs = tensors_of(FUNCTIONS[name].call(*inputs))
            torch.manual_seed(1)
            upstream = [u.to(device) for u in upstream_for([o.cpu() for o in outputs])]
            results.append([*outputs, *gradients(outputs, inputs, upstream)])
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        for i, (a, e) in enumerate(zip(results[1], results[0], strict=True)):
            assert a.dtype == e.dtype and a.shape == e.shape
            eps = max(torch.finfo(a.dtype).eps, 64 * torch.finfo(compute).eps)
            a, e = a.detach().cpu().double(), e.detach().double()
            largest = e.abs().max().item() if e.numel() else 0.0
            torch.testing.assert_close(a, e, rtol=4 * eps, atol=4 * eps * largest, msg=lambda m, i=i: f"{i}: {m}")


def test_same_seed_same_noise():
    for first, samples in ((0, 7), (3, 2)):
        mu, logvar = torch.randn(5, 33), torch.randn(5, 33)
        draws = [
            fastelbo.rsample(mu.to(device), logvar.to(device), samples, seed=11, first_sample=first)
            for device in ("cpu", "cuda")
        ]
        torch.testing.assert_close(draws[1].z.cpu(), draws[0].z, rtol=2e-6, atol=2e-6)


def step(logits: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    drawn = fastelbo.rsample(mu, logvar, K)
    recon = logits + drawn.z.mean(-1, keepdim=True)
    dreg = fastelbo.multi_sample_loss(recon, x, drawn, estimator="dreg")
    return dreg + fastelbo.elbo_loss(recon, x, mu, logvar, beta=0.5)


def step_inputs(b: int = 64, d: int = 784, m: int = 16) -> list[Tensor]:
    shapes = (K, b, d), (b, d), (b, m), (b, m)
    tensors = [torch.randn(s, device="cuda") for s in shapes]
    tensors[1] = tensors[1].sigmoid()
    return [t.requires_grad_(i != 1) for i, t in enumerate(tensors)]


def test_nothing_synchronizes():
    inputs = step_inputs()
    step(*inputs).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*inputs).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("objective", ["iwae", "dreg"])
def test_keeping_samples_synchronizes_nowhere(objective):
    model = fastelbo.VAE(torch.nn.Linear(784, 2 * 16), torch.nn.Linear(16, 784)).cuda()
    x = torch.rand(64, 784, device="cuda")
    options = {"objective": objective, "num_samples": 50, "seed": 3}
    model.loss(x, keep=8, **options).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = model.loss(x, keep=8, **options)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(loss, model.loss(x, **options), rtol=2e-6, atol=2e-6)


def test_kept_samples_out_of_range_are_nan():
    mu = torch.zeros(4, 50, device="cuda", requires_grad=True)
    index = torch.tensor([3, 4, -1, 0], device="cuda")
    rows = fastelbo.rsample_kept(mu, mu, fastelbo.Kept(index * 0, index, index), seed=1)
    assert rows.z.isnan().all(1).tolist() == rows.log_ratio.isnan().tolist() == [False, True, True, False]


def test_runs_on_the_current_stream():
    """The work waits for what its stream has queued: a long delay, then the inputs."""
    logits, x, mu, logvar = (t.detach() for t in step_inputs())
    expected = fastelbo.elbo_loss(logits, x, mu, logvar)
    late = torch.zeros_like(logits)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        late.copy_(logits)
        loss = fastelbo.elbo_loss(late, x, mu, logvar)
    torch.cuda.synchronize()
    assert torch.equal(loss, expected)


def test_graphs_replay_with_fresh_noise():
    inputs = step_inputs()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(*inputs).backward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    for t in inputs:
        t.grad = None
    with torch.cuda.graph(graph):
        loss = step(*inputs)
        loss.backward()
    losses, grads = [], []
    for _ in range(3):
        graph.replay()
        losses.append(loss.item()), grads.append(inputs[0].grad.clone())
    assert len(set(losses)) == 3 and not torch.equal(grads[0], grads[1])


def test_compiled_step():
    inputs = step_inputs()

    def seeded(logits: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, seed: Tensor) -> Tensor:
        drawn = fastelbo.rsample(mu, logvar, K, seed=seed)
        return fastelbo.multi_sample_loss(logits + drawn.z.mean(), x, drawn, estimator="dreg")

    seed = torch.tensor([5], device="cuda")
    results = []
    for function in (seeded, torch.compile(seeded, fullgraph=True)):
        loss = function(*inputs, seed)
        results.append([loss, *gradients([loss], inputs, [torch.ones_like(loss)])])
    for a, e in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)


def test_autocast():
    logits, x, mu, logvar = step_inputs()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        half = (logits[0].bfloat16() @ torch.eye(784, device="cuda", dtype=torch.bfloat16)).requires_grad_()
        loss = fastelbo.elbo_loss(half, x, mu, logvar)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, fastelbo.elbo_loss(half.float(), x, mu, logvar), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("upstream", [1.0, 0.3])
def test_backward_scales_on_the_device_and_repeats(upstream):
    logits, x, mu, logvar = step_inputs()
    loss = fastelbo.elbo_loss(logits, x, mu, logvar)
    up = torch.tensor(upstream, device="cuda")
    first = torch.autograd.grad(loss, [logits, mu], up, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.mul_(-3)
    second = torch.autograd.grad(loss, [logits, mu], up)
    one = torch.autograd.grad(fastelbo.elbo_loss(logits, x, mu, logvar), [logits, mu])
    for a, b, c in zip(kept, second, one, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
        torch.testing.assert_close(a, upstream * c, rtol=1e-6, atol=0)


def test_second_device_tensors_are_refused():
    logits, x, mu, logvar = step_inputs()
    with pytest.raises(ValueError, match="x must be on cuda"):
        fastelbo.elbo_loss(logits, x.cpu(), mu, logvar)


def test_more_elements_than_32_bits_can_count():
    rows, columns = 2**15, 2**16 + 8
    free = torch.cuda.mem_get_info()[0]
    needed = rows * columns * 2 * 2 + rows * columns
    if free < 1.2 * needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free device memory; {free / 2**30:.0f} are")
    logits = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    logits[-1] = 3
    logits.requires_grad_()
    x = torch.zeros(rows, columns, dtype=torch.bool, device="cuda")
    value = fastelbo.bernoulli_log_prob(logits, x)
    expected = fastelbo.bernoulli_log_prob(logits[-1:].cpu(), x[-1:].cpu())
    torch.testing.assert_close(value[-1:].cpu(), expected, rtol=1e-5, atol=0)
    value.sum().backward()
    grad = logits.grad[-1].float()
    torch.testing.assert_close(grad, torch.full_like(grad, -0.9526), rtol=1e-2, atol=0)
