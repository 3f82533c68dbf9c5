"""Products and posteriors in float64, with gradients, that are bitwise the same for any number of threads.

torch's products and factorizations are a BLAS's, which shares out what it sums.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastelbo import reference
from fastelbo._internal.ops import takes_twins
from fastelbo._internal.ordered import ordered_sum

_R = TypeVar("_R")
_op = torch.ops.fastelbo
PIECE_ELEMENTS = 1 << 20  # of the products W_di W_dj that are in memory at a time


def _run(function: type[torch.autograd.Function], twin: Callable[..., _R], *inputs: Tensor) -> _R:
    """The function, or its twin, which all kinds of derivatives take."""
    return twin(*inputs) if takes_twins(inputs[0]) else function.apply(*inputs)  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------------------------------
# Products.


def _project(a: Tensor, b: Tensor) -> Tensor:
    if a.device.type != "cpu":  # whose own products have no threads to depend on
        return a @ b
    if 0 < len(a) < b.shape[1]:  # the op shares out the rows of the first
        return _project(b.mT, a.mT).mT
    found: Tensor = _op._ppca_project(a, b, b.new_zeros(len(b)))[0]
    return found


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return _project(a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        (a, b), needs = ctx.saved_tensors, ctx.needs_input_grad
        return product(grad, b.mT) if needs[0] else None, product(a.mT, grad) if needs[1] else None


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [N, K] b [K, L]"""
    return _run(_Product, torch.matmul, a, b)


# ---------------------------------------------------------------------------------------------------------------------
# Complete rows.


