"""The `fastelbo` command: train a small VAE or fit a PPCA, evaluate or sample one, print what was built."""

import argparse
import io
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

import fastelbo
from fastelbo import nets
from fastelbo.commands import data, evaluate, files, options, ppca, train
from fastelbo.commands.data import BUILT_IN
from fastelbo.commands.ppca import PPCAConfig
from fastelbo.commands.train import IMPLS, Config, Metrics
from fastelbo.likelihoods import LIKELIHOODS
from fastelbo.models.diagnostics import ACTIVE_VARIANCE
from fastelbo.models.vae import OBJECTIVES
from fastelbo.ppca import PPCA
from fastelbo.ppca.model import METHODS

MODELS = ("vae", "ppca")
LOGGERS = ("tensorboard",)
SETTLED = 5  # epochs before which a dimension that is not active yet is no collapse
TRAIN_EXTRA = ("numpy", "sklearn", "matplotlib", "tqdm")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


EXAMPLES = """\
examples:
  fastelbo train --objective iwae --samples 50 --keep 8
  fastelbo train --data mnist.npz --net conv --epochs 20 --patience 3 --out runs/mnist
  fastelbo train --config runs/mnist/config.json --seed 1 --out runs/again
  fastelbo train --model ppca --data patches
  torchrun --nproc-per-node 2 -m fastelbo train --data mnist.npz
"""


def _keep(text: str) -> int | str:
    return text if text == "auto" else int(text)


_keep.__name__ = 'int or "auto"'  # as argparse names it in errors


