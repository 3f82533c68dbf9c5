"""Text with a categorical likelihood, which the library has not: `bound_loss` takes log p(x | z) from anywhere.

The text is the documentation that Python bundles (pydoc_data), cut into pieces of 24 characters.

    python examples/recipes/text.py
"""

import sys
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastelbo

ALPHABET = " abcdefghijklmnopqrstuvwxyz.,"
M, K, LENGTH, STEPS, BATCH = 16, 5, 24, 1500, 64


def pieces() -> Tensor:
    """[N, LENGTH], int64: places in ALPHABET."""
    text = "".join(topics[name] for name in sorted(topics)).lower()
    text = " ".join("".join(c if c in ALPHABET else " " for c in text).split())
    codes = torch.tensor([ALPHABET.index(c) for c in text])
    whole = codes[: len(codes) // LENGTH * LENGTH].view(-1, LENGTH)
    return whole[torch.randperm(len(whole))]


class TextVAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.Embedding(len(ALPHABET), 16)
        self.encoder = nn.Sequential(nn.Linear(16 * LENGTH, 256), nn.ReLU(), nn.Linear(256, 2 * M))
        self.decoder = nn.Sequential(nn.Linear(M, 256), nn.ReLU(), nn.Linear(256, LENGTH * len(ALPHABET)))

    def loss(self, x: Tensor, num_samples: int = K, kl_weight: float | Tensor = 1.0) -> Tensor:
        q = fastelbo.rsample(*self.encoder(self.letters(x).flatten(1)).chunk(2, -1), num_samples)
        logits = self.decoder(q.z).unflatten(-1, (LENGTH, len(ALPHABET)))  # [K, B, LENGTH, letters]
        targets = x.expand(num_samples, *x.shape)
        nll = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none").view_as(targets)
        return fastelbo.bound_loss(-nll.sum(-1), q, estimator="dreg", kl_weight=kl_weight)


def build() -> TextVAE:
    return TextVAE()


def loss(model: TextVAE, x: Tensor, kl_weight: float | Tensor = 1.0) -> Tensor:
    return model.loss(x, kl_weight=kl_weight)


def main() -> int:
    torch.manual_seed(0)
    x = pieces()
    held_out, x = x[:500], x[500:]
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(STEPS):
        optimizer.zero_grad()
        annealed = torch.tensor(min(1.0, 0.1 + 2 * step / STEPS))  # a tensor: no new graph under torch.compile
        loss(model, x[torch.randint(len(x), (BATCH,))], annealed).backward()
        optimizer.step()
    with torch.no_grad():
        per_letter = model.loss(held_out, 200).item() / LENGTH
    frequencies = x.flatten().bincount(minlength=len(ALPHABET)) / x.numel()
    unigram = -torch.log(frequencies[held_out]).mean().item()
    print(f"held-out nats per letter, {len(x)} pieces: {per_letter:.3f}; by the letters' frequencies {unigram:.3f}")
    return 0 if per_letter < unigram else 1


if __name__ == "__main__":
    sys.exit(main())
