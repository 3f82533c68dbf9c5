"""What the model says of sparse rows, by M + 1 numbers of each.

Of x, the density, the posterior and the bounds need the coordinates of x - b in an orthonormal basis U of the columns
of W = U R, and the length of the rest. These M + 1 numbers are a row of the model with W = [R; 0] and b = 0; in each of
the D - M - 1 other directions, the row is 0 and its density that of N(0, s2). By U'(x - b) = U'x - U'b and
|x - b|^2 = |x|^2 - 2 x'b + |b|^2 in float64, a row costs O(M) for each of its cells that are there.
"""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from fastelbo._internal.ordered import ordered_sum
from fastelbo.likelihoods import LOG_2PI
from fastelbo.ppca.algebra import product
from fastelbo.ppca.result import Parameters
from fastelbo.ppca.sparse import Rows
from fastelbo.reference import compute_dtype

# of |x|^2 + |b|^2: where less is left orthogonal to W, differences of squares have lost the digits that a float32, or a
# float64, result has, and the row is read as a dense one
SHARE = {torch.float32: 1e-6, torch.float64: 0.1}
_op = torch.ops.fastelbo
_F = TypeVar("_F", bound=Callable[..., Any])


def shortened(rows: Rows, parameters: Parameters, share: float) -> tuple[Tensor, Parameters, Tensor]:
    """The rows [N, M + 1], the parameters that go with them, and of which rows they are exact [N]; float64."""
    W, b, log_s2 = parameters.to(torch.float64)
    basis, triangle, _ = _op._ppca_factor(W, log_s2)
    of_x = rows @ torch.cat([basis, b[:, None]], 1)
    coords, across = of_x[:, :-1] - product(b[None], basis), of_x[:, -1]
    whole = rows.squares() + ordered_sum(b.square(), 0)
    rest = whole - 2 * across - ordered_sum(coords.square(), 1)
    row = torch.cat([coords, rest.clamp_min(0).sqrt()[:, None]], 1)
    short = Parameters(torch.cat([triangle, torch.zeros_like(triangle[:1])]), row.new_zeros(row.shape[1]), log_s2)
    return row, short, rest >= share * whole


def by_rows(method: _F) -> _F:
    """A method of x [N, D], and of mu and logvar [N, M], also for sparse x. Where a gradient is asked for, where cells
    are NaN, and on devices other than the CPU, in dense tiles."""
    is_density, arguments = method.__name__ in ("log_prob", "elbo"), signature(method)  # the density is of D dimensions

    @wraps(method)
    def call(self: Any, x: Any, *latents: Any, **named: Any) -> Any:
        rows = Rows.of(x)
        if rows is None:
            return method(self, x, *latents, **named)
        latents = arguments.bind(self, x, *latents, **named).args[2:]

        def dense(tile: Tensor, *latents: Any) -> Any:
            return method(self, tile.numpy() if rows.is_numpy else tile, *latents)

        W, _, log_sigma2 = parameters = self._values(x)
        none = rows.values.new_zeros(0, rows.shape[1])
        self._with_latents(none, *(t[:0] for t in latents)) if latents else self._data(none)  # their errors
        given = [t for t in (*parameters, *latents) if isinstance(t, Tensor)]
        wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in given)
        if wants_grad or rows.device.type != "cpu" or bool(rows.values.isnan().any()):
            return _of_tiles(rows, dense, latents)
        with torch.no_grad():
            row, short, exact = shortened(rows, parameters, SHARE[compute_dtype(W)])
            found = method(self._of(short), row, *(torch.as_tensor(t).double() for t in latents))
            first, *others = found if isinstance(found, tuple) else (found,)
            if is_density:
                first = first + (len(W) - row.shape[1]) * -0.5 * (LOG_2PI + log_sigma2.double())
            first, *others = (t.to(W.dtype) for t in (first, *others))
            for a, b, tile in rows.tiles(where=~exact):
                left = ~exact[a:b]
                part = dense(tile[left], *(t[a:b][left] for t in latents))
                first[a:b][left] = torch.as_tensor(part[0] if others else part)
        results = tuple(t.numpy() if rows.is_numpy else t for t in (first, *others))
        return results if others else results[0]

    return cast(_F, call)


def _of_tiles(rows: Rows, dense: Callable[..., Any], latents: tuple[Any, ...]) -> Any:
    found = [dense(tile, *(t[a:b] for t in latents)) for a, b, tile in rows.tiles()]
    if not isinstance(found[0], tuple):
        return _joined(found)
    means, covariances = zip(*found, strict=True)  # of a posterior, whose covariance all rows share
    if any(covariance.ndim == 3 for covariance in covariances):
        raise ValueError("x must have no NaN where it is sparse: a missing cell is not one that is 0")
    return _joined(means), covariances[0]


def _joined(parts: Any) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    import numpy as np

    return np.concatenate(parts)
