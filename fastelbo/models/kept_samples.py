"""The loss of all samples of a model, of which a few are back-propagated."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm

from fastelbo._internal import domains
from fastelbo._internal.arguments import Condition
from fastelbo._internal.ordered import ordered_sum, reduce
from fastelbo.estimators import Estimator
from fastelbo.losses import Kept, LossParts, Recon, expand, kept, log_prob, seed_tensor, split_recon
from fastelbo.models import priors
from fastelbo.models.marginal import Model
from fastelbo.models.pieces import cut, rows_of


def kept_parts(
    model: Model,
    x: Tensor,
    row: Estimator,
    num_samples: int,
    keep: int,
    *,
    condition: Condition | None,
    mask: Tensor | None,
    reduction: str,
    seed: int | Tensor | None,
    generator: Generator | None,
) -> tuple[LossParts, Recon]:
    """The loss of all samples, whose graph holds `keep` of them per datum, and recon of these; see `VAE.loss`."""
    if any(isinstance(number, Tensor) and number.requires_grad for number in row):
        raise ValueError(
            "keep takes no learned number: the weights have no graph; detach the number, or leave keep out"
        )
    check_repeats(model.decoder)
    mu, logvar = model.encode(x, condition, mask=mask)
    draw = partial(priors.sampler(model.prior, mu, logvar, condition), seed=seed_tensor(seed, generator, mu.device))
    log_p, ratios = [], []
    with torch.no_grad(), autocast_cache_off():
        for first, last in cut(0, num_samples, x.numel(), x.device):
            posterior = draw(last - first, first_sample=first)
            recon = model.decode(posterior.z, condition)
            log_p.append(log_prob(recon, x, likelihood=model.likelihood, mask=mask))
            ratios.append(posterior.log_ratio)
    log_likelihood, log_ratio = torch.cat(log_p), torch.cat(ratios)
    log_w = log_likelihood + log_ratio
    weights = kept.weigh(log_w, row)
    loss = -weights.bound.to(log_likelihood.dtype)
    if torch.is_grad_enabled():
        chosen = kept.keep_samples(log_w, keep, weights=weights.a, generator=generator)
        posterior = draw(kept=chosen)
        recon = model.decode(posterior.z, rows_of(condition, chosen.datum))
        left = None if mask is None else expand("mask", mask, x.shape, "x").index_select(0, chosen.datum)
        rows = log_prob(recon, x.index_select(0, chosen.datum), likelihood=model.likelihood, mask=left)
        check_runs(rows, chosen, log_likelihood, split_recon(recon)[0])
        loss = kept.loss_of(rows, posterior, chosen, weights, row)
    kl = ordered_sum(log_ratio, 0) / -num_samples if priors.is_density(model.prior) else posterior.kl
    return LossParts(reduce(loss, reduction), log_likelihood, kl), recon


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


def check_runs(rows: Tensor, chosen: Kept, log_likelihood: Tensor, recon: Tensor) -> None:
    """Refuse log p of the kept rows [n] that differs from that of all samples [K, B], where nothing waits for a device.

    More than half of the rows have to differ by more than a rounding may amount to: what the decoder does by itself
    changes them all.

    Raises:
        ValueError: with the change.
    """
    if not domains.readable(rows) or rows.numel() == 0:
        return
    rows = rows.detach()
    before = log_likelihood[chosen.sample, chosen.datum]
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
