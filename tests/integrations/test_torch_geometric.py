"""fastelbo.integrations.torch_geometric against torch_geometric's own class. `make test-integrations` has the
environment for it.
"""

import math
import random

import pytest
import torch

pytest.importorskip("torch_geometric", reason="torch_geometric is not installed: make test-integrations installs it")

from torch import Tensor, nn
from torch_geometric.nn import VGAE, GCNConv

from fastelbo.integrations import torch_geometric as fused

N, D, M = 10, 6, 4


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mu, self.logstd = GCNConv(D, M), GCNConv(D, M)

    def forward(self, x: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        return self.mu(x, edges), self.logstd(x, edges)


def test_losses_and_gradients() -> None:
    """torch_geometric's 1e-15 is below rounding here."""
    torch.manual_seed(0)
    x, edges, other = torch.randn(N, D).double(), torch.randint(0, N, (2, 20)), torch.randint(0, N, (2, 25))
    plain, ours = VGAE(Encoder()).double(), fused.VGAE(Encoder()).double()
    ours.load_state_dict(plain.state_dict())
    results = []
    for model in (plain, ours):
        torch.manual_seed(3)
        z = model.encode(x, edges)
        losses = [model.recon_loss(z, edges, other), model.kl_loss(), model.kl_loss(2 * z, z + 9)]
        sum(losses).backward()
        results.append([*losses, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)


def test_negative_edges_are_drawn_as_before() -> None:
    torch.manual_seed(0)
    z, edges = torch.randn(N, M).double(), torch.randint(0, N, (2, 20))
    losses = []
    for kind in (VGAE, fused.VGAE):
        torch.manual_seed(3)
        random.seed(3)
        losses.append(kind(nn.Identity()).recon_loss(z, edges))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("logit", [20.0, 60.0])
def test_a_missing_edge_that_the_decoder_is_sure_of(logit: float) -> None:
    """In float32: the logit, with its gradient, where torch_geometric's has none."""
    z = torch.tensor([[logit], [1.0]], requires_grad=True)
    loss = fused.VGAE(nn.Identity()).recon_loss(z, torch.tensor([[1], [1]]), torch.tensor([[0], [1]]))
    (gradient,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(loss.item(), logit + math.log1p(math.exp(-1)), rtol=1e-6, atol=0)
    assert gradient[0].item() == 1
