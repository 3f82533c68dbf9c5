"""Every argument of every public function, constructor and method refuses what it does not take, and says its name."""

import inspect
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from contracts import B, D, K, M, public
from torch import Tensor, nn

import fastelbo


def _quantized() -> Tensor:
    return torch.quantize_per_tensor(torch.ones(B, M), 0.1, 0, torch.quint8)


# one value of every kind that somebody has once given for another
VALUES: dict[str, object] = {
    "None": None,
    "str": "abc",
    "bytes": b"abc",
    "bool": True,
    "numpy bool": np.bool_(True),
    "int": 2,
    "numpy int": np.int64(2),
    "big int": 2**63,
    "float": 1.5,
    "whole float": 2.0,
    "numpy float": np.float32(1.5),
    "complex": 1.5 + 1j,
    "object": object(),
    "dict": {"mu": 1.0},
    "list": [1, 2],
    "list of floats": [1.5, 2.5],
    "array": np.ones((B, M), np.float32),
    "array of str": np.array(["mean", "bernoulli"]),
    "pair of arrays": (np.ones((B, D)), np.ones((B, D))),
    "pair with None": (torch.ones(B, D), None),
    "three tensors": (torch.ones(B, D),) * 3,
    "0-d tensor": torch.tensor(0.5),
    "0-d int tensor": torch.tensor(2),
    "float tensor": torch.ones(B, M),
    "uint8 tensor": torch.ones(B, M, dtype=torch.uint8),
    "bool tensor": torch.ones(B, M, dtype=torch.bool),
    "int tensor": torch.ones(B, M, dtype=torch.int64),
    "float8 tensor": torch.ones(B, M).to(torch.float8_e4m3fn),
    "complex tensor": torch.ones(B, M, dtype=torch.complex64),
    "sparse tensor": torch.ones(B, M).to_sparse(),
    "CSR tensor": torch.ones(B, M).to_sparse_csr(),
    "nested tensor": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "quantized tensor": _quantized(),
    "distribution": torch.distributions.Normal(torch.zeros(B, M), torch.ones(B, M)),
    "dtype": torch.float32,
    "generator": torch.Generator(),
    "module": nn.Identity(),
    "class": nn.Linear,
    "function": torch.sigmoid,
    "empty posterior": fastelbo.Posterior(*[None] * 7),
    "posterior": fastelbo.rsample(torch.zeros(B, M), torch.zeros(B, M), K),
    "kept": fastelbo.keep_samples(torch.zeros(K, B), 2),
    "accumulator": fastelbo.LogMeanExp(),
}

_FLOATS = {"float tensor", "0-d tensor"}
_DATA = {*_FLOATS, "uint8 tensor", "bool tensor"}
_INTS = {"int", "numpy int"}
_NOTHING: set[str] = set()
_FLAG, _MODULE = {"bool"}, {"module"}
_NUMBERS = {*_INTS, "big int", "float", "whole float", "numpy float"}

