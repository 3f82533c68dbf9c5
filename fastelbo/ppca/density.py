"""The density of probabilistic PCA as a function of its parameters."""

import torch
from torch import Tensor

from fastelbo import reference
from fastelbo._internal.arguments import checked
from fastelbo._internal.ops import call, check
from fastelbo.ppca import missing

_op = torch.ops.fastelbo


@checked
def ppca_log_prob(x: Tensor, W: Tensor, b: Tensor, log_sigma2: Tensor, *, observed: Tensor | None = None) -> Tensor:
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
        raise ValueError(
            f"observed must be a bool tensor of the shape {tuple(x.shape)} of x; "
            f"got {observed.dtype} {tuple(observed.shape)}"
        )
    return missing.log_prob(x, W, b, log_sigma2, observed)
