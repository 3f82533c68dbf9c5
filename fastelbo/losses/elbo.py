"""The evidence lower bound, with the KL in closed form."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastelbo import reference
from fastelbo._internal import arguments, domains
from fastelbo._internal.arguments import checked
from fastelbo._internal.ops import call
from fastelbo._internal.ordered import ordered_sum, reduce
from fastelbo.losses.inputs import expand, mask_like, number, parameters
from fastelbo.losses.likelihood import log_prob
from fastelbo.losses.parts import LossParts, loss_of
from fastelbo.losses.sampling import gaussian_kl

_op = torch.ops.fastelbo


@checked
def elbo_parts(
    recon: arguments.Recon,
    x: arguments.Data,
    mu: arguments.Floats,
    logvar: arguments.Floats,
    *,
    prior_mu: arguments.Floats | None = None,
    prior_logvar: arguments.Floats | None = None,
    likelihood: arguments.Likelihood = "bernoulli",
    beta: arguments.NumberOrFloats = 1.0,
    free_bits: arguments.NotNegative = 0.0,
    mask: arguments.Mask | None = None,
    kl_mask: arguments.BoolMask | None = None,
    reduction: arguments.Reduction = "mean",
) -> LossParts:
    """The loss of a VAE: minus the evidence lower bound, value and gradient in one pass.

    loss_b = -mean_k log p(x_b | z_kb) + beta KL(q(z | x_b) || p(z)), reduced over B, never averaged over D.

    Args:
        recon, x, likelihood, mask: as in `log_prob`. recon may carry K samples in front.
        mu, logvar: [B, *latent]. The encoder's output.
        prior_mu, prior_logvar: broadcast to mu, learned or not; N(0, I) without them.
        beta: weight of the KL; a float or a 0-d tensor (Higgins et al. 2017), or a tensor that broadcasts
            to [*latent], of one weight per dimension.
        free_bits: floor in nats for each dimension's mean KL; see `gaussian_kl`.
        kl_mask: bool, broadcasts to mu: where it is False, the KL is 0; see `gaussian_kl`.
        reduction: "mean" (over B), "sum" or "none".

    Returns:
        `elbo_loss`: a scalar, or [B] with reduction="none", in nats; float32, or float64 for float64 inputs.
        `elbo_parts`: LossParts(loss, log_likelihood [K?, B], kl [B]), the KL without beta and free bits.

    Raises:
        ValueError, TypeError: unknown names, shapes or dtypes that do not fit.

    Note:
        The gradient is computed with the value and multiplied by the upstream one later: where it overflows by itself
        it stays infinite, also under an upstream gradient of 1e-30. reduction="none" multiplies first.

    Reference: Kingma & Welling 2014, eq. 10.
    """
    if kl_mask is not None or (isinstance(beta, Tensor) and beta.dim() > 0):
        if isinstance(free_bits, Tensor) or free_bits > 0:
            raise ValueError(f"free_bits must be 0 with kl_mask or with a beta per dimension; got {free_bits}")
        latents = mu, logvar, prior_mu, prior_logvar
        return _weighted_parts(recon, x, latents, likelihood, beta, mask, kl_mask, reduction)
    given, mask = parameters(recon, x), mask_like(mask, x)
    loss, log_likelihood, kl, *_ = call(
        _op.elbo_loss.default,
        reference.elbo_loss,
        given,
        x,
        mu,
        logvar,
        prior_mu,
        prior_logvar,
        mask,
        number(beta, 1.0, mu),
        number(free_bits, 0.0, mu),
        likelihood,
        reduction,
    )
    domains.check_some(given[0], x, likelihood, mask)
    return LossParts(loss, log_likelihood, kl)


def _weighted_parts(
    recon: arguments.Recon,
    x: Tensor,
    latents: tuple[Tensor | None, ...],
    likelihood: str,
    beta: float | Tensor,
    mask: Tensor | None,
    kl_mask: Tensor | None,
    reduction: str,
) -> LossParts:
    """The parts with a weight for the KL of every dimension, or with a mask of it: made of `log_prob` and the KLs."""
    log_likelihood = log_prob(recon, x, likelihood=likelihood, mask=mask)
    terms = gaussian_kl(*latents, mask=kl_mask, reduce=False)  # type: ignore[arg-type]
    whole = terms
    if isinstance(beta, Tensor):
        beta = expand("beta", expand("beta", beta.to(terms), terms.shape[1:], "one latent"), terms.shape, "mu")
    if isinstance(beta, Tensor) or beta == 0:
        # what a weight of 0 leaves of an infinite KL is read by nothing: neither value nor gradient is NaN
        left = ~((beta == 0) & terms.isinf())
        terms = gaussian_kl(*latents, mask=left if kl_mask is None else left & kl_mask, reduce=False)  # type: ignore[arg-type]
    penalty = ordered_sum((beta * terms).flatten(1), 1)
    fit = ordered_sum(log_likelihood, 0) / len(log_likelihood) if log_likelihood.dim() == 2 else log_likelihood
    return LossParts(reduce(penalty - fit, reduction), log_likelihood, ordered_sum(whole.flatten(1), 1))


elbo_loss = loss_of(elbo_parts, "elbo_loss")


class ELBOLoss(torch.nn.Module):
    """`elbo_loss` as a module: the constructor takes the options, each call the tensors.

    A tensor beta is a buffer that moves with the module and is not in its state_dict; an nn.Parameter is learned.
    """

    __call__: Callable[..., Tensor]

    @checked
    def __init__(
        self,
        likelihood: arguments.Likelihood = "bernoulli",
        *,
        beta: arguments.NumberOrFloats = 1.0,
        free_bits: arguments.NotNegative = 0.0,
        reduction: arguments.Reduction = "mean",
    ) -> None:
        super().__init__()
        self.likelihood, self.free_bits, self.reduction = likelihood, free_bits, reduction
        self.beta: float | Tensor
        if isinstance(beta, Tensor) and not isinstance(beta, torch.nn.Parameter):
            # a buffer moves with the module; like the other options it is the constructor's, and not in the state_dict
            self.register_buffer("beta", beta, persistent=False)
        else:
            self.beta = beta

    def forward(
        self,
        recon: arguments.Recon,
        x: Tensor,
        mu: Tensor,
        logvar: Tensor,
        mask: Tensor | None = None,
        *,
        prior_mu: Tensor | None = None,
        prior_logvar: Tensor | None = None,
    ) -> Tensor:
        """See `elbo_loss`."""
        options: dict[str, Any] = {"likelihood": self.likelihood, "beta": self.beta, "free_bits": self.free_bits}
        options |= {"prior_mu": prior_mu, "prior_logvar": prior_logvar, "mask": mask, "reduction": self.reduction}
        return elbo_loss(recon, x, mu, logvar, **options)

    def extra_repr(self) -> str:
        return f"{self.likelihood!r}, beta={self.beta}, free_bits={self.free_bits}, reduction={self.reduction!r}"
