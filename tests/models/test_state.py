"""What saves, moves, casts and averages the state of a VAE: `latent_shape` is no number in it. Calls, compiled once."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastelbo
from fastelbo import VAE

B, D, M = 6, 8, 3
State = dict[str, Tensor]


def new(**options: object) -> VAE:
    """Its buffers, those of the prior and of batch norm, are what a tool meets beside the parameters."""
    encoder = nn.Sequential(nn.Linear(D, 2 * M), nn.BatchNorm1d(2 * M))
    return VAE(encoder, nn.Linear(M, D), prior=(torch.zeros(M), torch.zeros(M)), **options)


def step(model: VAE) -> VAE:
    model.loss(torch.rand(B, D)).backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad
    return model


def trained() -> VAE:
    torch.manual_seed(0)
    return step(new())


# ----------------------------------------------------------------------------------------------------------------------
# From a state dict to another, which a fresh model loads.


def through_a_file(state: State, **options: object) -> State:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True, **options)


def moving_average(state: State) -> State:
    average = {name: t.clone() for name, t in state.items()}
    for _ in range(3):
        for name, t in state.items():
            if t.is_floating_point():
                average[name].mul_(0.9).add_(t, alpha=0.1)
    return average


def each(function: Callable[[Tensor], Tensor]) -> Callable[[State], State]:
    return lambda state: {name: function(t) for name, t in state.items()}


STATES = {
    "the same": dict,
    "a file": through_a_file,
    "a file, on meta": lambda state: through_a_file(state, map_location="meta"),
    "half": each(Tensor.half),
    "int8": each(lambda t: t.to(torch.int8)),
    "numpy": each(lambda t: torch.from_numpy(t.numpy())),
    "mean": each(lambda t: (t + t) / 2),
    "mean of a stack": each(lambda t: torch.stack([t, t, t]).float().mean(0)),
    "lerp": each(lambda t: torch.lerp(t.float(), t.float(), 0.3)),
    "moving average": moving_average,
}


@pytest.mark.parametrize("name", STATES)
def test_a_fresh_model_loads_any_of_these_states(name):
    state, fresh = STATES[name](trained().state_dict()), new()
    fresh.load_state_dict(state, assign="meta" in name)
    assert fresh.latent_shape == (M,)
    assert "meta" in name or fresh.sample(2).shape == (2, D)
    nested = nn.ModuleDict({"vae": new()})
    nested.load_state_dict({f"vae.{name}": t for name, t in state.items()}, assign="meta" in name)
    assert nested["vae"].latent_shape == (M,)


@pytest.mark.parametrize("latent", [(), (1,), (2, 3), (2, 3, 5)])
def test_any_latent_shape_is_a_size(latent):
    model, other, given = new(latent_shape=latent), new(), new(latent_shape=(7,))
    state = model.state_dict()
    assert state["_extra_state"].shape == (0, *latent) and all(isinstance(t, Tensor) for t in state.values())
    other.load_state_dict({name: t.half() for name, t in state.items()})
    assert other.latent_shape == latent
    given.load_state_dict(state)
    assert given.latent_shape == (7,)  # what the user gave is left


def test_no_entry_before_it_is_known():
    fresh, model = new(), trained()
    assert set(fresh.state_dict()) == set(model.state_dict()) - {"_extra_state"}
    assert str(model.load_state_dict(fresh.state_dict())) == "<All keys matched successfully>"
    assert model.latent_shape == (M,)
    fresh.load_state_dict(fresh.state_dict())
    assert fresh.latent_shape is None


@pytest.mark.parametrize("cast", [lambda t: t, Tensor.half, lambda t: (0.9 * t + 0.1 * t).float()])
def test_numbers_of_an_older_version_are_read(cast):
    model = trained()
    for numbers, expected in (([20], (20,)), ([3, 16, 16], (3, 16, 16)), ([], None)):
        old, fresh = cast(torch.tensor(numbers, dtype=torch.int64)), new()
        if len(old) or old.dtype == torch.int64:
            fresh.load_state_dict(model.state_dict() | {"_extra_state": old})
            assert fresh.latent_shape == expected and all(type(size) is int for size in fresh.latent_shape or ())
    fresh.load_state_dict(model.state_dict() | {"_extra_state": torch.tensor([M], device="meta")})


# ----------------------------------------------------------------------------------------------------------------------
# From a model to another.


def averaged(before: bool, **options: object) -> Callable[[VAE], VAE]:
    def by(model: VAE) -> VAE:
        average = AveragedModel(new() if before else model, **options)
        for _ in range(3):
            average.update_parameters(step(model))
        ours, theirs = (dict(m.named_buffers()) for m in (average.module, model))
        assert ours.keys() == theirs.keys()
        if not options:  # it copies them
            torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
        return average.module

    return by


def by_default_on_meta(model: VAE) -> VAE:
    torch.set_default_device("meta")
    try:
        state = model.state_dict()
    finally:
        torch.set_default_device(None)
    assert {t.device.type for t in state.values()} == {"cpu"}
    model.load_state_dict(state)
    return model


def emptied(model: VAE) -> VAE:
    with torch.no_grad():
        for t in model.to("meta").to_empty(device="cpu").state_dict().values():
            t.zero_()
    return model


def called_with_its_state(model: VAE) -> VAE:
    state, x = model.state_dict(), torch.rand(B, D)
    torch.func.functional_call(model, state, (x,))
    return model


MODELS = {
    "half": lambda model: model.half().float(),
    "meta": lambda model: model.to("meta"),
    "to_empty": emptied,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "default device": by_default_on_meta,
    "functional_call": called_with_its_state,
    "AveragedModel": averaged(False),
    "AveragedModel, buffers": averaged(False, use_buffers=True),
    "EMA": averaged(False, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_stays_with_the_model(name):
    model, fresh = MODELS[name](trained()), new()
    assert model.latent_shape == (M,) and (name == "meta" or model.sample(2).shape == (2, D))
    state = model.state_dict()
    assert len({t.device for t in state.values()}) == 1
    fresh.load_state_dict(state, assign=True)
    assert fresh.latent_shape == (M,)


@pytest.mark.parametrize("options", [{}, {"use_buffers": True}], ids=str)
def test_an_average_that_began_before_the_first_batch(options):
    """Its copy has seen no batch: it asks. Batch norm's buffers are paired with those of the model all the same."""
    average = averaged(True, **options)(new())
    with pytest.raises(ValueError, match=r"give VAE\(\.\.\., latent_shape="):
        average.sample(2)
    average.latent_shape = (M,)
    assert average.sample(2).shape == (2, D)


