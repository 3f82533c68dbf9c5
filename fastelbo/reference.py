"""Plain-PyTorch twins of every op, written from the formulas.

The twin of the op `name` is `reference.name`; that of a private op `_name`, too, is `reference.name`. The twins are

- the truth that the tests compare the ops with, in float64;
- a baseline of the benchmarks;
- what runs under `torch.func` transforms, in forward-mode AD, and on devices without kernels;
- the derivative of the backward ops, where autograd is asked for a graph of the gradient.

Nothing here is fused, and everything here is differentiable any number of times. Sizes: B batch, K samples, M latent
dimensions, D data dimensions (all event dimensions together). Everything is in nats.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastelbo import likelihoods
from fastelbo.likelihoods import LOG_2PI, Domain, divided

# ---------------------------------------------------------------------------------------------------------------------
# Derivatives: the twins of the backward ops are vector-Jacobian products of their forward's twins.


def vjp(
    function: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
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


def _backward(twin: Callable[..., Any], inputs: Sequence[str], upstream: int = 1) -> Callable[..., Any]:
    """The twin of a backward op. Its arguments: the upstream gradients, those of `twin`, what the op's forward saved,
    and which of the `inputs` need a gradient. Its results: the gradients of the `inputs`, None where not needed.
    """
    names = list(signature(twin).parameters)

    def backward(*args: Any) -> Any:
        grads, values = args[:upstream], dict(zip(names, args[upstream:], strict=False))
        needs = args[-1] if isinstance(args[-1], list) else [True]
        found = vjp(
            lambda *nodes: twin(**(values | dict(zip(inputs, nodes, strict=True)))),
            [values[name] for name in inputs],
            grads,
            needs,
        )
        return found[0] if len(inputs) == 1 else tuple(found)

    return backward


def _with_gradients(twin: Callable[..., Any], inputs: Sequence[str]) -> Callable[..., Any]:
    """The twin of an op that returns a loss, its parts, and the gradients of the loss by those `inputs` that need one.
    The arguments are those of `twin`, and which of the `inputs` need a gradient."""
    names = list(signature(twin).parameters)

    def forward(*args: Any) -> Any:
        *arguments, needs = args
        values = dict(zip(names, arguments, strict=True))
        outputs = twin(*arguments)
        found = vjp(
            lambda *nodes: twin(**(values | dict(zip(inputs, nodes, strict=True))))[0],
            [values[name] for name in inputs],
            [torch.ones_like(outputs[0])],
            needs,
        )
        return (*outputs, *found)

    return forward


# ---------------------------------------------------------------------------------------------------------------------
# Likelihoods.


def compute_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


COUNTS = (torch.int16, torch.int32, torch.int64)  # dtypes of x that hold counts alone


def read_data(x: Tensor, dtype: torch.dtype, domain: Domain = "reals") -> Tensor:
    """x in the compute type: counts as they are; other data with bool as 0 and 1, and uint8 as x / 255.

    Raises:
        TypeError: bool for counts, or counts of 16 bits or more for other data.
    """
    if domain == "counts":
        if x.dtype == torch.bool:
            raise TypeError("x must be counts: a float type, uint8, int16, int32 or int64; got bool")
        return x.to(dtype)
    if x.dtype in COUNTS:
        found = str(x.dtype).removeprefix("torch.")
        raise TypeError(f"x must be a float type, uint8 (read as x / 255) or bool; got {found}")
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
    dtype, row = compute_dtype(recon), likelihoods.get(likelihood)
    recon, x = recon.to(dtype), read_data(x, dtype, row.domain)
    others = [t.to(dtype) for t in (second, third) if t is not None]
    weight = None
    if mask is not None:
        weight = mask.to(dtype).expand(x.shape)
        # a masked cell is replaced before the maths, so that its NaN reaches neither value nor gradient
        keep = weight != 0
        x = torch.where(keep, x, 0.5)
        recon = torch.where(keep, recon, 0.5)
        others = [torch.where(keep, t, 0.0) for t in others]
    terms = row.log_prob(x.expand(recon.shape), recon, *others)
    if weight is not None:
        terms = terms * weight
    return _sum_from(terms, recon.dim() - x.dim() + 1)


log_prob_backward = _backward(log_prob, ("recon", "x", "second", "third"))

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
    if prior_logvar is not None:
        mu = divided(mu, 0.5 * prior_logvar.to(dtype))
        logvar = logvar - prior_logvar.to(dtype)
    return 0.5 * (mu.square() + exp_remainder(logvar))


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


gaussian_kl_backward = _backward(gaussian_kl, ("mu", "logvar", "prior_mu", "prior_logvar"))


def exports_to_onnx() -> bool:
    """Whether this is a trace of torch.onnx.export."""
    tracing = torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tracing and torch.onnx.is_in_onnx_export()  # the latter takes longer than all else that is asked here


def philox(seed: Tensor, index: Tensor) -> Tensor:
    """Philox 4x32-10 (Salmon et al. 2011) of the counters int64 [n] -> int64 [n, 4] in [0, 2^32)."""
    low = 0xFFFFFFFF
    key0, key1 = seed.reshape(()) & low, (seed.reshape(()) >> 32) & low
    c0, c1, c2, c3 = index & low, index >> 32, torch.zeros_like(index), torch.zeros_like(index)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = ((p1 >> 32) & low) ^ c1 ^ key0, p1 & low, ((p0 >> 32) & low) ^ c3 ^ key1, p0 & low
        key0, key1 = (key0 + 0x9E3779B9) & low, (key1 + 0xBB67AE85) & low
    return torch.stack([c0, c1, c2, c3], 1)


@cache
def _has_float64(device: torch.device) -> bool:
    try:
        torch.ones((), dtype=torch.float64, device=device).log()
    except (RuntimeError, TypeError):
        return False
    return True


def noise_dtype(device: torch.device) -> torch.dtype:
    """The type in which `normal` computes: float64, or float32 on a device that has no float64."""
    return torch.float64 if device.type in ("cpu", "cuda", "meta") or _has_float64(device) else torch.float32


def normal(seed: Tensor, shape: tuple[int, ...], offset: int = 0) -> Tensor:
    """Standard normal noise, a pure function of (seed, linear index + offset): Box-Muller on Philox, in `noise_dtype`.

    Element e takes number e mod 4 of counter e // 4; the words (a, b) of a pair give r cos t and r sin t with
    r = sqrt(-2 log u), u = (a + 1/2) 2^-32, and t = 2 pi b 2^-32.
    """
    count = math.prod(shape)
    first, last = offset // 4, (offset + count + 3) // 4
    words = philox(seed, torch.arange(first, last, dtype=torch.int64, device=seed.device))
    return _box_muller(words).flatten()[offset - 4 * first :][:count].reshape(shape)


def normal_rows(seed: Tensor, rows: Tensor, size: int) -> Tensor:
    """Rows [n, size] of that noise, float32: row r has the elements r size to (r + 1) size - 1; rows is int64 [n]."""
    index = (rows[:, None] * size + torch.arange(size, device=rows.device)).flatten()
    numbers = _box_muller(philox(seed, index >> 2)).gather(1, (index & 3)[:, None])
    return numbers.reshape(len(rows), size).float()


def draws_by_kernel(seed: Tensor) -> bool:
    return seed.device.type in KERNEL_DEVICES and not exports_to_onnx()


def noise(seed: Tensor, shape: Sequence[int], first_sample: int = 0) -> Tensor:
    """The noise [K, B, *latent] that `rsample` draws, float32: on a device that has kernels theirs, to the bit."""
    if not draws_by_kernel(seed):
        return normal(seed, tuple(shape), first_sample * math.prod(shape[1:])).float()
    size = math.prod(shape[1:])
    rows = torch.arange(first_sample, first_sample + shape[0], device=seed.device)
    return torch.ops.fastelbo._normal_rows(seed, rows, size).reshape(shape)  # type: ignore[no-any-return]


KERNEL_DEVICES: set[str] = set()  # the types of device that have kernels; fastelbo._internal.ops fills it


def _box_muller(words: Tensor) -> Tensor:
    """Two normals of every pair of words: int64 [n, 4] -> [n, 4]."""
    dtype = noise_dtype(words.device)
    a, b = words[:, 0::2], words[:, 1::2]
    # u, or where it is above 1/2 its complement 1 - u, which float32 too holds without a loss of digits
    upper = a >= 1 << 31
    v = (torch.where(upper, 0xFFFFFFFF - a, a).to(dtype) + 0.5) * 2.0**-32
    r = torch.sqrt(-2 * torch.where(upper, torch.log1p(-v), torch.log(v)))
    # t is a number of half turns, each of which is a change of sign, and a rest of at most a quarter turn
    half_turns = (b + (1 << 30)) >> 31
    r = torch.where(half_turns == 1, -r, r)
    t = (b - (half_turns << 31)).to(dtype) * (2 * math.pi * 2.0**-32)
    return torch.stack([r * torch.cos(t), r * torch.sin(t)], 2).flatten(1)


class _Gated(torch.autograd.Function):
    """The identity on z and log_ratio, with one more output, `gates`: zeros [2, K, B].

    The gradient that comes back for `gates` are two factors of each sample: by how much the path and the score gradient
    of an estimator differ from those in the total gradient (csrc/math/estimator.h).
    """

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
        """The path gradient times 1 + gates[0], the score gradient times 1 + gates[1]."""
        if gates is None:
            return grad_z, grad_log_ratio, None, None, None, None
        z, mu, logvar, prior_mu, prior_logvar = ctx.saved_tensors
        path, score = (g.reshape(g.shape + (1,) * (z.dim() - 2)) for g in gates)
        if grad_z is not None:
            grad_z = grad_z * (1 + path)
        if grad_log_ratio is None:
            return grad_z, None, None, None, None, None
        up = grad_log_ratio.reshape(path.shape)
        of_q = divided(z - mu, logvar)  # -d log q / dz
        of_p = z if prior_mu is None else z - prior_mu
        of_p = of_p if prior_logvar is None else divided(of_p, prior_logvar)
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
        eps = noise(seed, (1 if num_samples is None else num_samples, *mu.shape), first_sample)
        eps = eps[0] if num_samples is None else eps
    e = eps.to(dtype)
    z = m + torch.exp(0.5 * lv) * e
    distance = z if m_p is None else z - m_p
    if lv_p is not None:
        distance = divided(distance, 0.5 * lv_p)
    terms = 0.5 * (e.square() - distance.square() + (lv if lv_p is None else lv - lv_p))
    log_ratio = _sum_from(terms, z.dim() - mu.dim() + 1)
    gates = log_ratio.new_empty(0) if num_samples is None else log_ratio.new_zeros(2, *log_ratio.shape)
    if num_samples is not None and forward_ad._current_level < 0:  # estimators have no forward-mode derivative
        z, log_ratio, gates = _Gated.apply(z, log_ratio, m, lv, m_p, lv_p)  # type: ignore[no-untyped-call]
    return z.to(mu.dtype), gaussian_kl(mu, logvar, prior_mu, prior_logvar), log_ratio, gates


rsample_backward = _backward(rsample, ("mu", "logvar", "prior_mu", "prior_logvar", "eps"), upstream=4)


def rsample_kept(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    sample: Tensor,
    datum: Tensor,
    seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows (sample[i], datum[i]) of `rsample` with that seed: z [n, *latent], log_ratio [n] and gates [2, n]."""
    rows = [None if t is None else t.index_select(0, datum) for t in (mu, logvar, prior_mu, prior_logvar)]
    draw = torch.ops.fastelbo._normal_rows if draws_by_kernel(seed) else normal_rows
    eps = draw(seed, sample * mu.shape[0] + datum, math.prod(mu.shape[1:])).reshape(1, len(sample), *mu.shape[1:])
    z, _, log_ratio, gates = rsample(rows[0], rows[1], 1, rows[2], rows[3], None, eps)  # type: ignore[arg-type]
    return z[0], log_ratio[0], gates[:, 0]


