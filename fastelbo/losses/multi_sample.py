"""K-sample bounds on log p(x), on the built-in likelihoods."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastelbo import estimators, reference
from fastelbo._internal import arguments, domains
from fastelbo._internal.arguments import checked
from fastelbo._internal.ops import call
from fastelbo._internal.ordered import ordered_sum
from fastelbo.losses.inputs import bound_numbers, mask_like, parameters
from fastelbo.losses.parts import LossParts, loss_of
from fastelbo.losses.sampling import Posterior

_op = torch.ops.fastelbo


@checked
def log_mean_exp(log_w: arguments.Floats, dim: arguments.Integer = 0) -> Tensor:
    """log (1/K) sum_k exp(log w_k) along one dimension, stably.

    Args:
        log_w: any shape, a floating dtype; K is its size along `dim`.
        dim: the dimension that is averaged.

    Returns:
        log_w's shape without `dim`; float32, or float64 for float64 inputs. Where every weight is -inf the value is
        -inf and the gradient 0.

    Raises:
        ValueError, IndexError: K = 0, or a dimension out of range.

    Reference: Burda et al. 2016, eq. 8.
    """
    return call(_op.log_mean_exp.default, reference.log_mean_exp, log_w, dim)


def steered(row: estimators.Estimator, name: str, posteriors: Sequence[Posterior]) -> Tensor | None:
    """The gates [2, K, B] of the posteriors, as one tensor that gives each its gradient; None if none are needed."""
    if row.is_gradient:
        return None
    if forward_ad._current_level >= 0:
        raise NotImplementedError(
            f"estimator {name!r} has no forward-mode derivative: it is no gradient of its bound; take 'iwae' or 'elbo'"
        )
    found = [p.gates for p in posteriors if getattr(p, "gates", None) is not None]
    if len(found) < len(posteriors):
        raise ValueError(f"posterior must be what rsample returned, of K samples, for estimator {name!r}")
    return found[0] if len(found) == 1 else torch.stack(found).sum(0)  # type: ignore[arg-type]


def mean_kl(posterior: Posterior) -> Tensor:
    """The analytic KL [B]; a mean over K where it differs per sample."""
    kl = posterior.kl
    return ordered_sum(kl, 0) / len(kl) if kl.dim() == 2 else kl


def _bound(
    recon: arguments.Recon,
    x: Tensor,
    log_ratio: Tensor,
    gates: Tensor | None,
    row: estimators.Estimator,
    likelihood: str,
    mask: Tensor | None,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Minus the bound of a row, and log p(x | z) [K, B]."""
    given, mask = parameters(recon, x), mask_like(mask, x)
    args = given, x, log_ratio, gates, mask, *bound_numbers(row, log_ratio), likelihood, reduction
    loss, log_likelihood, *_ = call(_op.multi_sample_loss.default, reference.multi_sample_loss, *args)
    domains.check_some(given[0], x, likelihood, mask)
    return loss, log_likelihood


@checked
def iwae_parts(
    recon: arguments.Recon,
    x: arguments.Data,
    log_ratio: arguments.Floats,
    *,
    likelihood: arguments.Likelihood = "bernoulli",
    mask: arguments.Mask | None = None,
    reduction: arguments.Reduction = "mean",
) -> LossParts:
    """Minus the importance-weighted bound, value and gradient in one pass.

    loss_b = -log mean_k exp(log p(x_b | z_kb) + log_ratio_kb), reduced over B; the mean over k is per datum.

    Args:
        recon: [K, B, *event] (or a tuple, as in `log_prob`), x, likelihood, mask: as in `log_prob`.
        log_ratio: [K, B]. log p(z) - log q(z | x), from `rsample`.
        reduction: "mean" (over B), "sum" or "none".

    Returns:
        `iwae_loss`: a scalar, or [B] with reduction="none", in nats. `iwae_parts`: LossParts(loss,
        log_likelihood [K, B], kl [B]), the KL by the samples: minus the mean log ratio.

    Raises:
        ValueError, TypeError: unknown names, shapes or dtypes that do not fit.

    Reference: Burda et al. 2016, eq. 8 and 13.
    """
    row = estimators.ESTIMATORS["iwae"].make()
    loss, log_likelihood = _bound(recon, x, log_ratio, None, row, likelihood, mask, reduction)
    return LossParts(loss, log_likelihood, ordered_sum(log_ratio.to(log_likelihood.dtype), 0) / -log_ratio.shape[0])


iwae_loss = loss_of(iwae_parts, "iwae_loss")


