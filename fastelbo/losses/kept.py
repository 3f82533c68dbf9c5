"""K-sample bounds of which a few samples are back-propagated: the gradient stays unbiased given the weights.

A few of K importance weights carry nearly all of the sum, so most of the gradient of a decoder that runs K times is
spent on samples that count for nothing. Here the decoder runs without a graph over all K, which gives the bound and
every weight, and with a graph over n = keep * B of the K * B samples, chosen by weight: `keep_samples`. Their noise is
drawn again from the seed (`rsample`), so that neither z nor recon of all K samples exists at once.

Every estimator's gradient is a sum over samples with coefficients that depend on the log weights alone
(csrc/math/estimator.h), and all three are 0 where a is. So one selection, in proportion to a, serves them all.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm

from fastelbo import estimators, reference
from fastelbo._internal import arguments, domains
from fastelbo._internal.arguments import checked
from fastelbo._internal.ops import call
from fastelbo._internal.ordered import ordered_sum, reduce
from fastelbo.losses.sampling import Kept, Posterior, drawn_once

_op = torch.ops.fastelbo


class Weights(NamedTuple):
    """What a K-sample estimator makes of its log weights, in float64: see `fastelbo.estimators`."""

    bound: Tensor  # [B]
    a: Tensor  # [K, B]: of every log weight's gradient
    gates: Tensor  # [2, K, B]: b / a - 1 and c / a - 1


def weigh(log_w: Tensor, row: estimators.Estimator) -> Weights:
    """The bound, and the coefficients of the samples in its gradient, from log w [K, B]."""
    log_w = log_w.detach().to(reference.noise_dtype(log_w.device))
    numbers = [float(number) for number in row]
    return Weights(*call(_op._multi_sample_weights.default, reference.multi_sample_weights, log_w, numbers))


def check_weighs(estimator: str) -> None:
    """Refuse an estimator whose samples all weigh the same.

    Raises:
        ValueError: "elbo" or "stl".
    """
    if estimator in ("elbo", "stl"):
        raise ValueError(
            f"keep has no use with {estimator!r}: its samples all have the weight 1/K, so that a few of them, drawn "
            "alone, are as good; leave keep out and take a smaller num_samples"
        )


def row_of(estimator: str, num_samples: int, **options: float) -> estimators.Estimator:
    """The row of an estimator that keeps samples.

    Raises:
        ValueError: as in `estimators.estimator`; an estimator whose weights are all equal.
    """
    row = estimators.estimator(estimator, num_samples, **options)
    check_weighs(estimator)
    return row


def _from_each_on(largest: Tensor) -> Tensor:
    """Of weights [N] in descending order, their sums from each place on; the smallest are added first."""
    return largest.flip(0).cumsum(0).flip(0)


def _sure(largest: Tensor, tail: Tensor, n: int) -> Tensor:
    """How many are kept for sure, [1], if n are kept: w >= c, where all min(1, w / c) add up to n."""
    left = torch.arange(n, 0, -1, device=largest.device)
    return ((largest[:n] > 0) & (largest[:n] * left >= tail[:n])).sum(0, keepdim=True)


@torch.no_grad()
def select(
    weights: Tensor, keep: int, u: float | Tensor | None = None, generator: torch.Generator | None = None
) -> Kept:
    """`keep_samples` by weights [K, B]."""
    K, B = weights.shape
    device, dtype = weights.device, reference.noise_dtype(weights.device)
    n, w = keep * B, weights.to(dtype).abs().mT.reshape(-1)  # datum by datum: each has its share, or one more
    if u is None:
        u = drawn_once(lambda: torch.rand((), dtype=dtype, device=device, generator=generator))
    if n == 0:
        empty = torch.empty(0, dtype=torch.int64, device=device)
        return Kept(empty, empty, empty.to(dtype))
    largest, order = w.topk(n)
    tail = _from_each_on(torch.cat([largest, ordered_sum(w.scatter(0, order, 0.0), 0).reshape(1)]))
    sure, slot = _sure(largest, tail, n), torch.arange(n, device=device)
    # the others lie on a line, one behind the other, each as long as its weight; points of equal distance choose
    line = w.scatter(0, order, torch.where(slot < sure, 0.0, largest)).cumsum(0)
    total = line[-1:]
    distance = total / (n - sure)  # c
    points = (((slot - sure).to(dtype) + u) * distance).minimum(total * (1 - torch.finfo(dtype).eps / 2))
    found = torch.searchsorted(line, points, right=True).clamp(max=len(w) - 1)
    some = total > 0
    taken = torch.where(slot < sure, order, torch.where(some, found, order[:1]))
    scale = torch.where(slot < sure, 1.0, torch.where(some, distance / w[taken], 0.0)) + 0 * tail[:1]
    taken, at = taken.sort()
    return Kept(taken % K, taken // K, scale[at])


def _samples_of(log_w: Tensor) -> int:
    """K of log_w [K, B]."""
    if log_w.dim() != 2:
        raise ValueError(f"log_w must be [K, B]; got {tuple(log_w.shape)}")
    return log_w.shape[0]


@torch.no_grad()
@checked
def keep_samples(
    log_w: arguments.Floats,
    keep: arguments.Count,
    *,
    weights: arguments.Floats | None = None,
    u: arguments.Fraction | None = None,
    generator: arguments.Generator | None = None,
) -> Kept:
    """Choose n = keep * B of K * B samples by weight, so that sums over them are unbiased for sums over all.

    With w the weights, a sample is kept with probability pi = min(1, w / c), and c is such that these add up to n.
    Systematic sampling with one uniform number u keeps exactly n, in float64; a kept sample counts 1 / pi. So every
    sample with w >= c is kept and counts once, the others count c / w each, and
    sum_i scale_i w_i f_i over the kept samples has the expectation sum_kb w_kb f_kb for any f.

    Nothing waits for the device, and n depends on shapes alone. If fewer than n samples weigh anything, the rest are
    copies of the one of largest weight with scale 0. If a weight is NaN, so is every scale: the gradient is NaN.

    Args:
        log_w: [K, B], a floating dtype. Log importance weights.
        keep: samples per datum that are kept, on average over the data; 1 to K.
        weights: [K, B], in place of softmax_k(log w): what the samples count in your gradient, of which |.| is taken.
        u: in [0, 1), a float or a 0-d tensor; uniform if None, from `generator`.
        generator: the source of u; torch's default one if None.

    Returns:
        Kept(sample [n], datum [n], scale [n]): k and b of each, int64, in the order of the data, and 1 / pi, float64.

    Raises:
        ValueError, TypeError: shapes that do not fit, a keep that is not in 1 to K, both u and generator.

    Reference: Fearnhead & Clifford 2003, sec. 3 (the threshold); Madow 1949 (systematic sampling).
    """
    if keep > (K := _samples_of(log_w)):
        raise ValueError(f"keep must be at most K={K} from log_w; got {keep}")
    if weights is None:
        weights = weigh(log_w, estimators.ESTIMATORS["iwae"].make()).a
    elif weights.shape != log_w.shape:
        raise ValueError(f"weights must have the shape {tuple(log_w.shape)} of log_w; got {tuple(weights.shape)}")
    if u is not None and generator is not None:
        raise ValueError("u and generator exclude each other: give one of them")
    return select(weights, keep, u, generator)


class _Loss(torch.autograd.Function):
    """loss [B] as it is; its gradient by the log p and log ratios [n] of kept samples is -coefficients [n]."""

    @staticmethod
    def forward(
        loss: Tensor,
        log_likelihood: Tensor,
        log_ratio: Tensor,
        gates: Tensor | None,
        coefficients: Tensor,
        factors: Tensor,
        datum: Tensor,
    ) -> Tensor:
        return loss.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, log_likelihood, log_ratio, gates, *constants = inputs
        ctx.save_for_backward(*constants)
        ctx.dtypes = log_likelihood.dtype, log_ratio.dtype, None if gates is None else gates.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "the gradient through kept samples has no graph (create_graph=True): the weights of all samples, on "
                "which it depends, have none; leave keep out"
            )
        coefficients, factors, datum = ctx.saved_tensors
        rows = -grad.index_select(0, datum) * coefficients
        of_likelihood, of_ratio, of_gates = ctx.dtypes
        return (
            None,
            rows.to(of_likelihood),
            rows.to(of_ratio),
            None if of_gates is None else factors.to(of_gates),
            None,
            None,
            None,
        )


def loss_of(
    log_likelihood: Tensor, posterior: Posterior, kept: Kept, weights: Weights, row: estimators.Estimator
) -> Tensor:
    """Minus the bound of all samples [B]; its gradient goes through the kept ones."""
    at = kept.sample * weights.bound.shape[0] + kept.datum
    coefficients = kept.scale * weights.a.flatten().index_select(0, at)
    factors = weights.gates.flatten(1).index_select(1, at)
    gates = None if row.is_gradient else posterior.gates
    loss: Tensor = _Loss.apply(  # type: ignore[no-untyped-call]
        -weights.bound.to(log_likelihood.dtype),
        log_likelihood,
        posterior.log_ratio,
        gates,
        coefficients.to(log_likelihood.dtype),
        factors,
        kept.datum,
    )
    return loss


@checked
def kept_loss(
    log_likelihood: arguments.Floats,
    posterior: arguments.AnyPosterior,
    kept: arguments.AnyKept,
    log_w: arguments.Floats,
    *,
    estimator: arguments.Text = "iwae",
    alpha: arguments.Float = 0.0,
    beta: arguments.Float = 0.5,
    groups: arguments.Integer = 1,
    reduction: arguments.Reduction = "mean",
) -> Tensor:
    """Minus the K-sample bound of all samples, exactly; its gradient goes through the kept ones and is unbiased.

    The gradient is sum_i scale_i [a_i grad log p(x | z_i) + ...] over the kept samples, with the coefficients a, b, c
    that the estimator (see `multi_sample_loss`) has from all K log weights.

    Args:
        log_likelihood: [n]. log p(x | z) of the kept samples, with a graph: `log_prob(decoder(posterior.z),
            x[kept.datum], mask=mask[kept.datum])`.
        posterior: from `rsample`.
        kept: from `keep_samples`, with weights that are 0 only where the estimator's own are. Its default is best for
            "iwae", "dreg" and "rws"; for "vr", "ciwae" and "miwae" there is `estimator_weights`.
        log_w: [K, B]. log p(x | z) + log_ratio of all samples, without a graph.
        estimator, alpha, beta, groups: as in `multi_sample_loss`.
        reduction: "mean" (over B), "sum" or "none".

    Returns:
        A scalar, or [B] with reduction="none", in nats.

    Raises:
        ValueError, TypeError: unknown names, shapes that do not fit; "elbo" or "stl", whose weights are all equal.
        NotImplementedError: create_graph=True in the backward: the gradient depends on weights that have no graph.

    Note:
        "dreg" and "rws" scale the gradients that reach posterior.z and posterior.log_ratio; see `multi_sample_loss`.

    Reference: those of `multi_sample_loss`; Fearnhead & Clifford 2003 for the choice of samples.
    """
    row = row_of(estimator, _samples_of(log_w), alpha=alpha, beta=beta, groups=groups)
    n = kept.sample.shape[0]
    if log_likelihood.shape != (n,):
        raise ValueError(f"log_likelihood must be [n] with n={n} from kept; got {tuple(log_likelihood.shape)}")
    if posterior.log_ratio.shape != (n,):
        raise ValueError(
            f"posterior must be of the kept samples, log_ratio [n] with n={n}: draw it with rsample; "
            f"got log_ratio {tuple(posterior.log_ratio.shape)}"
        )
    return reduce(loss_of(log_likelihood, posterior, kept, weigh(log_w, row), row), reduction)


@torch.no_grad()
@checked
def estimator_weights(
    log_w: arguments.Floats,
    *,
    estimator: arguments.Text = "iwae",
    alpha: arguments.Float = 0.0,
    beta: arguments.Float = 0.5,
    groups: arguments.Integer = 1,
) -> Tensor:
    """What every sample counts in an estimator's gradient: a_kb = d bound_b / d log w_kb.

    For `keep_samples(log_w, keep, weights=...)`. Each column adds up to 1; the estimator's other two coefficients are
    0 where a is.

    Args:
        log_w: [K, B], a floating dtype. Log importance weights.
        estimator, alpha, beta, groups: as in `multi_sample_loss`.

    Returns:
        [K, B], float64.

    Raises:
        ValueError, TypeError: unknown names, shapes that do not fit; "elbo" or "stl", whose weights are all equal.

    Reference: those of `multi_sample_loss`.
    """
    return weigh(log_w, row_of(estimator, _samples_of(log_w), alpha=alpha, beta=beta, groups=groups)).a


def carrying(log_w: Tensor, share: float) -> Tensor:
    """Of log w [K, B], how many samples carry that share of the weight: the fewest whose weights reach it, [B]."""
    weights = torch.softmax(log_w.double(), 0).sort(0, descending=True).values
    return (weights.cumsum(0) < share).sum(0).clamp(max=len(log_w) - 1) + 1


# ---------------------------------------------------------------------------------------------------------------------
# What a model needs beyond the functions.


def _differs(module: nn.Module) -> str | None:
    """Why two runs of the module, without its children, differ; None where they do not."""
    if not module.training:
        return None
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "its mean and variance are those of the rows that it sees"
    hooks = module._forward_pre_hooks.values()
    if isinstance(module, nn.utils.parametrizations._SpectralNorm) or any(isinstance(h, SpectralNorm) for h in hooks):
        return "each run moves the vectors of its power iteration"
    drops = getattr(module, "p", 0.0) if isinstance(module, nn.modules.dropout._DropoutNd) else 0.0
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        drops = module.dropout
    if drops or isinstance(module, nn.RReLU):
        return "it draws noise of its own"
    return None


def check_repeats(decoder: nn.Module) -> None:
    """Refuse a decoder whose two runs, over all samples and over the kept ones, differ.

    Raises:
        ValueError: the module is named.
    """
    for name, module in decoder.named_modules(prefix="decoder"):
        if (why := _differs(module)) is not None:
            raise ValueError(
                f"keep runs the decoder twice, and two runs of {name}, a {type(module).__name__} in training mode, "
                f"differ: {why}; call model.{name}.eval(), take another module, or leave keep out"
            )


def check_runs(rows: Tensor, kept: Kept, log_likelihood: Tensor, recon: Tensor) -> None:
    """Refuse log p of the kept rows [n] that differs from that of all samples [K, B], where nothing waits for a device.

    More than half of the rows have to differ by more than a rounding may amount to: what the decoder does by itself
    changes them all.

    Raises:
        ValueError: with the change.
    """
    if not domains.readable(rows) or rows.numel() == 0:
        return
    rows = rows.detach()
    before = log_likelihood[kept.sample, kept.datum]
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else recon.dtype
    change = (rows - before).abs()
    allowed = max(3e-4, 2 * torch.finfo(dtype).eps)  # products of other numbers of rows are rounded in other ways
    if (change / (1 + before.abs())).median() > allowed:  # a median of NaN is NaN
        raise ValueError(
            f"keep runs the decoder twice, and its two runs differ: log p of the kept samples changed by "
            f"{change.median():.3g} nats; take out what draws noise, keeps a state or depends on the other rows, call "
            "model.decoder.eval(), or leave keep out"
        )


@contextmanager
def autocast_cache_off() -> Iterator[None]:
    """autocast keeps the half-precision copies of weights, those made without a graph for the pass with one, too."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