rsample_kept_backward = _backward(rsample_kept, ("mu", "logvar", "prior_mu", "prior_logvar"), upstream=3)

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


log_mean_exp_backward = _backward(log_mean_exp, ("log_w",))


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
    weight = kl.new_full((), beta) if beta_tensor is None else beta_tensor.to(kl.dtype)
    latents = weighted_latents(weight, kl, mu, logvar, prior_mu, prior_logvar)
    penalty = gaussian_kl(*latents, free_bits)  # type: ignore[arg-type, call-arg]
    fit = log_likelihood.mean(0) if recon.dim() > x.dim() else log_likelihood
    return reduce(weight * penalty - fit, reduction), log_likelihood, kl


def weighted_latents(weight: Tensor, kl: Tensor, *latents: Tensor | None) -> list[Tensor | None]:
    """The latents, with zeros where a weight of 0 meets an infinite KL ([B], or of every dimension): nothing is left of
    it, nor a gradient. 0 times infinity is NaN, so they are replaced before the maths."""
    lost = (weight == 0) & kl.isinf()

    def replaced(t: Tensor) -> Tensor:
        return torch.where(lost.reshape(lost.shape + (1,) * (t.dim() - lost.dim())), 0.0, t)

    return [None if t is None else replaced(t) for t in latents]


