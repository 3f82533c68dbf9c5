"""The recipes of examples/recipes: in small, and their training step through torch.compile in one graph."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

RECIPES = Path(__file__).parents[2] / "examples/recipes"


def _image() -> Tensor:
    return torch.rand(6, 64)


def _labels() -> Tensor:
    return torch.arange(6) % 10


# name -> what its `loss` takes besides the model
BATCHES = {
    "beta_tc": lambda: (torch.rand(6, 256),),
    "conditional": lambda: (_image(), F.one_hot(_labels(), 10).float()),
    "flow_posterior": lambda: (_image(),),
    "missing_data": lambda: (torch.where(torch.rand(6, 64) < 0.5, torch.nan, torch.rand(6, 64)),),
    "semi_supervised": lambda: (_image(), _image(), _labels()),
    "sequences": lambda: (torch.randn(6, 40, 1), torch.rand(6, 40, 1) < 0.7),
    "text": lambda: (torch.randint(0, 29, (6, 24)), torch.tensor(0.3)),
    "two_layers": lambda: (_image(),),
    "vampprior": lambda: (_image(),),
}
every_recipe = pytest.mark.parametrize("name", BATCHES)


def recipe(name: str):
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_recipe_is_here():
    assert {path.stem for path in RECIPES.glob("*.py")} == set(BATCHES)


@every_recipe
def test_it_runs(name, monkeypatch, capsys):
    """A few steps; the figures that it must reach need all of them, in under a minute on one thread."""
    module = recipe(name)
    monkeypatch.setattr(module, "STEPS", 30)
    assert module.main() in (0, 1)
    printed = capsys.readouterr().out
    assert any(c.isdigit() for c in printed) and "nan" not in printed and "inf " not in printed


@every_recipe
def test_it_trains(name):
    """A hundred steps on one batch lower its loss."""
    module = recipe(name)
    torch.manual_seed(0)
    model, batch = module.build(), BATCHES[name]()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = module.loss(model, *batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < sum(losses[:10])
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@every_recipe
def test_it_compiles_in_one_graph(name):
    torch._dynamo.reset()
    module = recipe(name)
    torch.manual_seed(0)
    model, batch = module.build(), BATCHES[name]()
    if "vae" in dict(model.named_children()) or hasattr(model, "latent_shape"):
        module.loss(model, *batch)  # a first run tells the model what shape its latents have
    found = []
    for loss in (module.loss, torch.compile(module.loss, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        value = loss(model, *batch)
        found.append([value.detach(), *torch.autograd.grad(value, list(model.parameters()))])
    for eager, compiled in zip(*found, strict=True):
        assert (eager - compiled).abs().max() <= 1e-4 * eager.abs().max() + 1e-6
