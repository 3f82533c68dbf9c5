"""`reference_mode` holds for the thread that entered it, for as long as a block is open, and under torch.compile."""

import asyncio
import threading

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastelbo


def kl() -> Tensor:
    return fastelbo.gaussian_kl(torch.randn(4, 5, requires_grad=True), torch.randn(4, 5))


def in_reference() -> bool:
    """Whether a call takes the plain-PyTorch path: its graph ends in a torch operation, not in the op's own node."""
    return type(kl().grad_fn).__name__ == "SumBackward1"


def in_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_blocks_nest_and_end_with_an_error():
    assert not in_reference()
    with fastelbo.reference_mode():
        with pytest.raises(KeyError), fastelbo.reference_mode():
            raise KeyError
        assert in_reference()
    assert not in_reference()


def test_other_threads_are_not_touched():
    with fastelbo.reference_mode():
        assert not in_thread(in_reference)
        assert in_reference()
    assert not in_reference()


def test_overlapping_blocks_of_two_threads():
    """A enters, B enters, A leaves, B leaves: the order in which one shared flag would stay set."""
    steps = [threading.Event() for _ in range(3)]
    seen = []

    def first() -> None:
        with fastelbo.reference_mode():
            steps[0].set()
            steps[1].wait()
        seen.append(in_reference())
        steps[2].set()

    def second() -> None:
        steps[0].wait()
        with fastelbo.reference_mode():
            steps[1].set()
            steps[2].wait()
            seen.append(in_reference())
        seen.append(in_reference())

    threads = [threading.Thread(target=f) for f in (first, second)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert seen == [False, True, False]
    assert not in_reference()


def test_overlapping_blocks_of_two_tasks():
    """Tasks share their thread: the mode holds until the last block of the thread has ended, and no longer."""

    async def task(entered: asyncio.Event, leave: asyncio.Event) -> None:
        with fastelbo.reference_mode():
            entered.set()
            await leave.wait()

    async def main() -> None:
        events = [asyncio.Event() for _ in range(4)]
        first = asyncio.create_task(task(events[0], events[1]))
        await events[0].wait()
        second = asyncio.create_task(task(events[2], events[3]))
        await events[2].wait()
        events[1].set()
        await first
        assert in_reference()
        events[3].set()
        await second

    asyncio.run(main())
    assert not in_reference()


def test_backward_in_another_thread_or_outside_the_block():
    """The graph that was recorded decides, not the mode at the time of the backward."""

    def loss(mu: Tensor) -> Tensor:
        return fastelbo.gaussian_kl(mu, torch.zeros(4, 5), free_bits=0.2).sum()

    mu = torch.randn(4, 5, requires_grad=True)
    with fastelbo.reference_mode():
        expected = torch.autograd.grad(loss(mu), mu)[0]
        recorded = loss(mu)
    assert torch.equal(in_thread(lambda: torch.autograd.grad(recorded, mu)[0]), expected)
    recorded = loss(mu)
    with fastelbo.reference_mode():
        actual = torch.autograd.grad(recorded, mu)[0]
    assert torch.equal(actual, in_thread(lambda: torch.autograd.grad(loss(mu), mu)[0]))


def test_recomputation_in_the_backward_sees_the_mode():
    seen = []

    def loss(mu: Tensor) -> Tensor:
        seen.append(in_reference())
        return fastelbo.gaussian_kl(mu, torch.zeros(4, 5)).sum()

    with fastelbo.reference_mode():
        checkpoint(loss, torch.randn(4, 5, requires_grad=True), use_reentrant=False).backward()
    assert seen == [True, True]


def test_compiled_calls_follow_the_mode():
    """One compiled function, called within and without, and from another thread: each call takes its own path."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> object:
        graphs.append(any("fastelbo" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    call = torch.compile(lambda mu: fastelbo.gaussian_kl(mu, mu), backend=backend, fullgraph=True)
    mu = torch.randn(4, 5)
    call(mu)
    assert graphs == [True], "the op"
    with fastelbo.reference_mode():
        call(mu)
        assert graphs == [True, False], "the twin"
        in_thread(lambda: call(mu))
        assert graphs == [True, False], "another thread: the graph of the op serves"
        with fastelbo.reference_mode():
            call(mu)
    call(mu)
    assert graphs[:2] == [True, False] and not any(graphs[2:]), "back to the first graph"


def test_the_block_itself_can_be_compiled():
    def call(mu: Tensor) -> Tensor:
        with fastelbo.reference_mode():
            return fastelbo.gaussian_kl(mu, mu)

    torch._dynamo.reset()
    mu = torch.randn(4, 5)
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(mu), call(mu))
        assert not in_reference()