elbo_loss_forward = _with_gradients(elbo_loss, ("recon", "mu", "logvar", "prior_mu", "prior_logvar", "second", "third"))


def scale_(t: Tensor, factor: Tensor) -> None:
    """t times a factor, in place."""
    t.mul_(factor)


def _temper(log_w: Tensor, alpha: float, groups: int) -> Tensor:
    """(1 - alpha) log w, by groups: [K, B] -> [groups, K / groups, B]."""
    tempered: Tensor = torch.unflatten((1 - alpha) * log_w, 0, (int(groups), -1))
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


def minus_bound(log_w: Tensor, gates: Tensor | None, estimator: Sequence[float]) -> Tensor:
    """Minus the bound [B] of log w [K, B] of an estimator (see `fastelbo.estimators`)."""
    value, _, factors = multi_sample_weights(log_w, estimator)
    return -value if gates is None else _Steered.apply(-value, gates, factors.to(gates.dtype))  # type: ignore


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
    log_w = log_likelihood + log_ratio.to(log_likelihood.dtype)
    return reduce(minus_bound(log_w, gates, estimator), reduction), log_likelihood


multi_sample_loss_forward = _with_gradients(multi_sample_loss, ("recon", "log_ratio", "gates", "second", "third"))


# ---------------------------------------------------------------------------------------------------------------------
# Probabilistic PCA.