def _parser() -> _Parser:
    parser = _Parser("fastelbo", description="Fused losses for latent-variable models.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"fastelbo {fastelbo.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,evaluate,sample,info}")
    commands.add_parser("info", help="print what was built, for bug reports")
    training = commands.add_parser(
        "train",
        help="train a small VAE, or fit a PPCA, with pictures",
        description="Train a small VAE, or fit probabilistic PCA. Writes metrics.csv, config.json, checkpoint.pt and\n"
        "pictures. --model ppca takes --data, --latent-dim, --method, --seed, --config and --out alone.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # a resumed run must tell which options were set
        allow_abbrev=False,
    )
    defaults = Config()

    def option(flag: str, dest: str, text: str, **settings: Any) -> None:
        default = getattr(defaults, dest)
        text = text if default is None else f"{text} (default: {default})"
        training.add_argument(flag, dest=dest, help=text, **settings)

    training.add_argument("--model", choices=MODELS, default="vae", help="default: vae")
    built_in = ", ".join(f"{name} (generated)" if row.generated else name for name, row in BUILT_IN.items())
    option("--data", "data", f"{built_in}, or an .npy, .npz or .h5ad file of arrays [N, ...]", metavar="DATA")
    option("--test-data", "test_data", "a file of held-out data; by default a tenth of --data", metavar="FILE")
    option("--objective", "objective", "what is maximized", choices=OBJECTIVES)
    option("--samples", "num_samples", "K, samples per datum", type=int, metavar="K")
    option("--beta", "beta", "elbo: weight of the KL (1); ciwae: weight of the ELBO (0.5)", type=float, metavar="BETA")
    option("--beta-warmup", "beta_warmup", "epochs in which the KL's weight rises from 0", type=int, metavar="N")
    option("--free-bits", "free_bits", "floor in nats of every latent dimension's KL", type=float, metavar="NATS")
    option("--alpha", "alpha", "of objective vr", type=float, metavar="ALPHA")
    option("--groups", "groups", "of objective miwae: groups of K / N samples", type=int, metavar="N")
    option("--keep", "keep", "of the K samples, how many are back-propagated; or auto", type=_keep, metavar="N")
    option("--likelihood", "likelihood", "p(x | z); by default the data decide", choices=LIKELIHOODS)
    option("--latent-dim", "latent_dim", "M, latent dimensions", type=int, metavar="M")
    option("--hidden", "hidden", "width of the hidden layers", type=int, metavar="N")
    option("--epochs", "epochs", "passes over the training data", type=int, metavar="N")
    option("--batch-size", "batch_size", "B, data per step", type=int, metavar="B")
    option("--lr", "lr", "Adam's step size", type=float, metavar="LR")
    option("--lr-schedule", "lr_schedule", "of the step size over all epochs", choices=train.LR_SCHEDULES)
    option(
        "--patience",
        "patience",
        "stop after N epochs without a better held-out bound; best.pt holds the best epoch",
        type=int,
        metavar="N",
    )
    option("--net", "net", "dense layers, or convolutions for images", choices=nets.NETS)
    option("--amp", "amp", "autocast of the training steps", choices=train.AMP)
    option("--device", "device", "auto is cuda where torch sees a GPU", choices=train.DEVICES)
    training.add_argument("--method", choices=METHODS, help="of ppca: the closed form (default), or EM")
    option("--seed", "seed", "of weights, batches and noise", type=int, metavar="SEED")
    option("--impl", "impl", "the kernels, or plain PyTorch", choices=IMPLS)
    training.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="a TOML file of options, or the config.json of a run; flags go first",
    )
    training.add_argument(
        "--logger", choices=LOGGERS, help="also write every figure there, into DIR; needs pip install tensorboard"
    )
    training.add_argument("--out", type=Path, default=Path("runs/train"), metavar="DIR", help="default: runs/train")
    training.add_argument(
        "--resume", action="store_true", default=False, help="continue the run in DIR, with its options"
    )
    evaluation = commands.add_parser(
        "evaluate",
        help="held-out log p(x) of a trained model",
        description="Estimate log p(x) of held-out data by importance sampling, beside the ELBO; of a PPCA, exactly.",
        allow_abbrev=False,
    )
    evaluation.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint.pt, or the folder of a run"
    )
    evaluation.add_argument("--data", metavar="DATA", help="as in train; by default the data of the run")
    evaluation.add_argument("--samples", type=int, default=5000, metavar="K", help="samples per datum (default: 5000)")
    evaluation.add_argument("--chunk-size", type=int, metavar="K", help="at most so many samples in memory at a time")
    evaluation.add_argument("--seed", type=int, default=0, metavar="SEED", help="of the noise (default: 0)")
    evaluation.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    sampling = commands.add_parser(
        "sample",
        help="draw data from a trained model",
        description="Draw x from a trained model, z from its prior, and write them to an .npy file.",
        allow_abbrev=False,
    )
    sampling.add_argument("checkpoint", type=Path, metavar="RUN", help="the folder of a run, or a checkpoint.pt")
    sampling.add_argument("--n", type=int, default=64, metavar="N", help="how many (default: 64)")
    sampling.add_argument("--mean", action="store_true", help="the mean of p(x | z) in place of a draw")
    sampling.add_argument("--seed", type=int, default=0, metavar="SEED", help="of the draws (default: 0)")
    sampling.add_argument("--out", type=Path, default=Path("samples.npy"), metavar="FILE", help="default: samples.npy")
    return parser


def _line(row: Metrics, config: Config) -> str:
    bound = "" if config.objective == "elbo" else f"  {config.objective} bound {row['held_out_bound']:8.3f}"
    ess = "" if config.num_samples == 1 else f"  ESS {row['ess']:.1f}/{config.num_samples}"
    if config.keep is not None:
        ess += f", 99 % of the weight in {row['samples_99']:.1f}, {row['kept_share']:.0%} kept"
    return (
        f"epoch {row['epoch']:{len(str(config.epochs))}.0f}/{config.epochs}  train ELBO {row['train_elbo']:8.3f}  "
        f"held-out ELBO {row['held_out_elbo']:8.3f}{bound}  log p(x|z) {row['held_out_log_likelihood']:8.3f}  "
        f"KL {row['held_out_kl']:6.3f}  {row['active_units']:.0f}/{config.latent_dim} units active"
        f"{ess}  {row['ms_per_step']:.2f} ms/step, loss {row['loss_share']:.0%}"
    )


