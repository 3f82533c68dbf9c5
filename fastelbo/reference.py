"""Plain-PyTorch twins of every op, written from the formulas.

They are the oracle of the tests (in float64), the baseline of the benchmarks, the path taken under `torch.func`
transforms and on devices without kernels, and the derivative of the backward ops when a graph of the gradient is asked
for. Nothing here is fused; everything here is differentiable any number of times. Sizes: B batch, K samples, M latent
dimensions, D data dimensions (all event dimensions together). Everything is in nats.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

LOG_2 = math.log(2.0)
LOG_2PI = math.log(2.0 * math.pi)

# ---------------------------------------------------------------------------------------------------------------------
# Likelihoods: log p(x | recon) of one element. The names are those that the compiled library reports.


def _bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    """x l - softplus(l), l the logit."""
    return -F.binary_cross_entropy_with_logits(logits, x, reduction="none")


def _bernoulli_probs(x: Tensor, probs: Tensor) -> Tensor:
    """x log p + (1 - x) log(1 - p), each logarithm clamped at -100."""
    return -F.binary_cross_entropy(probs, x, reduction="none")


def _gaussian(x: Tensor, mean: Tensor, logvar: Tensor | None = None) -> Tensor:
    """-1/2 [(x - m)^2 exp(-lv) + lv + log 2 pi]; lv = 0 where it is not given."""
    square = (x - mean).square()
    return -0.5 * (square + LOG_2PI if logvar is None else square * torch.exp(-logvar) + logvar + LOG_2PI)


def _laplace(x: Tensor, mean: Tensor, log_scale: Tensor | None = None) -> Tensor:
    """-[|x - m| exp(-s) + s + log 2]; s = 0 where it is not given."""
    distance = (x - mean).abs()
    return -(distance + LOG_2 if log_scale is None else distance * torch.exp(-log_scale) + log_scale + LOG_2)


LIKELIHOODS: dict[str, Callable[..., Tensor]] = {  # of x and the parameters
    "bernoulli": _bernoulli,
    "bernoulli_probs": _bernoulli_probs,
    "gaussian": _gaussian,
    "laplace": _laplace,
}


def compute_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def read_data(x: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 is read as x / 255, bool as 0 and 1."""
    return x.to(dtype) / 255 if x.dtype == torch.uint8 else x.to(dtype)


def _sum_from(t: Tensor, dim: int) -> Tensor:
    """Sum over the dimensions from dim on; over none of them, t itself (torch's sum over no dimensions sums all)."""
    return t.sum(list(range(dim, t.dim()))) if t.dim() > dim else t


def log_prob(
    recon: Tensor,
    x: Tensor,
    second: Tensor | None = None,
    third: Tensor | None = None,
    mask: Tensor | None = None,
    likelihood: str = "bernoulli",
) -> Tensor:
    """log p(x | recon, second, third), summed over the event dimensions -> [K?, B].

    recon [K?, B, *event], x [B, *event]; second and third, where there are any: the shape of recon, [*event] or 0-d.
    """
    dtype = compute_dtype(recon)
    recon, x = recon.to(dtype), read_data(x, dtype)
    others = [t.to(dtype) for t in (second, third) if t is not None]
    weight = None
    if mask is not None:
        weight = mask.to(dtype).expand(x.shape)
        # a masked cell is replaced before the maths, so that its NaN reaches neither value nor gradient
        keep = weight != 0
        x = torch.where(keep, x, 0.5)
        recon = torch.where(keep, recon, 0.5)
        others = [torch.where(keep, t, 0.0) for t in others]
    terms = LIKELIHOODS[likelihood](x.expand(recon.shape), recon, *others)
    if weight is not None:
        terms = terms * weight
    return _sum_from(terms, recon.dim() - x.dim() + 1)


# ---------------------------------------------------------------------------------------------------------------------
# Latent: KL, noise, reparameterized samples.


# Terms of the series below: its second derivative, t^n / n! + ..., ends below half an ulp at |t| = 1.
_SERIES_TERMS = {torch.float32: 12, torch.float64: 19}


def exp_remainder(t: Tensor) -> Tensor:
    """exp(t) - 1 - t, by its series where the closed form cancels (|t| < 1); so are the derivatives of every order."""
    small = t.abs() < 1
    s = torch.where(small, t, 0.0)
    series = torch.zeros_like(s)
    for n in reversed(range(2, 2 + _SERIES_TERMS[t.dtype])):
        series = series * s + 1 / math.factorial(n)
    return torch.where(small, s * s * series, torch.exp(t) - (1 + t))


