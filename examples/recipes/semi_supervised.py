"""Semi-supervised learning with the model M2 (Kingma et al. 2014): 50 labels of 1,437 digits.

p(x | y, z) p(y) p(z), q(y | x) q(z | x, y). A label that is there is the condition. One that is not is summed out: the
loss of every class, weighted by q(y | x), minus the entropy of q(y | x) (their eq. 7), with classes in the batch.

    python examples/recipes/semi_supervised.py
"""

import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastelbo import VAE
from fastelbo.commands.data import load

M, CLASSES, LABELS, STEPS, BATCH = 8, 10, 50, 2000, 64
WEIGHT = 30.0  # of the classifier's own loss on labeled data, their alpha


class OfLabel(nn.Module):
    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(first + CLASSES, 128), nn.ReLU(), nn.Linear(128, last))

    def forward(self, t: Tensor, label: Tensor) -> Tensor:
        return self.body(torch.cat([t, label], 1))


class M2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, CLASSES))
        self.vae = VAE(OfLabel(64, 2 * M), OfLabel(M, 64), latent_shape=(M,))

    def labeled(self, x: Tensor, y: Tensor) -> Tensor:
        label = F.one_hot(y, CLASSES).to(x.dtype)
        bound = self.vae.loss(x, condition=label) + math.log(CLASSES)
        return bound + WEIGHT * F.cross_entropy(self.classifier(x), y)

    def unlabeled(self, x: Tensor) -> Tensor:
        log_q = torch.log_softmax(self.classifier(x), 1)  # [B, CLASSES]
        every = torch.eye(CLASSES).repeat(len(x), 1)  # [B * CLASSES, CLASSES]
        each = self.vae.loss(x.repeat_interleave(CLASSES, 0), condition=every, reduction="none").view_as(log_q)
        return (log_q.exp() * (each + math.log(CLASSES) + log_q)).sum(1).mean()

    def loss(self, x: Tensor, labeled: Tensor, y: Tensor) -> Tensor:
        return self.unlabeled(x) + self.labeled(labeled, y)


def build() -> M2:
    return M2()


def loss(model: M2, x: Tensor, labeled: Tensor, y: Tensor) -> Tensor:
    return model.loss(x, labeled, y)


def accuracy(classifier: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return (classifier(x).argmax(1) == y).float().mean().item()


def main() -> int:
    torch.manual_seed(0)
    digits = load("digits")
    assert torch.from_numpy(digits.train.labels) is not None and torch.from_numpy(digits.held_out.labels) is not None
    x, y = digits.train[:].flatten(1), torch.from_numpy(digits.train.labels)
    chosen = torch.cat([(y == c).nonzero().flatten()[: LABELS // CLASSES] for c in range(CLASSES)])
    model, alone = build(), build().classifier
    optimizer = torch.optim.Adam([*model.parameters(), *alone.parameters()], lr=1e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(model, x[torch.randint(len(x), (BATCH,))], x[chosen], y[chosen]).backward()
        F.cross_entropy(alone(x[chosen]), y[chosen]).backward()
        optimizer.step()
    held_out = digits.held_out[:].flatten(1), torch.from_numpy(digits.held_out.labels)
    with_unlabeled, without = accuracy(model.classifier, *held_out), accuracy(alone, *held_out)
    print(f"held-out accuracy with {LABELS} labels: {with_unlabeled:.1%}; a classifier of these alone {without:.1%}")
    return 0 if with_unlabeled > without else 1


if __name__ == "__main__":
    sys.exit(main())