# which of them an argument takes, as far as it goes without a look at the others; None besides, where it is the default
TAKES: dict[str, set[str]] = {
    **dict.fromkeys(("mu", "logvar", "prior_mu", "prior_logvar", "eps", "z", "log_ratio", "log_w"), _FLOATS),
    **dict.fromkeys(("log_likelihood", "weights", "log_weights"), _FLOATS),
    **dict.fromkeys(("logits", "mean", "recon", "W", "b", "log_sigma2"), _FLOATS),
    **dict.fromkeys(("x", "mask"), _DATA),
    "observed": {"bool tensor"},
    "gaussian_log_prob.logvar": {*_FLOATS, *_NUMBERS},
    "beta": {"0-d tensor", *_NUMBERS},
    "u": {"0-d tensor"},
    **{name: {"0-d tensor", *_NUMBERS} for name in ("alpha", "free_bits")},
    **dict.fromkeys(
        (
            f"{name}.{number}"
            for name in ("kept_loss", "estimator_weights", "Objective")
            for number in ("alpha", "beta", "free_bits")
        ),
        _NUMBERS,
    ),
    **dict.fromkeys(
        (
            "num_samples",
            "chunk_size",
            "first_sample",
            "groups",
            "n",
            "dim",
            "keep",
            "components",
            "dataset_size",
            "num_points",
        ),
        _INTS,
    ),
    "seed": {*_INTS, "0-d int tensor"},
    "generator": {"generator"},
    "posterior": {"posterior"},
    "kl_weight": {"0-d tensor", *_NUMBERS},
    "gaussian_kl.mask": {"bool tensor"},
    "kl_mask": {"bool tensor"},
    "batch_dims": _INTS,
    "kept": {"kept"},
    **dict.fromkeys(("likelihood", "reduction", "estimator", "objective", "proposal"), _NOTHING),
    **dict.fromkeys(("VAE.sample.mean", "reduce", "per_dimension"), _FLAG),
    **dict.fromkeys(("encoder", "decoder", "model"), _MODULE),
    "latent_shape": {"list"},
    "prior": _MODULE,
    "condition": {label for label, value in VALUES.items() if isinstance(value, torch.Tensor)}
    | {"three tensors", "kept"},
    "name": {"str"},
    **dict.fromkeys(("vae", "scaling", "evaluate.model"), _NOTHING),
    **{name: _FLOATS for name in ("shift", "scale", "Scaling.forward.x")},
    "Scaling.inverse.recon": _FLOATS,
    "total_correlation.weights": _NOTHING,
    "pseudo_inputs": _FLOATS,
    "latent": {"list", *_INTS},
    "aggregated_posterior.model": _NOTHING,
    "AggregatedPosterior.prior": _MODULE,
    "data": {*_DATA, "int tensor"},  # of counts, which is the model's business
    **dict.fromkeys(("evaluate.seed", "AggregatedPosterior.terms.seed"), _INTS),
    **{name: {*_FLOATS, *_NUMBERS} for name in ("elbo_loss.beta", "elbo_parts.beta", "ELBOLoss.beta")},
    "other": {"accumulator"},
    "DiagnosticsMeter.merge.other": _NOTHING,
}


def _public() -> set[str]:
    """What of `fastelbo.__all__` takes arguments. Records are what functions return; PPCA has tests of its own."""
    found = set()
    for name in fastelbo.__all__:
        value = getattr(fastelbo, name)
        if inspect.isfunction(value):
            found |= {name} if inspect.signature(value).parameters else set()
        elif inspect.isclass(value) and not issubclass(value, tuple | fastelbo.PPCA):
            found |= {name} if inspect.signature(value).parameters else set()
            methods = {n: f for n, f in vars(value).items() if inspect.isfunction(f) and not n.startswith("_")}
            methods = {n: f for n, f in methods.items() if not n.endswith("_extra_state")}  # torch calls them
            found |= {f"{name}.{n}" for n, f in methods.items() if len(inspect.signature(f).parameters) > 1}
    return found - {"load", "DiagnosticsMeter.all_reduce"}  # of a file, and of processes


def test_everything_public_is_here():
    assert _public() == set(public())


ARGUMENTS = [
    (name, p)
    for name, (call, _) in public().items()
    for p in inspect.signature(call).parameters.values()
    if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
]


@pytest.mark.parametrize(("name", "parameter"), [pytest.param(n, p, id=f"{n}-{p.name}") for n, p in ARGUMENTS])
def test_wrong_types_are_refused(name, parameter):
    call, good = public()[name]
    call(**good)
    takes = TAKES[f"{name}.{parameter.name}" if f"{name}.{parameter.name}" in TAKES else parameter.name]
    wrong = {label: value for label, value in VALUES.items() if label not in takes}
    if parameter.default is None:
        call(**{**good, parameter.name: wrong.pop("None")})
    missed = []
    for label, value in wrong.items():
        try:
            call(**{**good, parameter.name: value})
            missed.append(f"{label}: no error")
        except Exception as error:
            if not isinstance(error, ValueError | TypeError) or not re.search(rf"\b{parameter.name}\b", str(error)):
                missed.append(f"{label}: {type(error).__name__}: {error}")
    assert not missed, "\n".join(missed)