def kl_terms(mu: Tensor, logvar: Tensor, prior_mu: Tensor | None = None, prior_logvar: Tensor | None = None) -> Tensor:
    """1/2 [exp(t) - 1 - t + (mu - mu_p)^2 exp(-lv_p)], t = lv - lv_p: the KL of every latent dimension."""
    dtype = compute_dtype(mu)
    mu, logvar = mu.to(dtype), logvar.to(dtype)
    if prior_mu is not None:
        mu = mu - prior_mu.to(dtype)
    square = mu.square()
    if prior_logvar is not None:
        square = square * torch.exp(-prior_logvar.to(dtype))
        logvar = logvar - prior_logvar.to(dtype)
    return 0.5 * (square + exp_remainder(logvar))


def gaussian_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    free_bits: float | Tensor = 0.0,
) -> Tensor:
    """KL(N(mu, exp(lv)) || N(mu_p, exp(lv_p))), summed over the latent dimensions -> [B].

    With free bits (Kingma et al. 2016, eq. 15) a dimension whose batch mean is below lambda counts lambda in every
    datum, so that the mean over B is sum_j max(lambda, mean_b KL_bj).
    """
    terms = kl_terms(mu, logvar, prior_mu, prior_logvar)
    if isinstance(free_bits, Tensor) or free_bits > 0:
        terms = torch.where(terms.detach().mean(0) < free_bits, free_bits, terms)  # NaN is not below the floor
    return _sum_from(terms, 1)


def philox(seed: Tensor, count: int, offset: int = 0) -> Tensor:
    """Philox 4x32-10 (Salmon et al. 2011) of counters offset .. offset + count - 1 -> int64 [count, 4] in [0, 2^32)."""
    low = 0xFFFFFFFF
    index = torch.arange(offset, offset + count, dtype=torch.int64, device=seed.device)
    key0, key1 = seed.reshape(()) & low, (seed.reshape(()) >> 32) & low
    c0, c1, c2, c3 = index & low, index >> 32, torch.zeros_like(index), torch.zeros_like(index)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = ((p1 >> 32) & low) ^ c1 ^ key0, p1 & low, ((p0 >> 32) & low) ^ c3 ^ key1, p0 & low
        key0, key1 = (key0 + 0x9E3779B9) & low, (key1 + 0xBB67AE85) & low
    return torch.stack([c0, c1, c2, c3], 1)


def normal(seed: Tensor, shape: tuple[int, ...], offset: int = 0) -> Tensor:
    """Standard normal noise as a pure function of (seed, linear index + offset), in float64: Box-Muller on Philox.

    Element e takes number e mod 4 of counter e // 4; the words (a, b) of a pair give r cos t and r sin t with
    r = sqrt(-2 log((a + 1/2) 2^-32)), t = 2 pi b 2^-32.
    """
    count = math.prod(shape)
    first, last = offset // 4, (offset + count + 3) // 4
    words = philox(seed, last - first, first).to(torch.float64)
    # u near 1 is reached from its complement, which float64 holds exactly
    r = torch.sqrt(-2 * torch.log1p(-((2.0**32 - 0.5) - words[:, 0::2]) * 2.0**-32))
    t = words[:, 1::2] * (2 * math.pi * 2.0**-32)
    noise = torch.stack([r * torch.cos(t), r * torch.sin(t)], 2).flatten()
    return noise[offset - 4 * first :][:count].reshape(shape)