@checked
def multi_sample_parts(
    recon: arguments.Recon,
    x: arguments.Data,
    posterior: arguments.AnyPosterior,
    *,
    likelihood: arguments.Likelihood = "bernoulli",
    estimator: arguments.Text = "iwae",
    alpha: arguments.Number = 0.0,
    beta: arguments.Number = 0.5,
    groups: arguments.Integer = 1,
    mask: arguments.Mask | None = None,
    reduction: arguments.Reduction = "mean",
) -> LossParts:
    """Minus a K-sample bound with the gradient estimator of your choice, value and gradient in one pass.

    With log w_k = log p(x | z_k) + log p(z_k) - log q(z_k | x), all K samples in one backward pass:

    - "elbo": mean_k log w_k: the KL by Monte Carlo too (Kingma & Welling 2014, eq. 6)
    - "stl": the same without the score term: zero variance where q is the posterior (Roeder et al. 2017)
    - "iwae": log mean_k w_k (Burda et al. 2016)
    - "dreg": the same bound; the encoder's gradient doubly reparameterized, which is unbiased and whose signal-to-noise
      ratio grows with K where iwae's falls (Tucker et al. 2019). With K = 1 it is "stl".
    - "rws": the same bound for the decoder; the encoder minimizes KL(p(z | x) || q), the wake phase of reweighted
      wake-sleep (Bornschein & Bengio 2015). Needs K of 2 or more.
    - "vr": 1/(1 - alpha) log mean_k w_k^(1 - alpha), a Renyi bound (Li & Turner 2016): alpha = 0 is iwae, 1 (by
      continuity) elbo; a negative alpha goes above the bound of iwae.
    - "ciwae": beta elbo + (1 - beta) iwae (Rainforth et al. 2018)
    - "miwae": iwae inside each of `groups` groups of K / groups consecutive samples, averaged (Rainforth et al. 2018)

    Args:
        recon: [K, B, *event] (or a tuple, as in `log_prob`), decoded from posterior.z.
        x, likelihood, mask: as in `log_prob`.
        posterior: from `rsample` with num_samples.
        estimator: a name above; for "stl", "dreg" and "rws" see the note.
        alpha: of "vr". beta: the weight of the ELBO in "ciwae". groups: of "miwae". Other estimators ignore them.
        reduction: "mean" (over B), "sum" or "none".

    Returns:
        `multi_sample_loss`: a scalar, or [B] with reduction="none", in nats: minus the bound, whatever the gradient.
        `multi_sample_parts`: LossParts(loss, log_likelihood [K, B], kl [B]), with the KL in closed form.

    Raises:
        ValueError, TypeError: unknown names, shapes or dtypes that do not fit, groups that do not divide K.
        NotImplementedError: "stl", "dreg" or "rws" in forward-mode AD.

    Note:
        "stl", "dreg" and "rws" scale the gradients that reach posterior.z and posterior.log_ratio. The gradient of
        another term of the same loss that reads these two would be scaled with them: compute that term from samples of
        its own (`rsample` with the same seed gives the same ones). The gradients of posterior.kl, mu and logvar are not
        scaled.
    """
    log_ratio = posterior.log_ratio
    if log_ratio.dim() != 2:
        raise ValueError(
            "posterior must hold K samples, log_ratio [K, B]: draw it with rsample(mu, logvar, num_samples); "
            f"got log_ratio {tuple(log_ratio.shape)}"
        )
    row = estimators.estimator(estimator, log_ratio.shape[0], alpha=alpha, beta=beta, groups=groups)
    gates = steered(row, estimator, [posterior])
    loss, log_likelihood = _bound(recon, x, log_ratio, gates, row, likelihood, mask, reduction)
    return LossParts(loss, log_likelihood, mean_kl(posterior))


multi_sample_loss = loss_of(multi_sample_parts, "multi_sample_loss")


class IWAELoss(torch.nn.Module):
    """`iwae_loss` as a module: the constructor takes the options, each call the tensors."""

    __call__: Callable[..., Tensor]

    @checked
    def __init__(
        self, likelihood: arguments.Likelihood = "bernoulli", *, reduction: arguments.Reduction = "mean"
    ) -> None:
        super().__init__()
        self.likelihood, self.reduction = likelihood, reduction

    def forward(self, recon: arguments.Recon, x: Tensor, log_ratio: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `iwae_loss`."""
        return iwae_loss(recon, x, log_ratio, likelihood=self.likelihood, mask=mask, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"{self.likelihood!r}, reduction={self.reduction!r}"
