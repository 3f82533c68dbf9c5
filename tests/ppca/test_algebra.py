"""Products, posteriors and rows with missing cells against their twins; derivatives of every order."""

import pytest
import torch
from oracle import check
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastelbo import reference
from fastelbo.ppca import algebra

F64 = torch.float64


def _r(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64, requires_grad=True)


def _positive(N: int, M: int) -> Tensor:
    factor = torch.randn(N, M, M + 2, dtype=F64)
    return (factor @ factor.mT).requires_grad_()


def _observed(N: int, D: int) -> Tensor:
    return (torch.rand(N, D) < 0.6).double()


def _grams(W: Tensor, observed: Tensor) -> Tensor:
    return algebra.grams(observed, W)


def _weighted(W: Tensor, weights: Tensor) -> Tensor:
    return algebra.grams(weights, W)


def _forms(A: Tensor, W: Tensor) -> Tensor:
    return algebra.forms((A + A.mT) / 2, W)


def _symmetric(G: Tensor, p: Tensor) -> tuple[Tensor, ...]:
    return algebra.solution((G + G.mT) / 2, p)


CASES = {
    "product": (algebra.product, lambda N, D, M: (_r(N, D), _r(D, M))),
    "posterior": (algebra.posterior, lambda N, D, M: (_r(N, D), _r(D, M), _r(D), _r())),
    "grams": (_grams, lambda N, D, M: (_r(D, M), _observed(N, D))),
    "grams of weights": (_weighted, lambda N, D, M: (_r(D, M), _r(N, D))),
    "forms": (_forms, lambda N, D, M: (_positive(N, M), _r(D, M))),
    "solution": (_symmetric, lambda N, D, M: (_positive(N, M), _r(N, M))),
}


@pytest.mark.parametrize("N, D, M", [(1, 2, 1), (3, 5, 2), (50, 20, 3), (7, 300, 17), (3, 60, 40)])
@pytest.mark.parametrize("name", CASES)
def test_against_the_twin(name, N, D, M):
    """`roundings`: a Cholesky factor of [M, M] is as good as that of a matrix off by M + 1 ulp (Higham 2002, th. 10.3),
    its inverse takes as many again."""
    function, make = CASES[name]
    check(function, *make(N, D, M), roundings=2 * (M + 1))


@pytest.mark.parametrize("name", CASES)
def test_derivatives(name):
    function, make = CASES[name]
    inputs = make(3, 5, 2)
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def test_columns_that_depend_on_each_other_and_columns_of_nothing():
    x, W, b, log_s2 = (t.detach() for t in CASES["posterior"][1](6, 9, 4))
    W[:, 1], W[:, 2] = 2 * W[:, 0], 0
    found, expected = (f(x, W, b, log_s2) for f in (algebra.posterior, reference.ppca_posterior))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_matrix_that_is_not_positive_definite():
    G = _positive(3, 4).detach()
    G[1] = -G[1]
    mean, inverse, log_det = algebra.solution(G, torch.ones(3, 4, dtype=F64))
    assert log_det.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(inverse[::2] @ G[::2], torch.eye(4, dtype=F64).expand(2, 4, 4))
    assert mean[::2].isfinite().all()


def test_pieces_of_many_columns(monkeypatch):
    W, observed, A = _r(50, 3), _observed(7, 50), _positive(7, 3)
    found = []
    for size in (1 << 20, 6 * 8):  # in pieces of 8 columns
        monkeypatch.setattr(algebra, "PIECE_ELEMENTS", size)
        grams, forms = algebra.grams(observed, W), algebra.forms(A, W)
        of_grams = torch.autograd.grad(grams, W, A.detach())
        found.append([grams, forms, *of_grams, *torch.autograd.grad(forms, (A, W), observed)])
    torch.testing.assert_close(*found)