class _Gated(torch.autograd.Function):
    """The identity on z and log_ratio, with the output `gates`: zeros [2, K, B] (see csrc/math/estimator.h)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        z: Tensor, log_ratio: Tensor, mu: Tensor, logvar: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return z.clone(), log_ratio.clone(), log_ratio.new_zeros(2, *log_ratio.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        z, _, *parameters = inputs
        ctx.save_for_backward(z, *parameters)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor | None, grad_log_ratio: Tensor | None, gates: Tensor | None) -> Any:  # type: ignore[override]
        """The gates say by how much the path derivative and the score differ from those of the total derivative."""
        if gates is None:
            return grad_z, grad_log_ratio, None, None, None, None
        z, mu, logvar, prior_mu, prior_logvar = ctx.saved_tensors
        path, score = (g.reshape(g.shape + (1,) * (z.dim() - 2)) for g in gates)
        if grad_z is not None:
            grad_z = grad_z * (1 + path)
        if grad_log_ratio is None:
            return grad_z, None, None, None, None, None
        up = grad_log_ratio.reshape(path.shape)
        of_q = (z - mu) * torch.exp(-logvar)  # -d log q / dz
        of_p = (z if prior_mu is None else z - prior_mu) * (1 if prior_logvar is None else torch.exp(-prior_logvar))
        through_z = up * path * (of_q - of_p)
        grad_mu = -(up * score * of_q).sum(0)
        grad_logvar = 0.5 * (up * score * (1 - (z - mu) * of_q)).sum(0)
        through_z = through_z if grad_z is None else grad_z + through_z
        return through_z, grad_log_ratio, grad_mu, grad_logvar, None, None


def rsample(
    mu: Tensor,
    logvar: Tensor,
    num_samples: int | None = None,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    seed: Tensor | None = None,
    eps: Tensor | None = None,
    first_sample: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z = mu + exp(lv/2) eps [K?, B, *latent], its KL [B], log p(z) - log q(z | x) [K?, B], and gates [2, K, B]."""
    dtype = compute_dtype(mu)
    m, lv = mu.to(dtype), logvar.to(dtype)
    m_p = None if prior_mu is None else prior_mu.to(dtype)
    lv_p = None if prior_logvar is None else prior_logvar.to(dtype)
    if eps is None:
        assert seed is not None
        shape = (*(() if num_samples is None else (num_samples,)), *mu.shape)
        eps = normal(seed, shape, first_sample * mu.numel())
    e = eps.to(dtype)
    z = m + torch.exp(0.5 * lv) * e
    terms = -0.5 * (z if m_p is None else z - m_p).square()
    if lv_p is not None:
        terms = terms * torch.exp(-lv_p)
    terms = terms + 0.5 * e.square() + 0.5 * (lv if lv_p is None else lv - lv_p)
    log_ratio = _sum_from(terms, z.dim() - mu.dim() + 1)
    gates = log_ratio.new_empty(0) if num_samples is None else log_ratio.new_zeros(2, *log_ratio.shape)
    if num_samples is not None and forward_ad._current_level < 0:  # estimators have no forward-mode derivative
        z, log_ratio, gates = _Gated.apply(z, log_ratio, m, lv, m_p, lv_p)  # type: ignore[no-untyped-call]
    return z.to(mu.dtype), gaussian_kl(mu, logvar, prior_mu, prior_logvar), log_ratio, gates


# ---------------------------------------------------------------------------------------------------------------------
# Objectives.


def log_mean_exp(log_w: Tensor, dim: int = 0) -> Tensor:
    """log (1/K) sum_k exp(log w_k) along dim; where every weight is -inf the value is -inf and the gradient 0."""
    log_w = log_w.to(compute_dtype(log_w))
    top = log_w.detach().amax(dim, keepdim=True)
    empty = top == -torch.inf
    safe = torch.where(empty, 0.0, log_w)
    total = torch.logsumexp(safe, dim, keepdim=True) - math.log(log_w.shape[dim])
    return torch.where(empty, -torch.inf, total).squeeze(dim)


def reduce(loss: Tensor, reduction: str) -> Tensor:
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss


