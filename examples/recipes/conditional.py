"""Conditional VAE (Sohn et al. 2015): digits of a class that is asked for.

Encoder and decoder take the label as their second argument, and `VAE` hands it to them.

    python examples/recipes/conditional.py
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastelbo import VAE
from fastelbo.commands.data import load

M, CLASSES, STEPS, BATCH = 8, 10, 2000, 100


class OfLabel(nn.Module):
    """A network of its input and a one-hot label."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(first + CLASSES, 128), nn.ReLU(), nn.Linear(128, last))

    def forward(self, t: Tensor, label: Tensor) -> Tensor:
        return self.body(torch.cat([t.flatten(1), label], 1))


def build() -> VAE:
    decoder = OfLabel(M, 64)
    return VAE(OfLabel(64, 2 * M), decoder, latent_shape=(M,))


def loss(model: VAE, x: Tensor, label: Tensor) -> Tensor:
    return model.loss(x, condition=label)


def nearest_class(x: Tensor, train: Tensor, labels: Tensor) -> Tensor:
    """The label of the nearest training digit."""
    return labels[torch.cdist(x, train).argmin(1)]


def main() -> int:
    torch.manual_seed(0)
    digits = load("digits")
    assert torch.from_numpy(digits.train.labels) is not None and torch.from_numpy(digits.held_out.labels) is not None
    x, labels = digits.train[:].flatten(1), torch.from_numpy(digits.train.labels)
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(STEPS):
        batch = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        loss(model, x[batch], F.one_hot(labels[batch], CLASSES).float()).backward()
        optimizer.step()
    wanted = torch.arange(CLASSES).repeat(20)
    drawn = model.sample(len(wanted), F.one_hot(wanted, CLASSES).float(), mean=True)
    right = (nearest_class(drawn, x, labels) == wanted).float().mean().item()
    held_out = digits.held_out[:].flatten(1)
    label = F.one_hot(torch.from_numpy(digits.held_out.labels), CLASSES).float()
    log_prob = model.log_marginal(held_out, 500, condition=label, seed=0).log_prob.mean().item()
    wrong = model.log_marginal(held_out, 500, condition=label.roll(1, 1), seed=0).log_prob.mean().item()
    print(f"samples whose nearest training digit is of the class that was asked for: {right:.0%}")
    print(f"held-out log p(x | label) {log_prob:.2f} nats, with a wrong label {wrong:.2f}")
    return 0 if right > 0.9 and log_prob > wrong + 1 else 1


if __name__ == "__main__":
    sys.exit(main())