class _Posterior(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor, log_s2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # [W; sigma I] = Q R, R'R = G, as in `reference.ppca_qr`; R' = U T, so that G^-1 = S S' with S = U T^-T
        eye = torch.eye(W.shape[1], dtype=W.dtype, device=W.device)
        Q, R, _ = _op._ppca_factor(torch.cat([W, torch.exp(0.5 * log_s2) * eye]), log_s2)
        U, _, inverse_T = _op._ppca_factor(R.mT, torch.full_like(log_s2, -torch.inf))
        S = _project(U, inverse_T)
        coords = _op._ppca_project(x, Q[: len(W)], b)[0]
        mean, inverse = _project(_project(coords, _project(R, S)), S.mT), _project(S, S.mT)
        ctx.save_for_backward(x, W, b, log_s2, mean, inverse)
        return mean, inverse, 2 * torch.log(torch.diagonal(R).abs()).sum()

    @staticmethod
    def backward(ctx: Any, of_mean: Tensor, of_inverse: Tensor, of_log_det: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, W, b, log_s2, mean, inverse = ctx.saved_tensors
        of_G = of_log_det * inverse - product(product(inverse, of_inverse), inverse)
        u = product(of_mean, inverse)
        rest = reference.read_data(x, torch.float64) - b - product(mean, W.mT)
        grad_W = product(W, of_G + of_G.mT - product(u.mT, mean)) + product(rest.mT, u)
        grad_b = -product(W, ordered_sum(u, 0).unsqueeze(1)).squeeze(1)
        of_s2 = torch.diagonal(of_G).sum() - ordered_sum(u * mean, 0, 1)
        grad_x = product(u, W.mT).to(x.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, grad_W, grad_b, of_s2 * torch.exp(log_s2)


def posterior(x: Tensor, W: Tensor, b: Tensor, log_s2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of complete rows x [N, D] and parameters in float64: the mean G^-1 W'(x - b) [N, M], G^-1 [M, M] and log |G|,
    where G = W'W + s2 I."""
    return _run(_Posterior, reference.ppca_posterior, x, W, b, log_s2)


# ---------------------------------------------------------------------------------------------------------------------
# Rows with missing cells: a G of each.


def pairs(size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs i <= j of 0 .. size - 1: i [P], j [P], and where in them each (i, j) is [size, size]."""
    i, j = torch.triu_indices(size, size, device=device)
    where = torch.empty(size, size, dtype=torch.int64, device=device)
    where[i, j] = where[j, i] = torch.arange(len(i), device=device)
    return i, j, where


class _Grams(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, observed: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(observed, W)
        i, j, where = pairs(W.shape[1], W.device)
        total = observed.new_zeros(len(observed), len(i))
        for cells, part in _columns(observed, W, len(i)):
            total += product(cells, part[:, i] * part[:, j])
        return total[:, where]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor]:  # type: ignore[override]
        observed, W = ctx.saved_tensors
        grad = grad + grad.mT
        of_observed = 0.5 * forms(grad, W) if ctx.needs_input_grad[0] else None
        return of_observed, _turned(observed, grad, W)


def _columns(observed: Tensor, W: Tensor, pairs: int) -> Any:
    size = max(1, PIECE_ELEMENTS // pairs)
    return zip(observed.split(size, 1), W.split(size), strict=True)


def _turned(weights: Tensor, A: Tensor, W: Tensor) -> Tensor:
    """The sums over n of weights_nd A_n w_d [D, M]; weights [N, D], A [N, M, M], symmetric."""
    i, j, where = pairs(W.shape[1], W.device)
    of_pairs = A[:, i, j]
    found = [
        (product(cells.mT, of_pairs)[:, where] * part.unsqueeze(1)).sum(2)
        for cells, part in _columns(weights, W, len(i))
    ]
    return torch.cat(found)


def grams(observed: Tensor, W: Tensor) -> Tensor:
    """The sums over d of observed_nd W_d W_d' [N, M, M]; observed [N, D] is 0 and 1 in float64, or any weight.

    All of a batch come out of one product, observed times the W_di W_dj [D, M (M + 1) / 2], in pieces of D, which the
    gradient makes anew: memory O(N M^2).
    """
    return _run(_Grams, reference.ppca_grams, observed, W)


class _Forms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, A: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(A, W)
        i, j, _ = pairs(W.shape[1], W.device)
        upper = A[:, i, j] * torch.where(i == j, 1.0, 2.0)
        found = A.new_empty(len(A), len(W))
        for cells, part in _columns(found, W, len(i)):
            cells.copy_(product(upper, (part[:, i] * part[:, j]).mT))
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        (A, W), needs = ctx.saved_tensors, ctx.needs_input_grad
        return grams(grad, W) if needs[0] else None, _turned(grad, 2 * A, W) if needs[1] else None


def forms(A: Tensor, W: Tensor) -> Tensor:
    """w_d' A_n w_d [N, D] of A [N, M, M], symmetric, and the rows w_d of W [D, M], float64; as `grams`, in pieces of D.

    Each of the two is the other's gradient.
    """
    return _run(_Forms, reference.ppca_forms, A, W)


class _Solution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, G: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inverse, log_det = _op._ppca_invert(G)
        mean = (inverse * p.unsqueeze(1)).sum(2)
        ctx.save_for_backward(mean, inverse)
        ctx.set_materialize_grads(False)
        return mean, inverse, log_det

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, of_mean: Tensor | None, of_inverse: Tensor | None, of_log_det: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        mean, inverse = ctx.saved_tensors
        of_p = torch.zeros_like(mean) if of_mean is None else (inverse * of_mean.unsqueeze(1)).sum(2)
        of_G = -of_p.unsqueeze(2) * mean.unsqueeze(1)
        if of_log_det is not None:
            of_G = of_G + of_log_det[:, None, None] * inverse
        if of_inverse is not None:
            of_G = of_G - inverse @ of_inverse @ inverse
        return of_G, of_p


def solution(G: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of G [N, M, M], positive definite, and p [N, M], float64: G^-1 p [N, M], G^-1 and log |G| [N], which is NaN where
    G is not positive definite."""
    return _run(_Solution, reference.ppca_solution, G, p)