def elbo_loss(
    recon: Tensor,
    x: Tensor,
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    second: Tensor | None = None,
    third: Tensor | None = None,
    mask: Tensor | None = None,
    beta: float = 1.0,
    beta_tensor: Tensor | None = None,
    free_bits: float = 0.0,
    likelihood: str = "bernoulli",
    reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    """-(mean_k log p(x | z_k) - beta KL) reduced over B; also log p [K?, B] and KL [B], this one without free bits."""
    log_likelihood = log_prob(recon, x, second, third, mask, likelihood)
    kl = gaussian_kl(mu, logvar, prior_mu, prior_logvar)
    penalty = gaussian_kl(mu, logvar, prior_mu, prior_logvar, free_bits) if free_bits > 0 else kl
    fit = log_likelihood.mean(0) if recon.dim() > x.dim() else log_likelihood
    weight = beta if beta_tensor is None else beta_tensor.to(penalty.dtype)
    return reduce(weight * penalty - fit, reduction), log_likelihood, kl


def _temper(log_w: Tensor, alpha: float, groups: int) -> Tensor:
    """(1 - alpha) log w, by groups: [K, B] -> [groups, K / groups, B]."""
    tempered: Tensor = ((1 - alpha) * log_w).unflatten(0, (int(groups), -1))
    return tempered


def bound(log_w: Tensor, elbo_weight: float = 0.0, alpha: float = 0.0, groups: int = 1) -> Tensor:
    """The bound of an estimator (see `fastelbo.estimators`): [K, B] -> [B]."""
    if elbo_weight == 1:
        return log_w.mean(0)
    renyi = log_mean_exp(_temper(log_w, alpha, groups), 1).mean(0) / (1 - alpha)
    return renyi if elbo_weight == 0 else elbo_weight * log_w.mean(0) + (1 - elbo_weight) * renyi


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


def multi_sample_weights(log_w: Tensor, estimator: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """The bound [B] of log w [K, B], its gradient a by log w [K, B], and the gates [2, K, B]: b / a - 1 and c / a - 1.

    The six numbers of the estimator are those of `fastelbo.estimators.Estimator`.
    """
    elbo_weight, alpha, groups, path, path_weight, score = estimator
    log_w = log_w.to(compute_dtype(log_w))
    weights = torch.full_like(log_w, elbo_weight / log_w.shape[0])
    if elbo_weight != 1:
        tempered = _temper(log_w, alpha, int(groups))
        empty = tempered.detach().amax(1, keepdim=True) == -torch.inf
        softmax = torch.where(empty, 0.0, torch.softmax(torch.where(empty, 0.0, tempered), 1)).flatten(0, 1)
        weights = weights + (1 - elbo_weight) / groups * softmax
    for_path = torch.full_like(log_w, path - 1)
    if path_weight != 0:  # else the weights count for nothing: they may be NaN
        for_path = for_path + path_weight * weights
    gates = torch.stack([for_path, torch.full_like(log_w, score - 1)])
    return bound(log_w, elbo_weight, alpha, int(groups)), weights, gates


def multi_sample_loss(
    recon: Tensor,
    x: Tensor,
    log_ratio: Tensor,
    gates: Tensor | None,
    second: Tensor | None,
    third: Tensor | None,
    mask: Tensor | None,
    likelihood: str,
    estimator: Sequence[float],
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Minus the bound of an estimator (see `fastelbo.estimators`) reduced over B; also log p [K, B]."""
    log_likelihood = log_prob(recon, x, second, third, mask, likelihood)
    value, _, factors = multi_sample_weights(log_likelihood + log_ratio.to(log_likelihood.dtype), estimator)
    loss = reduce(-value, reduction)
    if gates is not None:
        loss = _Steered.apply(loss, gates, factors.to(gates.dtype))  # type: ignore[no-untyped-call]
    return loss, log_likelihood


# ---------------------------------------------------------------------------------------------------------------------
# Probabilistic PCA.


def ppca_factor(W: Tensor, log_sigma2: Tensor) -> tuple[Tensor, Tensor]:
    """Q [D, M] and R [M, M], upper, of [W; sigma I] = [Q; sigma R^-1] R: R'R = W'W + s2 I.

    A Cholesky factor of W'W + s2 I is the same but for signs, and loses twice the digits where that is ill-conditioned.
    """
    sigma = torch.exp(0.5 * log_sigma2)
    Q, R = torch.linalg.qr(torch.cat([W, sigma * torch.eye(W.shape[1], dtype=W.dtype, device=W.device)]))
    return Q[: len(W)], R


def ppca_log_prob(x: Tensor, W: Tensor, b: Tensor, log_sigma2: Tensor) -> Tensor:
    """log N(x; b, W W' + s2 I) -> [N], by the QR decomposition of [W; sigma I].

    r' C^-1 r = |r - W m|^2 / s2 + |m|^2, with r = x - b, m = R^-1 Q'r and W m = Q Q'r: unlike (|r|^2 - (W'r)' m) / s2
    it cancels nothing.
    """
    dtype = compute_dtype(W)
    W, log_s2 = W.to(dtype), log_sigma2.to(dtype)
    D, M = W.shape
    Q, R = ppca_factor(W, log_s2)
    r = read_data(x, dtype) - b.to(dtype)
    p = r @ Q
    m: Tensor = torch.linalg.solve_triangular(R, p.mT, upper=True).mT
    distance = ((r - p @ Q.mT) * torch.exp(-0.5 * log_s2)).square().sum(1) + m.square().sum(1)
    log_det = (D - M) * log_s2 + 2 * torch.log(torch.diagonal(R).abs()).sum()
    log_p: Tensor = -0.5 * (D * LOG_2PI + log_det + distance)
    return log_p


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives of the backward ops. When autograd is asked for a graph of the gradient (`create_graph=True`), the ops'
# backward is this vector-Jacobian product of the twin, built from differentiable operations.


def vjp(
    function: Callable[..., Any], inputs: list[Tensor | None], grads: list[Tensor | None], needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of sum_i <grads_i, function(*inputs)_i> for the inputs that need one, as a differentiable graph.

    Every input is made a new node of the graph first: two inputs may be the same tensor, or depend on each other.
    """

    def node(t: Tensor | None, need: bool) -> Tensor | None:
        if t is None or not (need or t.requires_grad):
            return t
        return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()

    with torch.enable_grad():
        nodes = [node(t, need) for t, need in zip(inputs, needs, strict=True)]
        outputs = function(*nodes)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
        wanted = [n for n, need in zip(nodes, needs, strict=True) if need and n is not None]
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            wanted,
            [g.to(o.dtype) for o, g in pairs],
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    results = iter(found)
    return [next(results) if need and n is not None else None for n, need in zip(nodes, needs, strict=True)]