def ppca_qr(W: Tensor, log_sigma2: Tensor) -> tuple[Tensor, Tensor]:
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
    Q, R = ppca_qr(W, log_s2)
    r = read_data(x, dtype) - b.to(dtype)
    p = r @ Q
    m: Tensor = torch.linalg.solve_triangular(R, p.mT, upper=True).mT
    distance = ((r - p @ Q.mT) * torch.exp(-0.5 * log_s2)).square().sum(1) + m.square().sum(1)
    log_det = (D - M) * log_s2 + 2 * torch.log(torch.diagonal(R).abs()).sum()
    log_p: Tensor = -0.5 * (D * LOG_2PI + log_det + distance)
    return log_p


ppca_log_prob_backward = _backward(ppca_log_prob, ("x", "W", "b", "log_sigma2"))


def ppca_factor(W: Tensor, log_sigma2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """basis [D, M], triangle and whiten [M, M], float64: W = basis triangle with an orthonormal basis, and
    whiten' (triangle triangle' + s2 I) whiten = I. Both matrices are upper; what beyond that is free are signs, and the
    directions that columns of W take which depend on those before them.
    """
    D, M = W.shape
    padded = torch.nn.functional.pad(W.double(), (0, 0, 0, max(M - D, 0)))
    basis, triangle = torch.linalg.qr(padded)
    sigma = torch.exp(0.5 * log_sigma2.double())
    eye = torch.eye(M, dtype=triangle.dtype, device=W.device)
    R = torch.linalg.qr(torch.cat([triangle.mT, sigma * eye]), "r")[1]
    return basis[:D], triangle, torch.linalg.solve_triangular(R, eye, upper=True)


def _residual(x: Tensor, b: Tensor, basis: Tensor, coords: Tensor) -> Tensor:
    return read_data(x, torch.float64) - b.double() - coords @ basis.mT


def ppca_posterior(x: Tensor, W: Tensor, b: Tensor, log_sigma2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean G^-1 W'(x - b) [N, M], G^-1 and log |G|, where G = W'W + s2 I; float64."""
    Q, R = ppca_qr(W, log_sigma2)
    mean = torch.linalg.solve_triangular(R, ((read_data(x, torch.float64) - b) @ Q).mT, upper=True).mT
    root = torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=R.dtype, device=R.device), upper=True)
    return mean, root @ root.mT, 2 * torch.log(torch.diagonal(R).abs()).sum()


def ppca_grams(observed: Tensor, W: Tensor) -> Tensor:
    """The sums over the observed d of W_d W_d' [N, M, M]; observed [N, D] is 0 and 1."""
    squares = (W.unsqueeze(2) * W.unsqueeze(1)).flatten(1)
    found: Tensor = torch.unflatten(observed @ squares, 1, (W.shape[1], -1))
    return found


def ppca_solution(G: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """G^-1 p [N, M], G^-1 and log |G| [N] of G [N, M, M]; the last is NaN where G is not positive definite."""
    factor, info = torch.linalg.cholesky_ex(G)
    mean = torch.cholesky_solve(p.unsqueeze(2), factor).squeeze(2)
    log_det = 2 * torch.log(torch.diagonal(factor, dim1=1, dim2=2)).sum(1)
    return mean, torch.cholesky_inverse(factor), torch.where(info == 0, log_det, math.nan)


def ppca_invert(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The inverses of symmetric positive definite matrices [N, M, M], and their log determinants [N]."""
    return ppca_solution(matrices, matrices[:, 0])[1:]


def ppca_project(x: Tensor, basis: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(x - b) basis [N, M] and |x - b|^2 [N], float64; the basis may be any matrix."""
    r = read_data(x, torch.float64) - b.double()
    return r @ basis, r.square().sum(1)


def ppca_rest(x: Tensor, basis: Tensor, b: Tensor, coords: Tensor, square: Tensor) -> Tensor:
    """|x - b - basis coords|^2 [N], float64, of the `coords` and `square` that `ppca_project` gave."""
    return _residual(x, b, basis, coords).square().sum(1)


def ppca_residual(
    x: Tensor, basis: Tensor, b: Tensor, coords: Tensor, mean: Tensor, weight: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """With e = weight (x - b - basis coords), those that are needed: e [N, D], sum_n e mean' [D, M], sum_n e [D]."""
    e, dtype = weight[:, None] * _residual(x, b, basis, coords), compute_dtype(b)
    found = (e, e.mT @ mean, e.sum(0))
    residual, cross, total = (t.to(dtype) if need else None for t, need in zip(found, needs, strict=True))
    return residual, cross, total


def ppca_log_prob_forward(
    x: Tensor, W: Tensor, b: Tensor, log_sigma2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """log p(x) [N], and coords, rest, basis, triangle and whiten, which its backward reads."""
    basis, triangle, whiten = ppca_factor(W, log_sigma2)
    coords, square = ppca_project(x, basis, b)
    rest = ppca_rest(x, basis, b, coords, square)
    return ppca_log_prob(x, W, b, log_sigma2), coords, rest, basis, triangle, whiten
