"""K-sample bounds of which a few samples are back-propagated: the gradient stays unbiased given the weights.

A few of K importance weights carry nearly all of the sum, so most of the gradient of a decoder that runs K times is
spent on samples that count for nothing. Here the decoder runs without a graph over all K, which gives the bound and
every weight, and with a graph over n = keep * B of the K * B samples, chosen by weight: `keep_samples`. Their noise is
drawn again from the seed (`rsample`), so that neither z nor recon of all K samples exists at once.

Every estimator's gradient is a sum over samples with coefficients that depend on the log weights alone
(csrc/math/estimator.h), and all three are 0 where a is. So one selection, in proportion to a, serves them all.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastelbo import estimators, reference
from fastelbo._internal import arguments
from fastelbo._internal.arguments import checked
from fastelbo._internal.ops import call
from fastelbo._internal.ordered import ordered_sum, reduce
from fastelbo.losses.inputs import bound_numbers
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
    numbers = bound_numbers(row, log_w)
    return Weights(*call(_op._multi_sample_weights.default, reference.multi_sample_weights, log_w, *numbers, False)[:3])


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


def _shape_of(log_w: Tensor) -> tuple[int, int]:
    if log_w.dim() != 2:
        raise ValueError(f"log_w must be [K, B]; got {tuple(log_w.shape)}")
    K, B = log_w.shape
    return K, B


def _weights_of(log_w: Tensor, estimator: str, **options: Any) -> tuple[estimators.Estimator, Weights]:
    """An estimator by its name, and what it makes of log w [K, B]."""
    check_weighs(estimator)
    row = estimators.estimator(estimator, _shape_of(log_w)[0], **options)
    return row, weigh(log_w, row)


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
    K, B = _shape_of(log_w)
    if keep > K:
        raise ValueError(f"keep must be at most K={K} from log_w; got {keep}")
    if weights is None:
        weights = weigh(log_w, estimators.ESTIMATORS["iwae"].make()).a
    elif weights.shape != log_w.shape:
        raise ValueError(f"weights must have the shape {tuple(log_w.shape)} of log_w; got {tuple(weights.shape)}")
    if u is not None and generator is not None:
        raise ValueError("u and generator exclude each other: give one of them")
    device, dtype = weights.device, reference.noise_dtype(weights.device)
    n, w = keep * B, weights.to(dtype).abs().mT.reshape(-1)  # datum by datum: each has its share, or one more
    if u is None:
        u = drawn_once(lambda: torch.rand((), dtype=dtype, device=device, generator=generator))
    if n == 0:
        empty = torch.empty(0, dtype=torch.int64, device=device)
        return Kept(empty, empty, empty.to(dtype))
    largest, order = w.topk(n)
    slot, left = torch.arange(n, device=device), torch.arange(n, 0, -1, device=device)
    # of each place in descending order, the sum of the weights from there on; the smallest are added first
    others = ordered_sum(w.scatter(0, order, 0.0), 0).reshape(1)
    tail = torch.cat([largest, others]).flip(0).cumsum(0).flip(0)
    sure = ((largest > 0) & (largest * left >= tail[:n])).sum(0, keepdim=True)  # with w >= c
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


class _Loss(torch.autograd.Function):
    """The loss [B] as it is. The gradient of each row [n] is minus that of its datum; that of gates is the factors."""

    @staticmethod
    def forward(loss: Tensor, rows: Tensor, gates: Tensor | None, factors: Tensor, datum: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.gated = inputs[2] is not None
        ctx.save_for_backward(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "the gradient through kept samples has no graph (create_graph=True, torch.func): the weights of all "
                "samples, on which it depends, have none; leave keep out"
            )
        factors, datum = ctx.saved_tensors
        return None, -grad.index_select(0, datum), factors if ctx.gated else None, None, None


def loss_of(
    log_likelihood: Tensor, posterior: Posterior, kept: Kept, weights: Weights, row: estimators.Estimator
) -> Tensor:
    """Minus the bound of all samples [B]; its gradient goes through the kept ones."""
    at, dtype = kept.sample * weights.bound.shape[0] + kept.datum, log_likelihood.dtype
    coefficients = (kept.scale * weights.a.flatten().index_select(0, at)).to(dtype)
    factors = weights.gates.flatten(1).index_select(1, at).to(posterior.log_ratio.dtype)
    loss: Tensor = _Loss.apply(  # type: ignore[no-untyped-call]
        -weights.bound.to(dtype),
        coefficients * (log_likelihood + posterior.log_ratio),
        None if row.is_gradient else posterior.gates,
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
    row, weights = _weights_of(log_w, estimator, alpha=alpha, beta=beta, groups=groups)
    n = kept.sample.shape[0]
    if log_likelihood.shape != (n,):
        raise ValueError(f"log_likelihood must be [n] with n={n} from kept; got {tuple(log_likelihood.shape)}")
    if posterior.log_ratio.shape != (n,):
        raise ValueError(
            f"posterior must be of the kept samples, log_ratio [n] with n={n}: draw it with rsample; "
            f"got log_ratio {tuple(posterior.log_ratio.shape)}"
        )
    return reduce(loss_of(log_likelihood, posterior, kept, weights, row), reduction)


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
    return _weights_of(log_w, estimator, alpha=alpha, beta=beta, groups=groups)[1].a


class AutoKeep:
    """What pickles of earlier versions hold of keep="auto", which is no more; nothing reads it."""
