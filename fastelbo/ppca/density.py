"""What is known of probabilistic PCA, as functions of its parameters: density, posterior, bound."""

import torch
from torch import Tensor

from fastelbo import reference
from fastelbo._internal import ordered
from fastelbo._internal.arguments import Data, Floats, Observed, checked
from fastelbo._internal.ops import call, check
from fastelbo._internal.ordered import ordered_sum
from fastelbo.likelihoods import LOG_2PI
from fastelbo.losses import gaussian_kl
from fastelbo.ppca import algebra, missing
from fastelbo.ppca.algebra import product
from fastelbo.ppca.result import Parameters
from fastelbo.reference import compute_dtype, read_data

_op = torch.ops.fastelbo


@checked
def ppca_log_prob(x: Data, W: Floats, b: Floats, log_sigma2: Floats, *, observed: Observed | None = None) -> Tensor:
    """Log density of probabilistic PCA, x = W z + b + e, in O(N D M) and one pass over x.

    log N(x; b, C), C = W W' + s2 I, by QR decompositions: neither a D by D matrix nor W'W is built. Projections and
    norms are summed in float64, and no squares are subtracted where they cancel, so that neither a large b nor a small
    s2 costs digits beyond those that x - b itself lacks.

    Args:
        x: [N, D]. W's dtype (or float32 beside half types), uint8 (read as x / 255) or bool.
        W: [D, M], a floating dtype.
        b: [D].
        log_sigma2: 0-d; log s2.
        observed: bool [N, D]. The exact density of the cells that are True, N(x_o; b_o, W_o W_o' + s2 I); what lies in
            the others is never looked at. Costs O(N D M^2) and memory O(N M^2), in plain PyTorch. By W_o'W_o + s2 I: of
            a row with fewer such cells than M, the relative error is about 1e-16 |W|^2 / s2.

    Returns:
        [N], in nats; float32, or float64 for float64 inputs. NaN where x is NaN.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.

    Reference: Tipping & Bishop 1999, eq. 4 and 11.
    """
    if observed is None:
        return call(_op.ppca_log_prob.default, reference.ppca_log_prob, x, W, b, log_sigma2)
    if not torch.compiler.is_compiling():
        check(_op.ppca_log_prob.default, (x, W, b, log_sigma2))
    if observed.dtype != torch.bool or observed.shape != x.shape:
        got = f"{observed.dtype} {tuple(observed.shape)}"
        raise ValueError(f"observed must be a bool tensor of the shape {tuple(x.shape)} of x; got {got}")
    return missing.posteriors(x, W, b, log_sigma2, observed).log_prob.to(compute_dtype(W))


def has_nan(t: Tensor) -> bool:
    """Whether a value is NaN; False in compiled code, which looks at none."""
    return t.is_floating_point() and not torch.compiler.is_compiling() and bool(t.isnan().any())


def log_prob(x: Tensor, parameters: Parameters) -> Tensor:
    """log p(x) [N]; of a row with NaN cells, log p of its other cells."""
    found = ppca_log_prob(x, *parameters)
    if not x.is_floating_point() or not has_nan(found):
        return found
    gaps = x.isnan().any(1)
    exact = missing.posteriors(x[gaps], *parameters, ~x[gaps].isnan()).log_prob.to(found.dtype)
    # complete rows go through the op anew: a gradient of 0 times NaN is NaN
    complete = ppca_log_prob(x[~gaps], *parameters)
    return torch.zeros_like(found).index_put((gaps,), exact).index_put((~gaps,), complete)


def posterior(x: Tensor, parameters: Parameters) -> tuple[Tensor, Tensor]:
    """Mean [N, M] and covariance of p(z | x): [M, M], or [N, M, M] where x has NaN cells."""
    W, b, log_s2 = parameters
    if has_nan(x):
        mean, inverse, *_ = missing.posteriors(x, W, b, log_s2, ~x.isnan())
    else:
        mean, inverse, _ = algebra.posterior(x, *parameters.to(torch.float64))
    return mean.to(W.dtype), (torch.exp(log_s2.double()) * inverse).to(W.dtype)


def decode(z: Tensor, parameters: Parameters) -> Tensor:
    """W z + b [N, D], float64"""
    W, b, _ = parameters.to(torch.float64)
    mean = product(z.double(), W.mT)
    return mean + ordered.expand(b, mean.shape)


def _spread(logvar: Tensor, W: Tensor) -> Tensor:
    """The sum over j of exp(lv_j) |W_j|^2 [N]"""
    squares = ordered_sum(W.square(), 0)
    return ordered_sum(torch.exp(logvar.double()) * ordered.expand(squares, logvar.shape), 1)


def elbo(x: Tensor, mu: Tensor, logvar: Tensor, parameters: Parameters) -> Tensor:
    """The ELBO of q = N(mu, diag exp(logvar)) [N]."""
    W, _, log_sigma2 = parameters.to(torch.float64)
    log_s2 = ordered.expand(log_sigma2, x.shape[:1])
    e = read_data(x, torch.float64) - decode(mu, parameters)
    square = ordered_sum(e.square(), 1) + _spread(logvar, W)
    log_likelihood = -0.5 * (len(W) * (LOG_2PI + log_s2) + square * torch.exp(-log_s2))
    return log_likelihood.to(compute_dtype(parameters.W)) - gaussian_kl(mu, logvar)


def inference_gap(x: Tensor, mu: Tensor, logvar: Tensor, parameters: Parameters) -> Tensor:
    """KL(q || p(z | x)) of the same q [N]."""
    W, b, log_sigma2 = parameters.to(torch.float64)
    lv, log_s2 = logvar.double(), ordered.expand(log_sigma2, x.shape[:1])
    mean, _, log_det = algebra.posterior(x, W, b, log_sigma2)
    off = mu.double() - mean
    # G = W'W + s2 I
    square = ordered_sum(product(off, W.mT).square(), 1) + _spread(logvar, W)
    rest = ordered_sum(torch.exp(lv) + off.square() - lv, 1) + W.shape[1] * (log_s2 - 1)
    gap: Tensor = square * torch.exp(-log_s2) + rest - ordered.expand(log_det, x.shape[:1])
    return (0.5 * gap).to(compute_dtype(parameters.W))
