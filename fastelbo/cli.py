"""The `fastelbo` command: `fastelbo train` fits a small VAE, `fastelbo info` prints what was built."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import fastelbo
from fastelbo import training
from fastelbo.data import BUILT_IN
from fastelbo.likelihoods import LIKELIHOODS
from fastelbo.training import IMPLS, Config, Metrics
from fastelbo.vae import OBJECTIVES

TRAIN_EXTRA = ("numpy", "sklearn", "matplotlib", "tqdm")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> _Parser:
    parser = _Parser("fastelbo", description="Fused losses for latent-variable models.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,info}")
    commands.add_parser("info", help="print what was built, for bug reports")
    train = commands.add_parser(
        "train",
        help="train a small VAE, with pictures",
        description="Train a small dense VAE. Writes metrics.csv, checkpoint.pt and pictures.",
        argument_default=argparse.SUPPRESS,  # a resumed run must tell the options that were given
        allow_abbrev=False,
    )
    defaults = Config()

    def option(flag: str, dest: str, text: str, **settings: Any) -> None:
        default = getattr(defaults, dest)
        text = text if default is None else f"{text} (default: {default})"
        train.add_argument(flag, dest=dest, help=text, **settings)

    option("--data", "data", f"{', '.join(BUILT_IN)}, or an .npy or .npz file of arrays [N, ...]", metavar="DATA")
    option("--objective", "objective", "what is maximized", choices=OBJECTIVES)
    option("--samples", "num_samples", "K, samples per datum", type=int, metavar="K")
    option("--likelihood", "likelihood", "p(x | z); the data decide where it is not given", choices=LIKELIHOODS)
    option("--latent-dim", "latent_dim", "M, latent dimensions", type=int, metavar="M")
    option("--hidden", "hidden", "width of the hidden layers", type=int, metavar="N")
    option("--epochs", "epochs", "passes over the training data", type=int, metavar="N")
    option("--batch-size", "batch_size", "B, data per step", type=int, metavar="B")
    option("--lr", "lr", "Adam's step size", type=float, metavar="LR")
    option("--seed", "seed", "of weights, batches and noise", type=int, metavar="SEED")
    option("--impl", "impl", "the kernels, or plain PyTorch", choices=IMPLS)
    train.add_argument("--out", type=Path, default=Path("runs/train"), metavar="DIR", help="default: runs/train")
    train.add_argument("--resume", action="store_true", default=False, help="continue the run in DIR, with its options")
    return parser


def _line(row: Metrics, config: Config) -> str:
    bound = "" if config.objective == "elbo" else f"  {config.objective} bound {row['held_out_bound']:8.3f}"
    return (
        f"epoch {row['epoch']:{len(str(config.epochs))}.0f}/{config.epochs}  train ELBO {row['train_elbo']:8.3f}  "
        f"held-out ELBO {row['held_out_elbo']:8.3f}{bound}  log p(x|z) {row['held_out_log_likelihood']:8.3f}  "
        f"KL {row['held_out_kl']:6.3f}  {row['ms_per_step']:.2f} ms/step, loss {row['loss_share']:.0%}"
    )


def _train(args: argparse.Namespace, parser: _Parser) -> int:
    out: Path = args.out
    missing = [name for name in TRAIN_EXTRA if find_spec(name) is None]
    if missing:
        print(f"fastelbo train needs {', '.join(missing)}: pip install fastelbo[train]", file=sys.stderr)
        return 2
    from fastelbo import plots

    options = {field.name: getattr(args, field.name) for field in fields(Config) if field.name in args}
    if "data" in options and options["data"] not in BUILT_IN:
        options["data"] = str(Path(options["data"]).resolve())  # a run may be resumed from another folder
    try:
        saved = training.read_checkpoint(out)["config"] if args.resume else {}
        trainer = training.prepare(Config(**(saved | options)), out, resume=args.resume)
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, TypeError, OSError) as error:
        parser.exit(2, f"fastelbo train: error: {error}\n")
    config, data = trainer.config, trainer.data
    print(
        f"{config.data}: {len(data.train)} training and {len(data.held_out)} held-out data of shape "
        f"{tuple(data.train.shape[1:])}, likelihood {config.likelihood}; {config.impl}; figures in nats per datum"
    )
    if trainer.history:
        print(f"resumed after epoch {len(trainer.history)}")
    try:
        training.fit(trainer, out, lambda row: print(_line(row, config), flush=True))
    except training.Diverged as error:
        print(f"fastelbo train: {error}", file=sys.stderr)
        return 1
    pictures = plots.save_all(trainer.model, data, trainer.history, out)
    print(f"in {out}: metrics.csv, checkpoint.pt, {', '.join(path.name for path in pictures)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command -> its exit status: 0, 1 (training diverged), 2 (bad arguments), 130 (interrupted)."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command == "info":
        print(json.dumps(fastelbo.build_info(), indent=2, default=str))
        return 0
    try:
        return _train(args, parser)
    except KeyboardInterrupt:
        print(f"interrupted: --resume --out {args.out} goes on after the last whole epoch", file=sys.stderr)
        return 130