def test_the_message_says_what_came():
    for value, came in ((np.ones(3), "numpy.ndarray"), (None, "None"), ("a", "str"), ([1.0], "list")):
        with pytest.raises(TypeError, match=rf"^mu must be a torch.Tensor; got {came}$"):
            fastelbo.gaussian_kl(value, torch.ones(3))
    normal = torch.distributions.Normal(torch.zeros(3), torch.ones(3))
    with pytest.raises(TypeError, match=r"^mu must be a torch.Tensor; got torch.distributions.normal.Normal$"):
        fastelbo.gaussian_kl(normal, torch.ones(3))
    with pytest.raises(TypeError, match=r"^num_samples must be an int; got bool$"):
        fastelbo.rsample(torch.ones(2, 3), torch.ones(2, 3), True)
    with pytest.raises(
        TypeError, match=r"^mask must be a dense tensor, of layout torch.strided; got torch.sparse_coo$"
    ):
        fastelbo.bernoulli_log_prob(torch.ones(2, 3), torch.ones(2, 3), mask=torch.ones(2, 3).to_sparse())
    for call in (fastelbo.ELBOLoss, fastelbo.IWAELoss):
        with pytest.raises(ValueError, match=r'likelihood must be one of "bernoulli", .*; got "poison"'):
            call("poison")
        with pytest.raises(ValueError, match='reduction must be one of "mean", "sum", "none"; got "avg"'):
            call(reduction="avg")
    with pytest.raises(ValueError, match="free_bits must be at least 0; got -1"):
        fastelbo.ELBOLoss(free_bits=-1)


class Subclass(Tensor):
    pass


def test_what_is_as_good_as_the_type_is_taken():
    """Subclasses and parameters are tensors; numbers of numpy and the standard library are ints and floats."""
    mu, logvar = torch.randn(B, M), torch.randn(B, M)
    expected = fastelbo.rsample(mu, logvar, 2, seed=5, first_sample=200)
    for convert in (nn.Parameter, lambda t: t.as_subclass(Subclass)):
        z = fastelbo.rsample(convert(mu), logvar, 2, seed=5, first_sample=200).z
        assert torch.equal(z.detach().as_subclass(Tensor), expected.z)
    # an arithmetic in uint8 would wrap
    given = fastelbo.rsample(mu, logvar, np.uint8(2), seed=np.int32(5), first_sample=np.uint8(200))
    assert torch.equal(given.z, expected.z)
    for number in (np.float32(0.5), np.float64(0.5), Fraction(1, 2)):
        a, b = (fastelbo.gaussian_log_prob(mu, logvar, v) for v in (number, 0.5))
        assert torch.equal(a, b)
        a, b = (fastelbo.elbo_loss(mu, logvar, mu, logvar, likelihood="gaussian", beta=v) for v in (number, 0.5))
        assert torch.equal(a, b)
    model = fastelbo.VAE(nn.Linear(D, 2 * M), nn.Linear(M, D), latent_shape=[np.int64(M)])
    assert model.latent_shape == (M,) and type(model.latent_shape[0]) is int
    x = torch.rand(B, D)
    a, b = (model.log_marginal(x, k, chunk_size=c, seed=1).log_prob for k, c in ((200, 100), map(np.uint8, (200, 100))))
    assert torch.equal(a, b)


def test_wrong_calls_are_python_s_own_errors():
    mu = torch.ones(B, M)
    for call in (
        lambda: fastelbo.gaussian_kl(mu),
        lambda: fastelbo.gaussian_kl(mu, mu, None, None, 0.0),
        lambda: fastelbo.gaussian_kl(mu, mu, lambda_=0.1),
        lambda: fastelbo.gaussian_kl(mu, mu, mu=mu),
    ):
        with pytest.raises(TypeError, match=r"gaussian_kl\(\) "):
            call()


def test_a_symbolic_number_of_samples_is_an_int():
    def step(mu: Tensor, k: int) -> Tensor:
        return fastelbo.rsample(mu, mu, k, seed=3).z

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for k in (2, 5, 7):
        torch.testing.assert_close(compiled(torch.ones(B, M), k), step(torch.ones(B, M), k))
