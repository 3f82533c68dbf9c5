"""On a GPU: the same values and gradients as on the CPU, on any stream, in graphs, compiled; nothing synchronizes.

The kernels themselves are tested on every machine by test_cuda_host.py. This file needs a GPU and a CUDA build, and is
skipped, with that reason, where one is missing.
"""

import pytest
import torch
from contracts import FUNCTIONS, K
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
    rows = fastelbo.rsample(mu, mu, kept=fastelbo.Kept(index * 0, index, index), seed=1)
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


# ----------------------------------------------------------------------------------------------------------------------
# Graphs of whole training steps of a VAE. A seed that is a tensor is read at every replay; without one, torch's
# generator advances with every replay.

OBJECTIVES = {
    "elbo": {"objective": "elbo"},
    "iwae": {"objective": "iwae", "num_samples": 6},
    "dreg": {"objective": "dreg", "num_samples": 6},
    "kept samples": {"objective": "iwae", "num_samples": 12, "keep": 3},
}
every_objective = pytest.mark.parametrize("objective", OBJECTIVES)


class Loss(torch.nn.Module):
    """What is captured: data and seed -> the loss of a VAE with two hidden layers."""

    def __init__(self, objective: str, device: str = "cuda") -> None:
        super().__init__()
        torch.manual_seed(0)
        encoder = torch.nn.Sequential(torch.nn.Linear(784, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2 * 8))
        decoder = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 784))
        self.vae = fastelbo.VAE(encoder, decoder, latent_shape=(8,)).to(device)
        self.options = OBJECTIVES[objective]

    def forward(self, x: Tensor, seed: Tensor | None = None) -> Tensor:
        return self.vae.loss(x, seed=seed, **self.options)


def batches(n: int, device: str = "cuda") -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(32, 784, generator=generator).to(device) for _ in range(n)]


def seeds(n: int, device: str = "cuda") -> list[Tensor]:
    return [torch.tensor([7 + i], device=device) for i in range(n)]


def losses_and_gradients(loss: torch.nn.Module, module: torch.nn.Module, device: str = "cuda") -> list[Tensor]:
    """Of three batches with seeds of their own, by `loss`, whose parameters are those of `module`."""
    found = []
    for x, seed in zip(batches(3, device), seeds(3, device), strict=True):
        module.zero_grad()
        value = loss(x, seed)
        value.backward()
        found += [value.detach().clone(), *(p.grad.clone() for p in module.parameters())]
    return found


def assert_same(results: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(results, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5 * max(1.0, e.abs().max().item()))


@every_objective
def test_make_graphed_callables(objective):
    expected = losses_and_gradients(module := Loss(objective), module)
    module = Loss(objective)
    graphed = torch.cuda.make_graphed_callables(module, (batches(1)[0], seeds(1)[0]))
    assert_same(losses_and_gradients(graphed, module), expected)


@every_objective
def test_compile_with_graphs(objective):
    expected = losses_and_gradients(module := Loss(objective), module)
    module = Loss(objective)
    compiled = torch.compile(module, mode="reduce-overhead")

    def loss(x: Tensor, seed: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(x, seed)

    for _ in range(3):  # compiles, warms up, captures
        results = losses_and_gradients(loss, module)
    assert_same(results, expected)


@every_objective
def test_graph_of_a_whole_step(objective):
    """Forward, backward and Adam in one graph: the parameters of eager steps; without a seed, fresh noise."""

    def prepared(lr: float) -> tuple[Loss, torch.optim.Optimizer, Tensor]:
        module = Loss(objective)
        return module, torch.optim.Adam(module.parameters(), lr, capturable=True), batches(1)[0]

    def captured(module: Loss, optimizer: torch.optim.Optimizer, x: Tensor, seed: Tensor | None):
        def step() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = module(x, seed)
            loss.backward()
            optimizer.step()
            return loss

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = step()
        return step, graph, loss

    states = []
    for replay in (False, True):
        module, optimizer, x = prepared(1e-2)
        seed = seeds(1)[0]
        step, graph, _ = captured(module, optimizer, x, seed)
        for data, number in zip(batches(4), seeds(4), strict=True):
            x.copy_(data), seed.copy_(number)
            graph.replay() if replay else step()
        states.append([p.detach().clone() for p in module.parameters()])
    assert_same(states[1], states[0])

    _, graph, loss = captured(*prepared(0.0), None)
    losses = []
    for _ in range(4):
        graph.replay()
        losses.append(loss.item())
    assert len(set(losses)) == 4


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
