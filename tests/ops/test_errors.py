"""Every bad argument raises an error that says which one, what was expected and what came."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from contracts import public

import fastelbo

ANY_LIKELIHOOD = ("log_prob", "elbo_loss", "elbo_parts", "iwae_loss", "multi_sample_parts")
ANY_LOSS = ("elbo_loss", "elbo_parts", "iwae_loss", "multi_sample_loss", "bound_loss")
ANY_RECON = (*ANY_LIKELIHOOD, "bernoulli_log_prob", "gaussian_log_prob")

r = torch.randn
# what is spoiled, by what, in which calls, the error, what its message says
CASES = [
    ("recon", r(4, 7), ANY_RECON, ValueError, ["recon", "B=4", "(6,)", "(4, 7)"]),
    ("recon", r(3, 5, 6), ANY_RECON, ValueError, ["recon", "B=4", "(6,)", "(3, 5, 6)"]),
    ("recon", r(2, 3, 4, 6), ANY_RECON, ValueError, ["recon", "[K, B, *event]", "(2, 3, 4, 6)"]),
    ("recon", r(6), ANY_RECON, ValueError, ["recon", "(6,)"]),
    ("recon", r(0, 4, 6), ANY_RECON, ValueError, ["recon", "K=0", "(0, 4, 6)"]),
    ("recon", torch.ones(3, 4, 6, dtype=torch.int64), ANY_LIKELIHOOD, TypeError, ["recon", "float32", "int64"]),
    ("recon", torch.ones(3, 4, 6, dtype=torch.int64), ("bernoulli_log_prob",), TypeError, ["logits", "int64"]),
    ("recon", torch.ones(3, 4, 6, dtype=torch.int64), ("gaussian_log_prob",), TypeError, ["mean", "int64"]),
    ("recon", r(3, 4, 6).to(torch.complex64), ANY_LIKELIHOOD, TypeError, ["recon", "float32"]),
    ("recon", "logits", ANY_LIKELIHOOD, TypeError, ["recon", "str"]),
    ("recon", (r(3, 4, 6),), ANY_LIKELIHOOD, TypeError, ["recon", "two to four tensors"]),
    ("recon", (r(3, 4, 6), 1.0), ANY_LIKELIHOOD, TypeError, ["recon", "two to four tensors"]),
    ("recon", (r(3, 4, 6), r(3, 4, 6)), ANY_LIKELIHOOD, ValueError, ["recon", "bernoulli", "pair"]),
    ("recon", (r(3, 4, 6), r(3, 4, 5)), ANY_LIKELIHOOD, ValueError, ["second", "recon", "(3, 4, 6)", "(3, 4, 5)"]),
    ("recon", (), ANY_LIKELIHOOD, TypeError, ["recon", "two to four tensors"]),
    ("recon", (r(3, 4, 6),) * 4, ANY_LIKELIHOOD, ValueError, ["recon", "bernoulli", "four tensors"]),
    ("recon", (r(3, 4, 6),) * 5, ANY_LIKELIHOOD, TypeError, ["recon", "two to four tensors"]),
    ("recon", (r(3, 4, 6),) * 3, ANY_LIKELIHOOD, ValueError, ["recon", "bernoulli", "three tensors"]),
    ("recon", (r(3, 4, 6), r(6), r(3, 4, 5)), ANY_LIKELIHOOD, ValueError, ["third", "recon", "(3, 4, 6)", "(3, 4, 5)"]),
    ("x", torch.ones(4, 6, dtype=torch.int64), ANY_RECON, TypeError, ["x", "uint8", "bool", "int64"]),
    ("x", torch.rand(4, 6, dtype=torch.float64), ANY_RECON, TypeError, ["x", "float64", "recon", "float32"]),
    ("x", torch.tensor(0.5), ANY_RECON, ValueError, ["x", "[B, *event]", "0-d"]),
    ("mask", torch.ones(4, 5), ANY_RECON, ValueError, ["mask", "(4, 6)", "(4, 5)"]),
    ("mask", torch.ones(3, 4, 6), ANY_RECON, ValueError, ["mask", "(4, 6)", "(3, 4, 6)"]),
    ("mask", torch.ones(4, 6, dtype=torch.int64), ANY_RECON, TypeError, ["mask", "bool", "int64"]),
    ("mask", torch.ones(4, 6, requires_grad=True), ANY_RECON, ValueError, ["mask", "requires_grad"]),
    ("mask", torch.ones(1, 6, requires_grad=True), ANY_RECON, ValueError, ["mask", "requires_grad"]),
    (
        "likelihood",
        "cauchy",
        ANY_LIKELIHOOD,
        ValueError,
        ["likelihood", '"cauchy"', *fastelbo.build_info()["likelihoods"]],
    ),
    ("likelihood", "Bernoulli", ANY_LIKELIHOOD, ValueError, ["likelihood", '"Bernoulli"', '"bernoulli"']),
    ("likelihood", "", ANY_LIKELIHOOD, ValueError, ["likelihood", '""']),
    ("reduction", "avg", ANY_LOSS, ValueError, ["reduction", '"mean"', '"sum"', '"none"', '"avg"']),
    ("logvar", r(3, 4, 5), ("gaussian_log_prob",), ValueError, ["logvar", "(3, 4, 6)", "(3, 4, 5)"]),
    ("logvar", r(3, 4, 6).double(), ("gaussian_log_prob",), TypeError, ["float64", "float32"]),
    ("mu", r(5, 5), ("elbo_loss",), ValueError, ["mu", "B=4", "(5, 5)"]),
    ("mu", r(4, 5).double(), ("elbo_loss",), TypeError, ["mu", "float64", "float32"]),
    ("mu", torch.tensor(1.0), ("gaussian_kl", "rsample", "elbo_loss"), ValueError, ["mu", "[B, *latent]"]),
    ("mu", torch.ones(4, 5, dtype=torch.int64), ("gaussian_kl", "rsample", "elbo_loss"), TypeError, ["mu", "int64"]),
    ("logvar", r(4, 6), ("gaussian_kl", "rsample", "elbo_loss"), ValueError, ["logvar", "(4, 5)", "(4, 6)"]),
    ("logvar", r(4, 1), ("gaussian_kl", "rsample", "elbo_loss"), ValueError, ["logvar", "(4, 5)", "(4, 1)"]),
    ("logvar", r(4, 5).double(), ("gaussian_kl", "rsample", "elbo_loss"), TypeError, ["logvar", "float64", "mu"]),
    ("prior_mu", r(4, 6), ("gaussian_kl", "rsample"), ValueError, ["prior_mu", "(4, 5)", "(4, 6)"]),
    ("prior_logvar", r(2, 4, 5), ("gaussian_kl", "rsample"), ValueError, ["prior_logvar", "(4, 5)", "(2, 4, 5)"]),
    ("prior_mu", r(4, 5).double(), ("gaussian_kl", "rsample"), TypeError, ["prior_mu", "float64", "mu"]),
    ("prior_mu", r(2), ("gaussian_kl", "rsample", "elbo_loss"), ValueError, ["prior_mu", "(4, 5)", "(2,)"]),
    ("free_bits", -0.1, ("gaussian_kl", "elbo_loss"), ValueError, ["free_bits", "-0.1"]),
    ("free_bits", float("nan"), ("gaussian_kl", "elbo_loss"), ValueError, ["free_bits", "nan"]),
    ("beta", torch.ones(4), ("elbo_loss",), ValueError, ["beta", "(5,)", "one latent", "(4,)"]),
    ("beta", torch.tensor(1), ("elbo_loss",), TypeError, ["beta", "float32", "int64"]),
    ("beta", torch.ones(2), ("bound_loss", "multi_sample_loss"), ValueError, ["beta", "0-d", "(2,)"]),
    ("alpha", torch.ones(4), ("bound_loss", "multi_sample_loss"), ValueError, ["alpha", "0-d", "(4,)"]),
    ("alpha", torch.tensor(1), ("bound_loss", "multi_sample_loss"), TypeError, ["alpha", "float32", "int64"]),
    ("alpha", "1", ("bound_loss", "multi_sample_loss"), TypeError, ["alpha", "a float or a 0-d tensor", "str"]),
    ("estimator", "iwea", ("bound_loss", "multi_sample_loss"), ValueError, ["estimator", "'iwea'", "dreg", "ciwae"]),
    ("log_ratio", r(4, 3), ("iwae_loss",), ValueError, ["log_ratio", "(3, 4)", "(4, 3)"]),
    ("log_ratio", r(4), ("iwae_loss",), ValueError, ["log_ratio", "(3, 4)", "(4,)"]),
    ("log_ratio", r(3, 4).double(), ("iwae_loss",), TypeError, ["log_ratio", "float64", "float32"]),
    ("recon", r(4, 6), ("iwae_loss",), ValueError, ["recon", "[K, B, *event]", "(4, 6)"]),
    ("seed", torch.tensor([1, 2]), ("rsample",), ValueError, ["seed", "one", "(2,)"]),
    ("seed", torch.tensor([1.0]), ("rsample",), TypeError, ["seed", "int64", "float32"]),
    ("seed", torch.tensor([1], dtype=torch.int32), ("rsample",), TypeError, ["seed", "int64"]),
    ("num_samples", 0, ("rsample", "rsample eps"), ValueError, ["num_samples", "0"]),
    ("num_samples", -2, ("rsample",), ValueError, ["num_samples", "-2"]),
    ("num_samples", 2, ("rsample eps",), ValueError, ["eps", "(2, 4, 5)", "(3, 4, 5)"]),
    ("num_samples", None, ("rsample eps",), ValueError, ["eps", "(4, 5)", "(3, 4, 5)"]),
    ("eps", r(4, 5), ("rsample eps",), ValueError, ["eps", "(3, 4, 5)", "(4, 5)"]),
    ("eps", r(3, 4, 5).double(), ("rsample eps",), TypeError, ["eps", "float64"]),
    ("first_sample", -1, ("rsample",), ValueError, ["first_sample", "-1"]),
    ("first_sample", 2**61, ("rsample",), ValueError, ["first_sample", str(2**63 // 20 - 3), str(2**61)]),
    ("first_sample", 2**63, ("rsample",), ValueError, ["first_sample", "int64", str(2**63)]),
    ("seed", 2**63, ("rsample",), ValueError, ["seed", "int64", str(2**63)]),
    ("seed", -(2**63) - 1, ("rsample",), ValueError, ["seed", "int64"]),
    ("z", torch.tensor(1.0), ("mixture_log_prob",), ValueError, ["z", "0-d"]),
    ("z", r(4, 3), ("mixture_log_prob",), ValueError, ["mu", "[C, M]", "M=3", "(2, 5)"]),
    ("z", r(4, 5).double(), ("mixture_log_prob",), TypeError, ["mu", "float32", "z", "float64"]),
    ("mu", r(5), ("mixture_log_prob",), ValueError, ["mu", "[C, M]", "(5,)"]),
    ("mu", r(0, 5), ("mixture_log_prob",), ValueError, ["mu", "at least one component", "(0, 5)"]),
    ("logvar", r(3, 5), ("mixture_log_prob",), ValueError, ["logvar", "(2, 5)", "(3, 5)"]),
    ("log_weights", r(3), ("mixture_log_prob",), ValueError, ["log_weights", "(4, 2)", "C=2", "(3,)"]),
    ("log_weights", r(3, 2), ("mixture_log_prob",), ValueError, ["log_weights", "(4, 2)", "(3, 2)"]),
    ("log_weights", r(2, 4, 2), ("mixture_log_prob",), ValueError, ["log_weights", "(4, 2)", "(2, 4, 2)"]),
    ("log_weights", r(3, 1), ("mixture_log_prob",), ValueError, ["log_weights", "(4, 1)", "(3, 1)"]),
    ("log_weights", r(2).double(), ("mixture_log_prob",), TypeError, ["log_weights", "float64", "z", "float32"]),
    ("log_weights", r(4, 1).double(), ("mixture_log_prob",), TypeError, ["log_weights", "float64", "z", "float32"]),
    ("log_w", torch.tensor(1.0), ("log_mean_exp",), ValueError, ["log_w", "0-d"]),
    ("log_w", torch.ones(3, 4, dtype=torch.int64), ("log_mean_exp",), TypeError, ["log_w", "int64"]),
    ("log_w", r(0, 4), ("log_mean_exp",), ValueError, ["log_w", "(0, 4)"]),
    ("dim", 2, ("log_mean_exp",), IndexError, ["dim", "2", "(3, 4)"]),
    ("dim", -3, ("log_mean_exp",), IndexError, ["dim", "-3", "(3, 4)"]),
]


def spoiled(call: str, argument: str, value: object) -> tuple[Callable[..., object], dict[str, object]]:
    """The function, and its good arguments but one."""
    name, _, noise = call.partition(" ")
    function, good = public()[name]
    if noise:
        good = {**good, "eps": r(3, 4, 5)}
    if argument == "recon":
        argument = next(iter(good))  # whatever the function calls its first
    if argument == "mu":  # the other has its shape
        good = {**good, "logvar": value}
    return function, {**good, argument: value}


@pytest.mark.parametrize(
    ("argument", "value", "call", "error", "says"),
    [
        pytest.param(argument, value, call, error, says, id=f"{call}-{argument}-{i}")
        for i, (argument, value, calls, error, says) in enumerate(CASES)
        for call in calls
    ],
)
@pytest.mark.parametrize("path", [nullcontext, fastelbo.reference_mode], ids=["op", "twin"])
def test_bad_argument(path, argument, value, call, error, says):
    """Whichever path serves the call."""
    function, arguments = spoiled(call, argument, value)
    with path(), pytest.raises(error) as caught:
        function(**arguments)
    message = str(caught.value)
    assert all(word in message for word in says), f"{says} in: {message}"
    assert message.splitlines()[0], "the first line says it"


WORDS = ("no tensor", "one tensor", "a pair", "three tensors", "four tensors", "more than four")


@pytest.mark.parametrize("row", fastelbo.likelihoods.LIKELIHOODS.items(), ids=lambda row: row[0])
@pytest.mark.parametrize("op", ["log_prob", "elbo_loss", "multi_sample_loss"])
@pytest.mark.parametrize("count", range(7))
def test_ops_take_the_parameters_of_the_likelihood(op, row, count):
    """Four is what an op has gradients for; every likelihood has its own number."""
    name, likelihood = row
    first, t = r(3, 4, 6), torch.zeros(4, 6)
    rest = {
        "log_prob": (t, None, name),
        "elbo_loss": (t, t, t, *[None] * 5, name, "mean"),
        "multi_sample_loss": (t, first[:, :, 0], *[None] * 4, 1, [1.0, 0.0, 1.0], name, "mean"),
    }[op]
    call = getattr(torch.ops.fastelbo, op)
    if likelihood.fewest <= count <= len(likelihood.parameters):
        found = call([first.sigmoid()] * count, *rest)
        assert (found if op == "log_prob" else found[1]).shape == (3, 4)
        return
    with pytest.raises(ValueError) as caught:
        call([first] * count, *rest)
    message = str(caught.value)
    assert message.startswith("recon must be ") and f'for likelihood "{name}"; got ' in message
    assert all(p in message for p in likelihood.parameters) or likelihood.parameters[1:] == ()
    assert message.splitlines()[0].endswith(f"; got {WORDS[min(count, len(WORDS) - 1)]}")


@pytest.mark.parametrize("call", ["elbo_loss", "iwae_loss", "rsample", "gaussian_kl"])
def test_bad_arguments_are_refused_for_meta_tensors_too(call):
    function, good = public()[call]
    good = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in good.items()}
    function(**good)
    wrong = "log_ratio" if call == "iwae_loss" else "logvar"
    with pytest.raises(ValueError, match=r"\(4, 9\)"):
        function(**{**good, wrong: r(4, 9).to("meta")})


def test_noise_comes_from_one_place():
    mu = r(4, 5)
    for options in (
        {"seed": 1, "generator": torch.Generator()},
        {"seed": 1, "eps": r(4, 5)},
        {"generator": torch.Generator(), "eps": r(4, 5)},
    ):
        with pytest.raises(ValueError, match="exclude each other"):
            fastelbo.rsample(mu, mu, **options)


@pytest.mark.parametrize("path", [nullcontext, fastelbo.reference_mode], ids=["op", "twin"])
@pytest.mark.parametrize(
    "options, error, message",
    [
        ({}, ValueError, "kept takes the seed .*: give seed"),
        ({"generator": torch.Generator()}, ValueError, "kept takes the seed .*: give seed"),
        ({"seed": 1, "num_samples": 3}, ValueError, "kept takes the seed .* and no num_samples"),
        ({"eps": torch.zeros(4, 5)}, ValueError, r"eps and seed \(or generator, or kept\) exclude each other"),
        ({"seed": 1, "batch_dims": 2}, ValueError, "kept None with batch_dims=2"),
        ({"seed": 1, "kept": (1, 2, 3)}, TypeError, "kept must be a Kept .*sample, datum, scale; got tuple"),
        (
            {"seed": 1, "datum": torch.tensor([0, 1])},
            ValueError,
            r"datum must have the shape \(3,\) of sample; got \(2,\)",
        ),
        ({"seed": 1, "datum": torch.zeros(3)}, TypeError, "datum must be int64; got float32"),
        ({"seed": 1, "sample": torch.zeros(3).int()}, TypeError, "sample must be int64; got int32"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_kept_samples_come_from_their_seed(path, options, error, message):
    kept = fastelbo.Kept(torch.tensor([2, 0, 1]), torch.tensor([3, 0, 3]), torch.ones(3))
    kept = kept._replace(**{name: options[name] for name in ("sample", "datum") if name in options})
    options = {"kept": kept, **{name: v for name, v in options.items() if name not in ("sample", "datum")}}
    with path(), pytest.raises(error, match=message):
        fastelbo.rsample(r(4, 5), r(4, 5), **options)


def test_tensors_on_different_devices():
    mu, meta = r(4, 5), r(4, 5).to("meta")
    with pytest.raises(ValueError, match=r"logvar must be on cpu like mu; got meta"):
        fastelbo.gaussian_kl(mu, meta)
    with pytest.raises(ValueError, match=r"x must be on cpu like recon; got meta"):
        fastelbo.bernoulli_log_prob(mu, meta)