# ----------------------------------------------------------------------------------------------------------------------
# torch.distributed.checkpoint, which loads into what is there. Of several processes: test_distributed.py.


def _by_module(model: VAE, fresh: VAE, folder: Path) -> None:
    dcp.save({"model": model}, checkpoint_id=folder)
    dcp.load({"model": fresh}, checkpoint_id=folder)


def _by_state_dict(model: VAE, fresh: VAE, folder: Path) -> None:
    dcp.save(model.state_dict(), checkpoint_id=folder)
    dcp.load(state := fresh.state_dict(), checkpoint_id=folder)
    fresh.load_state_dict(state)


def _by_functions(model: VAE, fresh: VAE, folder: Path) -> None:
    dcp.save(get_model_state_dict(model), checkpoint_id=folder)
    dcp.load(state := get_model_state_dict(fresh), checkpoint_id=folder)
    set_model_state_dict(fresh, state)


@pytest.mark.filterwarnings("ignore")  # of torch: no process group
@pytest.mark.parametrize("by", [_by_module, _by_state_dict, _by_functions])
def test_distributed_checkpoints(tmp_path, by):
    model, fresh, given = trained(), new(), new(latent_shape=(M,))
    for other in (fresh, given):
        by(model, other, tmp_path / str(other.latent_shape))
        torch.testing.assert_close(dict(other.named_parameters()), dict(model.named_parameters()), rtol=0, atol=0)
        assert torch.equal(other.encoder[1].running_mean, model.encoder[1].running_mean)
    with pytest.raises(ValueError, match=r"latent_shape is not known yet: .* give VAE\(\.\.\., latent_shape="):
        fresh.sample(2)
    assert given.sample(2).shape == (2, D)