# keep="auto" takes one of these, so that shapes repeat; a run of all samples, of n more and the backward of these must
# be less work than the full gradient: K + 3 keep < 3 K with a backward of twice the work of a forward
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
SHARE = 0.05  # of the variance of the full gradient: what keeping fewer samples may add
INTERVAL = 32  # steps from one look at the weights to the next


def added_variance(weights: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Of weights [K, B], for every number of kept samples per datum, a bound of the variance that it adds: c times the
    mass of the weights below c, as a share of sum w^2. Both are of sum w f, for f of one variance, over the batch.
    """
    w = weights.flatten()
    largest = w.sort(descending=True).values
    tail = torch.cat([_from_each_on(largest), w.new_zeros(1)])
    added = []
    for keep in sizes:
        n = keep * weights.shape[1]
        sure = _sure(largest, tail, n)
        mass = tail.index_select(0, sure)
        added.append(mass * mass / (n - sure).clamp(min=1))
    return torch.cat(added) / ordered_sum(w.square(), 0)


class AutoKeep:
    """keep="auto" of one objective: the smallest of SIZES that adds at most SHARE of the variance; K if none does.

    The share is a running mean over every INTERVAL-th batch, read from the device once each time.
    """

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self.sizes = tuple(takewhile(lambda keep: 3 * keep < 2 * num_samples, SIZES))
        self.keep = self.sizes[-1] if self.sizes else num_samples
        self._steps, self._added = 0, [0.0] * len(self.sizes)

    def state_dict(self) -> dict[str, Any]:
        return {"keep": self.keep, "steps": self._steps, "added": self._added}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.keep, self._steps, self._added = int(state["keep"]), int(state["steps"]), list(state["added"])

    def due(self) -> bool:
        """Whether this step's weights are to be given to `update`; counts the steps. Compiled code has no steps."""
        if torch.compiler.is_compiling():
            return False
        self._steps += 1
        return bool(self.sizes) and self._steps % INTERVAL == 1

    def update(self, weights: Tensor) -> None:
        new = added_variance(weights, self.sizes).tolist()
        if all(share == share for share in new):  # NaN says nothing of the next batch
            first = self._steps == 1
            self._added = new if first else [(a + b) / 2 for a, b in zip(self._added, new, strict=True)]
        fits = (keep for keep, added in zip(self.sizes, self._added, strict=True) if added <= SHARE)
        self.keep = next(fits, self.num_samples)
