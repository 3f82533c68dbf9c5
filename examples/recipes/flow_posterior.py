"""A flow as the posterior (Rezende & Mohamed 2015): z = f(z_0), z_0 ~ q(z_0 | x), f two affine couplings.

`rsample` gives log N(z_0; 0, I) - log q(z_0 | x). The rest of the log ratio is given to `bound_loss`:
log N(z; 0, I) - log N(z_0; 0, I) + log |det df / dz_0|.

    python examples/recipes/flow_posterior.py
"""

import sys

import torch
from torch import Tensor, nn

import fastelbo
from fastelbo.commands.data import load

M, K, STEPS, BATCH = 8, 4, 1500, 64


class Coupling(nn.Module):
    """The second half of z is scaled and shifted by functions of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(M // 2, 64), nn.Tanh(), nn.Linear(64, M))
        last = self.body[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)  # the identity, to begin with

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        first, second = z.chunk(2, -1)
        log_scale, shift = self.body(first).chunk(2, -1)
        log_scale = torch.tanh(log_scale)
        return torch.cat([second * torch.exp(log_scale) + shift, first], -1), log_scale.sum(-1)


class FlowVAE(nn.Module):
    def __init__(self, flows: int = 2) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2 * M))
        self.flows = nn.ModuleList(Coupling() for _ in range(flows))
        self.decoder = nn.Sequential(nn.Linear(M, 64), nn.Tanh(), nn.Linear(64, 64))

    def loss(self, x: Tensor, num_samples: int = K, estimator: str = "iwae") -> Tensor:
        base = fastelbo.rsample(*self.encoder(x).chunk(2, -1), num_samples)
        z, log_det = base.z, torch.zeros_like(base.log_ratio)
        for flow in self.flows:
            z, change = flow(z)
            log_det = log_det + change
        log_ratio = 0.5 * (base.z.square() - z.square()).sum(-1) + log_det
        log_likelihood = fastelbo.log_prob(self.decoder(z), x)
        return fastelbo.bound_loss(log_likelihood, base, estimator=estimator, log_ratio=log_ratio)


def build() -> FlowVAE:
    return FlowVAE()


def loss(model: FlowVAE, x: Tensor) -> Tensor:
    return model.loss(x)


def main() -> int:
    torch.manual_seed(0)
    digits = load("digits")
    x, held_out = digits.train[:].flatten(1), digits.held_out[:].flatten(1)
    model = build()
    with torch.no_grad():
        start = -model.loss(held_out, 500).item()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(model, x[torch.randint(len(x), (BATCH,))]).backward()
        optimizer.step()
    with torch.no_grad():
        one, many = (-model.loss(held_out, k).item() for k in (1, 500))
    print(f"held-out bounds on log p(x), nats: K=1 {one:.2f}, K=500 {many:.2f}; before training {start:.2f}")
    moved = max(flow.body[-1].weight.abs().max().item() for flow in model.flows)
    return 0 if many > one > start + 10 and moved > 0.01 else 1


if __name__ == "__main__":
    sys.exit(main())
