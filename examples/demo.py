"""Trains one VAE on the digits twice, with the fused kernels and with plain PyTorch, and compares curves and times.

Both runs have the same initial weights, batches and noise. They alternate epoch by epoch, so that other load on the
machine affects both alike. A third run with another seed shows how much the result depends on the seed.

    python examples/demo.py [DIR]        writes pictures to DIR (default: runs/demo)
"""

import statistics
import sys
from pathlib import Path

from fastelbo.commands import pictures
from fastelbo.commands.train import Config, Trainer

EPOCHS = 60
FIRST_STEPS = 10
ROUNDING = 2e-6  # 16 float32 roundings, relative
LAST_EPOCHS = 10


def held_out(run: Trainer) -> list[float]:
    return [row["held_out_elbo"] for row in run.history]


def largest(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def verdict(good: bool) -> str:
    return "yes" if good else "NO"


def main() -> int:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    fused = Trainer(Config(latent_dim=2, epochs=EPOCHS))
    plain = Trainer(Config(latent_dim=2, epochs=EPOCHS, impl="reference"))
    other = Trainer(Config(latent_dim=2, epochs=EPOCHS, seed=1))

    print(f"VAE, 2 latent dimensions, {len(fused.data.train)} training and {len(fused.data.held_out)} held-out digits")
    print("ELBO in nats per datum")
    print("epoch    training                held-out")
    print("            fused   reference       fused   reference  difference")
    for epoch in range(1, EPOCHS + 1):
        turns = (fused, plain, other) if epoch % 2 else (plain, fused, other)
        for run in turns:
            run.run_epoch()
        a, b = fused.history[-1], plain.history[-1]
        figures = (a["train_elbo"], b["train_elbo"], a["held_out_elbo"], b["held_out_elbo"])
        difference = abs(a["held_out_elbo"] - b["held_out_elbo"])
        print(f"{epoch:5d}" + "".join(f"{figure:12.4f}" for figure in figures) + f"{difference:12.1e}", flush=True)

    steps = zip(fused.step_losses[:FIRST_STEPS], plain.step_losses[:FIRST_STEPS], strict=True)
    rounding = max(abs(x - y) / abs(y) for x, y in steps)
    ends = [statistics.mean(held_out(run)[-LAST_EPOCHS:]) for run in (fused, plain, other)]
    between_impls, between_seeds = largest(held_out(fused), held_out(plain)), largest(held_out(fused), held_out(other))
    same_start, same_end = rounding <= ROUNDING, abs(ends[0] - ends[1]) <= between_seeds
    print(
        f"\nthe loss of the first {FIRST_STEPS} steps agrees to float32 rounding: {verdict(same_start)} "
        f"(largest relative difference {rounding:.1e}, allowed {ROUNDING:.0e})\n"
        f"held-out ELBO, mean of the last {LAST_EPOCHS} epochs: fused {ends[0]:.3f}, reference {ends[1]:.3f}, "
        f"fused with another seed {ends[2]:.3f}\n"
        f"largest difference at any epoch: {between_impls:.3f} between fused and reference, "
        f"{between_seeds:.3f} between seeds;\n"
        "  rounding differences grow during training; at the end fused and reference differ by no more than two seeds "
        f"do: {verdict(same_end)}\n"
    )

    for name, run in (("fused", fused), ("reference", plain)):
        step = 1e3 * statistics.median(run.step_times)
        share = statistics.median(row["loss_share"] for row in run.history)
        print(
            f"{name:9s}  {step:.3f} ms per step (median of {len(run.step_times)}), sampling and loss {share:.0%} of it"
        )
    print("  In a model of this size (B = 64, D = 64), encoder, decoder and Adam take most of the step.")
    print("  The reference is written for clarity, not for speed, and the time of its noise is not counted.")

    out.mkdir(parents=True, exist_ok=True)
    for path in pictures.save_all(fused.model, fused.data, fused.history, out):
        print(f"picture: {path}")
    return 0 if same_start and same_end else 1


if __name__ == "__main__":
    sys.exit(main())
