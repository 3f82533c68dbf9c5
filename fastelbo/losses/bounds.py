"""K-sample bounds on log p(x | z) from anywhere: a likelihood of your own, a sum of several, several latent layers.

`multi_sample_loss` computes the same from the parameters of a built-in likelihood, in one pass over them. Both take the
estimators and their coefficients from fastelbo/estimators.py and csrc/math/weights.h.
"""

import torch
from torch import Tensor

from fastelbo import estimators, reference
from fastelbo._internal import arguments, ordered
from fastelbo._internal.arguments import checked
from fastelbo._internal.ops import call
from fastelbo._internal.ordered import ordered_sum, reduce
from fastelbo.losses.inputs import bound_numbers, weighted
from fastelbo.losses.multi_sample import mean_kl, steered
from fastelbo.losses.parts import LossParts, loss_of
from fastelbo.losses.sampling import Posterior

_op = torch.ops.fastelbo


def _added(name: str, t: Tensor, shape: torch.Size) -> Tensor:
    if t.shape != shape:
        raise ValueError(f"{name} must have the shape {tuple(shape)} of log_likelihood; got {tuple(t.shape)}")
    return t


@checked
def bound_parts(
    log_likelihood: arguments.Floats,
    posterior: arguments.AnyPosteriors,
    *,
    estimator: arguments.Text = "iwae",
    alpha: arguments.Number = 0.0,
    beta: arguments.Number = 0.5,
    groups: arguments.Integer = 1,
    log_ratio: arguments.Floats | None = None,
    kl_weight: arguments.Finite = 1.0,
    reduction: arguments.Reduction = "mean",
) -> LossParts:
    """Minus a K-sample bound of any log p(x | z), with the gradient estimator of your choice.

    log w_k = log p(x | z_k) + kl_weight [sum over the posteriors of their log ratios + log_ratio]_k; the bounds and
    estimators are those of `multi_sample_loss`, which is this on a built-in likelihood.

    Args:
        log_likelihood: [K, B], a floating dtype. log p(x | z_k), from posterior.z: a likelihood of your own, or a sum
            of several `log_prob`.
        posterior: from `rsample` with num_samples or with batch_dims=2; or a sequence of them, one per latent layer.
        estimator, alpha, beta, groups: as in `multi_sample_loss`.
        log_ratio: [K, B], added to the log ratios of the posteriors: of a flow z = f(z_0), where the posterior is that
            of z_0, log p(z) - log N(z_0; 0, I) + log |det df/dz_0|; of a mixture prior, log p(z) - log N(z; 0, I).
        kl_weight: anneals the log ratios; a float or a 0-d tensor. Not for "rws".
        reduction: "mean" (over B), "sum" or "none".

    Returns:
        `bound_loss`: a scalar, or [B] with reduction="none", in nats: minus the bound, whatever the gradient.
        `bound_parts`: LossParts(loss, log_likelihood [K, B], kl [B]), with the analytic KL of the posteriors, summed; a
        KL [K, B] is averaged over K.

    Raises:
        ValueError, TypeError: unknown names, shapes that do not fit, groups that do not divide K, kl_weight with "rws".
        NotImplementedError: "stl", "dreg" or "rws" in forward-mode AD.

    Note:
        "stl", "dreg" and "rws" scale the gradients that reach the posteriors' z and log_ratio. What `log_ratio` depends
        on besides z (a prior, a flow) gets the gradient of the bound, as a decoder does.

        In a lower layer whose mu and logvar depend on the z of a layer above, log q depends on that z. "stl" and "dreg"
        drop the score with respect to mu and logvar, and with it this dependence: give it back in log_ratio, as minus
        log q of the lower z, detached, under an encoder with detached parameters, minus its own value. Without it
        "stl" is unbiased but varies where q is the posterior, and "dreg" is biased. In "dreg" the encoder of the lower
        layer must take a second draw of the upper z with the same seed: the gradient of the first is scaled, and what
        comes from the lower layer is scaled already. See examples/recipes/two_layers.py.

    Reference: those of `multi_sample_loss`; annealing: Sonderby et al. 2016; several layers: Burda et al. 2016, sec. 3,
        and Bauer & Mnih 2021, sec. 4.
    """
    posteriors: list[Posterior] = [posterior] if hasattr(posterior, "log_ratio") else list(posterior)  # type: ignore
    if log_likelihood.dim() != 2:
        raise ValueError(f"log_likelihood must be [K, B]; got {tuple(log_likelihood.shape)}")
    shape, dtype = log_likelihood.shape, reference.compute_dtype(log_likelihood)
    several = len(posteriors) > 1
    ratio = None if log_ratio is None else _added("log_ratio", log_ratio, shape).to(dtype)
    for i, p in enumerate(posteriors):
        name = f"log_ratio of posterior {i}" if several else "log_ratio of posterior"
        own = _added(name, p.log_ratio, shape).to(dtype)
        ratio = own if ratio is None else ratio + own
    assert ratio is not None
    row = estimators.estimator(estimator, shape[0], alpha=alpha, beta=beta, groups=groups)
    gates = steered(row, estimator, posteriors)
    if isinstance(kl_weight, Tensor) or kl_weight != 1.0:
        if estimator == "rws":
            raise ValueError(f"kl_weight must be 1.0 with estimator 'rws', which anneals nothing; got {kl_weight}")
        if isinstance(kl_weight, Tensor):
            kl_weight = ordered.expand(kl_weight.to(ratio), shape)
        ratio = weighted(kl_weight, ratio)
        if gates is not None:  # of dreg: b = a (1 - kl_weight + kl_weight a), by the steps of Tucker et al. 2019, eq. 8
            gates = torch.stack([kl_weight * gates[0], gates[1]])
    log_w = log_likelihood.to(dtype) + ratio
    minus_bound = call(_op.minus_bound.default, reference.minus_bound, log_w, gates, *bound_numbers(row, log_w))
    kl = ordered_sum(torch.stack([mean_kl(p) for p in posteriors]), 0)
    return LossParts(reduce(minus_bound, reduction), log_likelihood, kl)


bound_loss = loss_of(bound_parts, "bound_loss")
