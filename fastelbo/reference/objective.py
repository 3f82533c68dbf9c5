"""The losses."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastelbo.reference.derivatives import backward_of, with_gradients
from fastelbo.reference.latent import gaussian_kl
from fastelbo.reference.likelihood import compute_dtype, log_prob


def log_mean_exp(log_w: Tensor, dim: int = 0) -> Tensor:
    """log (1/K) sum_k exp(log w_k) along dim; where every weight is -inf the value is -inf and the gradient 0."""
    log_w = log_w.to(compute_dtype(log_w))
    top = log_w.detach().amax(dim, keepdim=True)
    empty = top == -torch.inf
    safe = torch.where(empty, 0.0, log_w)
    total = torch.logsumexp(safe, dim, keepdim=True) - math.log(log_w.shape[dim])
    return torch.where(empty, -torch.inf, total).squeeze(dim)


log_mean_exp_backward = backward_of(log_mean_exp, ("log_w",))


def reduce(loss: Tensor, reduction: str) -> Tensor:
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss


@with_gradients("parameters", "mu", "logvar", "prior_mu", "prior_logvar")
def elbo_loss(
    parameters: Sequence[Tensor],
    x: Tensor,
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    mask: Tensor | None = None,
    beta: Tensor | None = None,
    free_bits: Tensor | None = None,
    likelihood: str = "bernoulli",
    reduction: str = "mean",
) -> tuple[Tensor, ...]:
    """-(mean_k log p(x | z_k) - beta KL) reduced over B; also log p [K?, B] and KL [B], this one without free bits."""
    log_likelihood = log_prob(parameters, x, mask, likelihood)
    kl = gaussian_kl(mu, logvar, prior_mu, prior_logvar)
    weight = kl.new_ones(()) if beta is None else beta.to(kl)
    # a weight of 0 leaves nothing of an infinite KL, nor a gradient: 0 times infinity is NaN, so the latents are
    # replaced before the maths
    lost = ((weight == 0) & kl.isinf()).reshape(kl.shape + (1,) * (mu.dim() - 1))
    latents = [
        None if t is None else torch.where(lost, 0.0, t.to(kl.dtype)) for t in (mu, logvar, prior_mu, prior_logvar)
    ]
    penalty = gaussian_kl(*latents, free_bits)  # type: ignore[arg-type, call-arg]
    fit = log_likelihood.mean(0) if log_likelihood.dim() == 2 else log_likelihood
    return reduce(weight * penalty - fit, reduction), log_likelihood, kl


def scale_(t: Tensor, factor: Tensor) -> None:
    """t times a factor, in place."""
    t.mul_(factor)


def _series(u: Tensor, coefficients: Sequence[float]) -> Tensor:
    total = torch.zeros_like(u)
    for c in reversed(coefficients):
        total = total * u + c
    return total


def _renyi(log_w: Tensor, t: float | Tensor) -> Tensor:
    """1/t log mean_k w_k^t of [groups, k, B], t = 0 by continuity: smooth there, with its derivatives of every order.

    With d = log w - c, c the mean of log w: c + log mean exp(t d) / t, and mean exp(t d) = 1 + t^2 mean d^2 f(t d),
    where f(u) = (exp(u) - 1 - u) / u^2 and log(1 + y) / y are series as long as no |t d| is above 1/2.
    """
    if isinstance(t, float) and t == 1.0:
        return log_mean_exp(log_w, 1)
    center = log_w.mean(1, keepdim=True)
    near = ((t * (log_w - center)).detach().abs().amax(1) < 0.5).detach()
    d = torch.where(near.unsqueeze(1), log_w - center, 0.0)
    q = (d.square() * _series(t * d, [1 / math.factorial(n + 2) for n in range(18)])).mean(1)
    y = t * t * q
    closed = torch.log1p(torch.where(y < 0.02, 1.0, y)) / torch.where(y < 0.02, 1.0, y)
    ratio = torch.where(y < 0.02, _series(y, [(-1) ** n / (n + 1) for n in range(10)]), closed)
    zero = torch.as_tensor(t == 0)
    safe = torch.where(zero, 1.0, t)
    far = torch.where(zero, center.squeeze(1), log_mean_exp(safe * log_w, 1) / safe)
    return torch.where(near, center.squeeze(1) + t * q * ratio, far)


def _grouped(log_w: Tensor, groups: int) -> Tensor:
    return torch.unflatten(log_w, 0, (groups, -1))


def bound(log_w: Tensor, elbo_weight: float | Tensor = 0.0, alpha: float | Tensor = 0.0, groups: int = 1) -> Tensor:
    """The bound of an estimator (see `fastelbo.estimators`): [K, B] -> [B]."""
    if isinstance(elbo_weight, float) and elbo_weight in (0.0, 1.0):  # then -inf does not meet a weight of 0
        return log_w.mean(0) if elbo_weight else _renyi(_grouped(log_w, groups), 1 - alpha).mean(0)
    renyi = _renyi(_grouped(log_w, groups), 1 - alpha).mean(0)
    mean = log_w.mean(0)
    mixed = elbo_weight * mean + (1 - elbo_weight) * renyi
    if isinstance(elbo_weight, Tensor):
        mixed = torch.where(elbo_weight == 0, torch.where(mean.isinf(), renyi, mixed), mixed)
    return mixed


def _slope(log_w: Tensor, t: float | Tensor) -> Tensor:
    """Of `_renyi` by t: mean_k v^2 f(t v), v = log w - 1/t log mean w^t, f(u) = (u exp(u) - exp(u) + 1) / u^2."""
    v = log_w - _renyi(log_w, t).unsqueeze(1)
    u = t * v
    small = u.abs() < 0.5
    near = _series(torch.where(small, u, 0.0), [1 / (math.factorial(n) * (n + 2)) for n in range(18)])
    far = torch.where(small, 1.0, u)
    closed = (far * torch.exp(far) - torch.expm1(far)) / far.square()
    return (v.square() * torch.where(small, near, closed)).mean(1)


class _Steered(torch.autograd.Function):
    """The identity on the loss; the "gradient" that it returns for `gates` is `factors`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(loss: Tensor, gates: Tensor, factors: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad, ctx.saved_tensors[0], None


def multi_sample_weights(
    log_w: Tensor,
    elbo_weight: Tensor | None,
    alpha: Tensor | None,
    groups: int,
    coefficients: Sequence[float],
    slopes: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The bound [B] of log w [K, B], its gradient a by log w [K, B], and the gates [2, K, B]: b / a - 1 and c / a - 1;
    on request its gradients by elbo_weight and alpha [2, B].

    The three coefficients are path, path_weight and score of `fastelbo.estimators.Estimator`.
    """
    path, path_weight, score = coefficients
    log_w = log_w.to(compute_dtype(log_w))
    weight = 0.0 if elbo_weight is None else elbo_weight.to(log_w)
    t = 1.0 if alpha is None else 1 - alpha.to(log_w)
    value = bound(log_w, weight, 1 - t, groups)
    grouped = _grouped(log_w, groups)
    tempered = grouped if alpha is None else torch.where(grouped.isinf() & (t == 0), 0.0, t * grouped)
    empty = tempered.detach().amax(1, keepdim=True) == -torch.inf
    softmax = torch.where(empty, 0.0, torch.softmax(torch.where(empty, 0.0, tempered), 1)).flatten(0, 1)
    if elbo_weight is not None:  # a weight of 1 leaves nothing of a softmax that is NaN
        softmax = torch.where(elbo_weight == 1, 0.0, softmax)
    weights = weight / log_w.shape[0] + (1 - weight) / groups * softmax
    for_path = torch.full_like(log_w, path - 1)
    if path_weight != 0:  # else the weights count for nothing: they may be NaN
        for_path = for_path + path_weight * weights
    gates = torch.stack([for_path, torch.full_like(log_w, score - 1)])
    if not slopes:
        return value, weights, gates, None
    by_weight = log_w.mean(0) - _renyi(grouped, t).mean(0)
    return value, weights, gates, torch.stack([by_weight, (weight - 1) * _slope(grouped, t).mean(0)])


def minus_bound(
    log_w: Tensor,
    gates: Tensor | None,
    elbo_weight: Tensor | None,
    alpha: Tensor | None,
    groups: int,
    coefficients: Sequence[float],
) -> Tensor:
    """Minus the bound [B] of log w [K, B] of an estimator (see `fastelbo.estimators`)."""
    value, _, factors, _ = multi_sample_weights(log_w, elbo_weight, alpha, groups, coefficients)
    return -value if gates is None else _Steered.apply(-value, gates, factors.to(gates.dtype))  # type: ignore


@with_gradients("parameters", "log_ratio", "gates")
def multi_sample_loss(
    parameters: Sequence[Tensor],
    x: Tensor,
    log_ratio: Tensor,
    gates: Tensor | None,
    mask: Tensor | None,
    elbo_weight: Tensor | None,
    alpha: Tensor | None,
    groups: int,
    coefficients: Sequence[float],
    likelihood: str,
    reduction: str,
) -> tuple[Tensor, ...]:
    """Minus the bound of an estimator (see `fastelbo.estimators`) reduced over B; also log p [K, B]."""
    log_likelihood = log_prob(parameters, x, mask, likelihood)
    log_w = log_likelihood + log_ratio.to(log_likelihood.dtype)
    return reduce(minus_bound(log_w, gates, elbo_weight, alpha, groups, coefficients), reduction), log_likelihood