@pytest.mark.parametrize("options", [{}, {"full_state_dict": True, "cpu_offload": True}], ids=str)
def test_a_state_of_get_model_state_dict(options):
    fresh, state = new(), get_model_state_dict(trained(), options=StateDictOptions(**options))
    set_model_state_dict(fresh, state)
    assert fresh.latent_shape == (M,) and fresh.sample(2).shape == (2, D)


# ----------------------------------------------------------------------------------------------------------------------
# torch.compile: what a call learns is not read by compiled code, which would be compiled anew once it is known.

OPTIONS = {"objective": "iwae", "num_samples": 50}
METHODS = {
    "encode": lambda model, x: model.encode(x),
    "encode, mask": lambda model, x: model.encode(x, mask=x > 0.1),
    "forward": lambda model, x: model(x),
    "forward, K": lambda model, x: model(x, 4),
    "loss": lambda model, x: model.loss(x),
    "loss, K": lambda model, x: model.loss(x, **OPTIONS),
    "loss, keep": lambda model, x: model.loss(x, **OPTIONS, keep=5),
    "parts": lambda model, x: model.parts(x),
    "parts, an objective": lambda model, x: model.parts(x, fastelbo.Objective("vr", num_samples=4), alpha=0.3),
    "VAELoss": lambda model, x: fastelbo.VAELoss(model, "iwae", num_samples=4)(x),
    "reconstruct": lambda model, x: model.reconstruct(x),
    "log_marginal": lambda model, x: model.log_marginal(x, 7),
    "log_marginal, prior": lambda model, x: model.log_marginal(x, 7, proposal="prior"),
    "importance_weights": lambda model, x: fastelbo.importance_weights(model, x, 7),
    "decode": lambda model, x: model.decode(x[:, :M]),
    "sample": lambda model, x: model.sample(4),
}


def test_every_method_is_here():
    public = {name for name, f in vars(VAE).items() if callable(f) and name[0] != "_" and "extra_state" not in name}
    assert public == {name.partition(",")[0] for name in METHODS} - {"importance_weights", "VAELoss"}


@pytest.mark.parametrize("before", [False, True], ids=["compiled first", "eager first"])
@pytest.mark.parametrize("name", METHODS)
def test_each_method_is_compiled_once(name, before):
    """In one graph, with calls in eager mode before, or in between."""
    model, x = new(latent_shape=(M,) if name in ("decode", "sample") and not before else None).eval(), torch.rand(B, D)
    torch._dynamo.reset()
    compiled = torch.compile(METHODS[name], fullgraph=True, backend="eager")
    calls = METHODS["loss"], METHODS["encode"], METHODS[name]
    if before:
        for call in calls:
            call(model, x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            compiled(model, x)
            for call in calls[:2]:
                call(model, x)
    assert model.latent_shape == (M,)


@pytest.mark.parametrize("name", ["forward, K", "log_marginal"])
def test_it_compiles_under_a_default_device(name):
    """Under which `torch.compile` refuses some methods of tensors."""
    model, x = new(latent_shape=(M,)).eval(), torch.rand(B, D)
    torch._dynamo.reset()
    torch.set_default_device("cpu")
    try:
        torch.compile(METHODS[name], fullgraph=True, backend="eager")(model, x)
    finally:
        torch.set_default_device(None)


def test_what_compiled_code_has_seen_is_known_after_it():
    model = new()
    torch._dynamo.reset()
    torch.compile(model.loss, fullgraph=True, backend="eager")(torch.rand(B, D))
    assert model.latent_shape == (M,) and model.sample(2).shape == (2, D)