def _collapse(since: dict[int, int]) -> str:
    epochs = sorted(set(since.values()))
    named = "; ".join(
        f"{', '.join(str(d) for d, e in sorted(since.items()) if e == n)} since epoch {n}" for n in epochs
    )
    return (
        f"posterior collapse (held-out variance of mu at most {ACTIVE_VARIANCE}) in latent dimensions {named}; "
        "--beta-warmup, --free-bits or a smaller --latent-dim may help"
    )


def _options(args: argparse.Namespace, config: type) -> dict[str, Any]:
    """The arguments that were set and are fields of the config, over those of the file `--config`."""
    names = [field.name for field in fields(config)]
    found: dict[str, Any] = {}
    if "config" in args:
        found = files.read_config(args.config, ["model", *names])
        if found.pop("model", args.model) != args.model:
            raise ValueError(f"{args.config} is of another model: give --model as there")
    found |= {name: getattr(args, name) for name in names if name in args}
    for name in ("data", "test_data"):
        if name in found and found[name] not in BUILT_IN:
            found[name] = str(Path(found[name]).resolve())  # a run may be resumed from another folder
    return found


@contextmanager
def _refusing(
    args: argparse.Namespace, kinds: tuple[type[Exception], ...] = (ValueError, TypeError, OSError)
) -> Iterator[None]:
    """Errors of these kinds, by default those about arguments and files, end the command with one line on stderr."""
    try:
        yield
    except kinds as error:
        print(f"fastelbo {args.command}: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        raise SystemExit(2) from error


def _interrupted(what: str) -> int:
    print(f"interrupted: {what}", file=sys.stderr)
    return 130


def _fit_ppca(args: argparse.Namespace) -> int:
    from fastelbo.commands import pictures

    out: Path = args.out
    mine = {field.name for field in fields(PPCAConfig)} | {"out", "model", "command", "config"}
    with _refusing(args):
        foreign = [name for name, value in vars(args).items() if name not in mine and value is not False]
        if foreign or args.resume:
            raise ValueError(f"{', '.join(foreign) or 'resume'} has no effect with model 'ppca': leave it out")
        run = ppca.Run(PPCAConfig(**_options(args, PPCAConfig)))
        if (out / "checkpoint.pt").exists():
            raise FileExistsError(f"{out} already holds a run: write to another directory")
    try:
        print(
            f"{run.config.data}: {len(run.train)} training and {len(run.held_out)} held-out data of shape "
            f"{tuple(run.data.train.shape[1:])}; PPCA by {run.config.method}; log p(x) in nats per datum"
        )
        with _refusing(args):
            run.fit(
                out,
                lambda row: print(
                    f"{row['components']:4.0f} components  log p(x): training {row['train_log_prob']:9.3f}  "
                    f"held-out {row['held_out_log_prob']:9.3f}  BIC {row['bic']:12.1f}  sigma {row['sigma']:.4f}"
                    + (f"  {row['steps']:.0f} steps" if row["steps"] else ""),
                    flush=True,
                ),
            )
        assert run.model is not None
        if len(run.rows) > 1:
            largest = run.model.n_components == run.rows[-1]["components"]
            more = ", which is the largest number tried: more may be better" if largest else ""
            print(f"kept: {run.model.n_components} components, the lowest BIC{more}")
        made = pictures.save_ppca(run.model, run.data, run.rows, out)
    except KeyboardInterrupt:
        if (out / "checkpoint.pt").exists():
            return _interrupted(f"the model is in {out}, its pictures are not all there")
        return _interrupted("no model was written")
    print(f"in {out}: metrics.csv, config.json, checkpoint.pt, {', '.join(path.name for path in made)}")
    return 0


def _logger(args: argparse.Namespace, epochs: int) -> Callable[[Metrics], None] | None:
    """Writes a row of figures as scalars into the folder of the run; those of epochs after `epochs` are dropped."""
    if "logger" not in args:
        return None
    if find_spec("tensorboard") is None:
        raise ValueError("logger 'tensorboard' needs the package of that name: pip install tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(args.out), purge_step=epochs + 1)

    def write(row: Metrics) -> None:
        for name, value in row.items():
            if name != "epoch":
                writer.add_scalar(name, value, int(row["epoch"]))
        writer.flush()

    return write


def _fit_vae(args: argparse.Namespace) -> int:
    from fastelbo.commands import pictures

    out: Path = args.out
    with _refusing(args):
        changes = _options(args, Config)
        if "method" in args:
            raise ValueError("method has no effect with model 'vae': leave it out")
        config = Config()
        if args.resume:
            saved = files.read_checkpoint(out)
            if saved["model_kind"] != "vae":
                raise ValueError(f"the run is one of model {saved['model_kind']!r}, which is not resumed")
            with files.reading(out / "checkpoint.pt", files.CHECKPOINT):
                config = Config(**saved["config"])
        trainer = train.prepare(replace(config, **changes), out, resume=args.resume)
        log = None if trainer.rank else _logger(args, len(trainer.history))
    config, dataset = trainer.config, trainer.data
    if config.data in BUILT_IN and (source := BUILT_IN[config.data].generated):
        print(f"{config.data}: generated, not measured: {source}")
    print(
        f"{config.data}: {len(dataset.train)} training and {len(dataset.held_out)} held-out data of shape "
        f"{tuple(dataset.train.shape[1:])}, likelihood {config.likelihood}; {config.impl} on {trainer.device}; "
        "figures in nats per datum"
    )
    if trainer.history:
        print(f"resumed after epoch {len(trainer.history)}")
    if len(trainer.history) >= config.epochs:
        print(f"nothing to train: all {config.epochs} epochs are done; --epochs N trains up to epoch N")
    collapsed = train.collapses(trainer.history)
    told: set[int] = set()

    def report(row: Metrics) -> None:
        nonlocal collapsed
        print(_line(row, config), flush=True)
        if log is not None:
            log(row)
        collapsed = train.collapses([row], collapsed)
        settled = row["epoch"] >= max(SETTLED, config.beta_warmup + 1)
        if settled and collapsed.keys() - told:
            told.update(collapsed)
            print(_collapse(collapsed), flush=True)

    try:
        train.fit(trainer, out, report)
        if trainer.rank:
            return 0
        if len(trainer.history) < config.epochs:
            print(f"stopped: no better held-out bound in {config.patience} epochs; best.pt is epoch {trainer.best}")
        if collapsed and config.epochs >= SETTLED:
            print(f"at the end: {_collapse(collapsed)}")
        made = pictures.save_all(trainer.model.cpu(), dataset, trainer.history, out)
        if all(path.stem != "reconstructions" for path in made):
            print(f"no pictures of data and samples: {tuple(dataset.train.shape[1:])} is not the shape of an image")
    except train.Diverged as error:
        print(f"fastelbo train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if (out / "checkpoint.pt").exists():
            return _interrupted(f"--resume --out {shlex.quote(str(out))} goes on after the last whole epoch")
        return _interrupted("no epoch was finished, so that there is nothing to resume")
    print(f"in {out}: metrics.csv, config.json, checkpoint.pt, {', '.join(path.name for path in made)}")
    return 0


def _train(args: argparse.Namespace) -> int:
    missing = [name for name in TRAIN_EXTRA if find_spec(name) is None]
    if missing:
        print(f"fastelbo train needs {', '.join(missing)}: pip install fastelbo[train]", file=sys.stderr)
        return 2
    with _refusing(args), _processes(args) as rank:
        # the first process writes, and prints what there is to say
        locked = files.locked(args.out) if rank == 0 else nullcontext()
        quiet = nullcontext() if rank == 0 else redirect_stdout(io.StringIO())
        with _refusing(args, (OSError,)), locked, quiet:
            return _fit_ppca(args) if args.model == "ppca" else _fit_vae(args)


@contextmanager
def _processes(args: argparse.Namespace) -> Iterator[int]:
    """The process group that torchrun asks for -> the rank of this process; 0 without one."""
    count = os.environ.get("WORLD_SIZE", "1")
    if not count.isdecimal() or int(count) < 2:
        yield 0
        return
    if args.model == "ppca":
        raise ValueError(f"model 'ppca' takes one process here; torchrun, by WORLD_SIZE, started {count}")
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def _evaluate(args: argparse.Namespace) -> int:
    if find_spec("numpy") is None or find_spec("sklearn") is None:
        print("fastelbo evaluate needs numpy and sklearn: pip install fastelbo[train]", file=sys.stderr)
        return 2
    with _refusing(args):
        options.check(num_samples=args.samples, chunk_size=args.chunk_size, seed=args.seed)
        saved = files.read_checkpoint(args.checkpoint)
        is_ppca = saved["model_kind"] == "ppca"
        with files.reading(args.checkpoint, files.CHECKPOINT):
            trained, test_data = str(saved["config"]["data"]), saved["config"].get("test_data")
            likelihood = None if is_ppca else str(saved["config"]["likelihood"])
            event, epoch = tuple(saved["data"]["shape"][1:]), None if is_ppca else int(saved["epoch"])
            model = ppca.model_of(saved) if is_ppca else train.model_of(saved)
        name, test_data = (trained, test_data) if args.data is None else (args.data, None)
        dataset = data.load(name, likelihood or "gaussian", test_data=test_data, missing=is_ppca)
        if args.data is None:
            data.check_unchanged(test_data or name, dataset, saved["data"])
        if event != tuple(dataset.held_out.shape[1:]):
            raise ValueError(f"data must be of shape {event} as in training; got {tuple(dataset.held_out.shape[1:])}")
        if isinstance(model, PPCA):
            mean, error = ppca.evaluate(model, dataset.held_out)
            if args.json:
                print(json.dumps({"data": name, "log_prob": mean, "data_error": error}))
                return 0
            print(
                f"{name}: {len(dataset.held_out)} held-out data, PPCA with {model.n_components} components; nats per "
                f"datum\nlog p(x)         {mean:10.4f}  exactly; standard error {error:.4f} by the choice of data"
            )
            return 0
        found = evaluate.evaluate(model, dataset.held_out, args.samples, seed=args.seed, chunk_size=args.chunk_size)
    if args.json:
        print(json.dumps({"data": name, "samples": args.samples, "epoch": epoch, **found._asdict()}))
        return 0
    print(
        f"{name}: {len(dataset.held_out)} held-out data, "
        f"{args.samples} samples each, after epoch {epoch}; nats per datum\n"
        f"log p(x)         {found.log_prob:10.4f}  standard error {found.sampling_error:.4f} by sampling, "
        f"{found.data_error:.4f} by the choice of data\n"
        f"ELBO             {found.elbo:10.4f}  on the same samples\n"
        f"log p(x) - ELBO  {found.log_prob - found.elbo:10.4f}  the KL of q(z | x) from the posterior\n"
        f"mean ESS         {found.ess:10.1f}  of {args.samples}; the largest weight is {found.max_weight:.1%} of all\n"
        f"active units     {found.active_units:10d}  of {found.latent_dim}"
    )
    return 0


def _sample(args: argparse.Namespace) -> int:
    if find_spec("numpy") is None:
        print("fastelbo sample needs numpy: pip install fastelbo[train]", file=sys.stderr)
        return 2
    import numpy as np

    with _refusing(args):
        options.check(num_samples=args.n, seed=args.seed)
        model = fastelbo.load(args.checkpoint)
        generator = torch.Generator().manual_seed(args.seed)
        if isinstance(model, PPCA):
            if args.mean:
                raise ValueError("mean has no effect with a PPCA: leave it out")
            drawn = model.sample(args.n, generator=generator)
        else:
            drawn = model.sample(args.n, mean=args.mean, generator=generator)
        content = io.BytesIO()
        np.save(content, drawn.numpy())
        files.write(args.out, content.getvalue())
    print(f"{args.out}: {args.n} samples of shape {tuple(drawn.shape[1:])}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command -> its exit status: 0, 1 (training diverged), 2 (bad arguments), 130 (interrupted)."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command == "info":
        print(json.dumps(fastelbo.build_info(), indent=2, default=str))
        return 0
    try:
        return {"evaluate": _evaluate, "sample": _sample, "train": _train}[args.command](args)
    except KeyboardInterrupt:
        return _interrupted("nothing was written")
