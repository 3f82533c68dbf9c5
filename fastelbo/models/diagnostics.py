"""Diagnostics of the latent dimensions, KL and activity, and the effective sample size of the importance weights."""

from typing import NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor

from fastelbo import reference
from fastelbo._internal import arguments
from fastelbo._internal.arguments import checked, refusal
from fastelbo._internal.ordered import ordered_sum
from fastelbo._internal.process_groups import Processes
from fastelbo.losses import Posterior, expand
from fastelbo.models.marginal import LogMeanExp
from fastelbo.models.pieces import cut

ACTIVE_VARIANCE = 0.01  # Burda et al. 2016, sec. 5.2 and app. C


class Diagnostics(NamedTuple):
    """Figures over all data seen, on their device, in float64."""

    kl: Tensor  # [*latent]: mean KL of every latent dimension, nats
    mu_variance: Tensor  # [*latent]: variance of mu over the data
    active_units: Tensor  # 0-d int64: dimensions whose mu varies by more than ACTIVE_VARIANCE
    ess: Tensor  # 0-d: mean effective sample size of the K samples; NaN where no log weights came with the data

    @property
    def collapsed(self) -> Tensor:
        """[*latent], bool: dimensions that are not active, since their mu hardly varies with x."""
        return ~(self.mu_variance > ACTIVE_VARIANCE)


def _to(value: object, device: torch.device | str) -> object:
    return value.to(device) if isinstance(value, Tensor) else value


def _ess(log_w: Tensor, batch: int) -> Tensor:
    """The sum over B of the effective sample sizes."""
    if log_w.dim() != 2 or log_w.shape[1] != batch:
        raise ValueError(f"log_w must be [K, B] with B={batch} from posterior; got {tuple(log_w.shape)}")
    blocks = cut(0, batch, len(log_w), log_w.device)
    return torch.stack([ordered_sum(LogMeanExp().update(log_w[:, a:b]).result().ess, 0) for a, b in blocks]).sum()


class DiagnosticsMeter:
    """`Diagnostics` over many batches, from the posterior of each step; it never waits for the device."""

    def __init__(self) -> None:
        self._count = 0
        self._weighed = 0
        self._kl = self._mean = self._spread = torch.empty(0)  # each [*latent]
        self._ess = torch.empty(())

    @torch.no_grad()
    @checked
    def update(self, posterior: arguments.AnyPosterior, log_w: arguments.Floats | None = None) -> Self:
        """Add a batch.

        Args:
            posterior: from `rsample`, mu and logvar [B, *latent].
            log_w: [K, B], floating: the samples' log weights, log p(x | z) + posterior.log_ratio.

        Raises:
            ValueError, TypeError: log_w of another shape or dtype.
        """
        ess = None if log_w is None else _ess(log_w.detach(), len(posterior.mu))
        count = len(posterior.mu)
        if count == 0:
            return self
        given = posterior.mu, posterior.logvar, *posterior.prior_options.values()
        whole = [expand("prior", t.detach(), posterior.mu.shape, "mu") for t in given]
        for a, b in cut(0, count, posterior.mu[0].numel(), posterior.mu.device):
            mu, logvar, *prior = (t[a:b].double() for t in whole)
            mean, kl = ordered_sum(mu, 0) / (b - a), reference.kl_terms(mu, logvar, *prior)
            self._add(b - a, ordered_sum(kl, 0), mean, ordered_sum((mu - mean).square(), 0))
        if ess is not None:
            self._ess = ess if self._weighed == 0 else self._ess + ess
            self._weighed += count
        return self

    def _add(self, count: int, kl: Tensor, mean: Tensor, spread: Tensor) -> None:
        if self._count == 0:
            self._kl, self._mean, self._spread = kl, mean, spread
        else:  # Chan et al. 1983: sums of squares about a mean, joined without cancellation
            if kl.shape != self._kl.shape:
                raise ValueError(f"latents must be of shape {tuple(self._kl.shape)}; got {tuple(kl.shape)}")
            total = self._count + count
            step = mean - self._mean
            self._kl = self._kl + kl
            self._spread = self._spread + spread + step.square() * (self._count * count / total)
            self._mean = self._mean + step * (count / total)
        self._count += count

    def merge(self, other: "DiagnosticsMeter") -> Self:
        """Add the data that another meter has seen; the other does not change.

        Raises:
            ValueError, TypeError: latents of another shape; other is no DiagnosticsMeter.
        """
        if not isinstance(other, DiagnosticsMeter):
            raise refusal("other", "a DiagnosticsMeter", other)
        if other._count:
            self._add(other._count, other._kl, other._mean, other._spread)
        if other._weighed:
            self._ess = other._ess if self._weighed == 0 else self._ess + other._ess
            self._weighed += other._weighed
        return self

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Self:
        """Add the data that the meters of all processes of a group have seen; every process ends with the same figures.

        Args:
            group: of `torch.distributed`; the default group if None, or this process alone where there is none. Every
                process of it must call this.
        """
        processes = Processes(group) if group else Processes.world()
        device = self._kl.device
        total = DiagnosticsMeter()
        # in the order of the processes: the same sums everywhere
        for state in processes.gather({name: _to(value, "cpu") for name, value in vars(self).items()}):
            one = DiagnosticsMeter()
            vars(one).update({name: _to(value, device) for name, value in state.items()})
            total.merge(one)
        vars(self).update(vars(total))
        return self

    def result(self) -> Diagnostics:
        """The figures over all data so far.

        Raises:
            ValueError: there were no data yet.
        """
        if self._count == 0:
            raise ValueError("diagnostics need at least one datum: call update first")
        variance = self._spread / self._count
        active = (variance > ACTIVE_VARIANCE).sum()
        ess = self._ess / self._weighed if self._weighed else torch.full_like(variance.sum(), float("nan"))
        return Diagnostics(self._kl / self._count, variance, active, ess)


def diagnostics(posterior: Posterior, log_w: Tensor | None = None) -> Diagnostics:
    """KL per latent dimension, active units and effective sample size of one batch, without another forward pass.

    A dimension is active where the variance of mu over the data exceeds 0.01; few data tell little about that. For
    many batches use `DiagnosticsMeter`.

    Args:
        posterior: from `rsample`, or the second field of what `VAE.forward` returns.
        log_w: [K, B], log p(x | z) + posterior.log_ratio, for the effective sample size.

    Returns:
        Diagnostics(kl [*latent], mu_variance [*latent], active_units, ess), on the device; nothing synchronizes.

    Raises:
        ValueError, TypeError: an empty batch, log_w of another shape or dtype.

    Reference: Burda et al. 2016, sec. 5.2 (active units).
    """
    return DiagnosticsMeter().update(posterior, log_w).result()
