"""Two latent layers with a doubly reparameterized gradient: q(z2 | x) q(z1 | z2, x), p(z2) p(z1 | z2) p(x | z1).

The parameters of q(z1 | z2, x) and of p(z1 | z2) differ per sample: `rsample(..., batch_dims=2)` draws once from each.
Two more lines make "dreg" right where a layer depends on the one above (Bauer & Mnih 2021, sec. 4): see `q_layers`.

    python examples/recipes/two_layers.py
"""

import sys

import torch
from torch import Tensor, nn
from torch.func import functional_call

import fastelbo
from fastelbo import Posterior
from fastelbo.commands.data import load

M1, M2, K, STEPS, BATCH = 8, 4, 8, 1500, 64


def mlp(first: int, last: int) -> nn.Module:
    return nn.Sequential(nn.Linear(first, 64), nn.Tanh(), nn.Linear(64, last))


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q2, self.q1 = mlp(64, 2 * M2), mlp(64 + M2, 2 * M1)
        self.p1, self.px = mlp(M2, 2 * M1), mlp(M1, 64)

    def q_layers(self, x: Tensor, num_samples: int) -> tuple[list[Posterior], Tensor]:
        """Both posteriors, and a term of value 0: how log q(z1 | z2, x) depends on z2, which "dreg" drops."""
        mu2, logvar2 = self.q2(x).chunk(2, -1)
        seed = torch.randint(2**62, (1,))
        upper = fastelbo.rsample(mu2, logvar2, num_samples, seed=seed)
        # the same samples, whose gradient "dreg" does not scale: what comes from below is scaled there
        z2 = fastelbo.rsample(mu2, logvar2, num_samples, seed=seed).z
        each = x.expand(num_samples, *x.shape)
        mu1, logvar1 = self.q1(torch.cat([each, z2], -1)).chunk(2, -1)
        prior_mu, prior_logvar = self.p1(upper.z).chunk(2, -1)
        lower = fastelbo.rsample(mu1, logvar1, batch_dims=2, prior_mu=prior_mu, prior_logvar=prior_logvar)

        fixed = {name: p.detach() for name, p in self.q1.named_parameters()}
        mu, logvar = functional_call(self.q1, fixed, torch.cat([each, upper.z], -1)).chunk(2, -1)
        log_q = -0.5 * ((lower.z.detach() - mu).square() * torch.exp(-logvar) + logvar).sum(-1)
        return [lower, upper], log_q.detach() - log_q

    def loss(self, x: Tensor, num_samples: int = K, estimator: str = "dreg") -> Tensor:
        layers, restored = self.q_layers(x, num_samples)
        log_likelihood = fastelbo.log_prob(self.px(layers[0].z), x)
        return fastelbo.bound_loss(log_likelihood, layers, estimator=estimator, log_ratio=restored)


def build() -> TwoLayers:
    return TwoLayers()


def loss(model: TwoLayers, x: Tensor) -> Tensor:
    return model.loss(x)


def main() -> int:
    torch.manual_seed(0)
    digits = load("digits")
    x, held_out = digits.train[:].flatten(1), digits.held_out[:].flatten(1)
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    with torch.no_grad():
        start = -model.loss(held_out, 500).item()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(model, x[torch.randint(len(x), (BATCH,))]).backward()
        optimizer.step()
    with torch.no_grad():
        one, many = (-model.loss(held_out, k, "iwae").item() for k in (1, 500))
    print(f"held-out bounds on log p(x), nats: K=1 {one:.2f}, K=500 {many:.2f}; before training {start:.2f}")
    return 0 if many > one > start + 10 else 1


if __name__ == "__main__":
    sys.exit(main())
