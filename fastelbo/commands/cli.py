"""The `fastelbo` command: train a small VAE or fit a PPCA, evaluate or sample one, print what was built."""

import argparse
import io
import json
import math
import os
import shlex
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist

import fastelbo
from fastelbo._internal.arguments import count, integer
from fastelbo._internal.progress import progress
from fastelbo._internal.streams import printing, say
from fastelbo.commands import data, files, options, ppca, train
from fastelbo.commands.ppca import PPCAConfig
from fastelbo.commands.train import Config, Metrics
from fastelbo.data.built_in import BUILT_IN
from fastelbo.data.dataset import Dataset
from fastelbo.models.diagnostics import ACTIVE_VARIANCE
from fastelbo.ppca import PPCA

# of each model, its options, and the flags of `train` beside them
MODELS: dict[str, tuple[type, set[str]]] = {"vae": (Config, {"resume", "logger"}), "ppca": (PPCAConfig, set())}
FLAGS = {"command", "model", "config", "out"}  # of every model
PACKAGES = {"train": ("numpy", "sklearn", "matplotlib", "tqdm"), "evaluate": ("numpy", "sklearn"), "sample": ("numpy",)}
PIECE = (10_000, 1 << 25)  # of samples that are drawn at a time: at most so many rows, and about so many numbers
SETTLED = 5  # epochs before which a dimension that is not active yet is no collapse


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        say(f"{self.prog}: error: {message}")
        raise SystemExit(2)

    def _print_message(self, message: str, file: Any = None) -> None:
        print(message, end="", file=file)  # argparse would swallow what a full disk says


EXAMPLES = """\
examples:
  fastelbo train --objective iwae --samples 50 --keep 8
  fastelbo train --data mnist.npz --net conv --epochs 20 --patience 3 --out runs/mnist
  fastelbo train --config runs/mnist/config.json --seed 1 --out runs/again
  fastelbo train --model ppca --data patches
  torchrun --nproc-per-node 2 -m fastelbo train --data mnist.npz
"""


def _parser() -> _Parser:
    parser = _Parser("fastelbo", description="Fused losses for latent-variable models.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"fastelbo {fastelbo.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,evaluate,sample,info}")
    commands.add_parser("info", help="print what was built, for bug reports")
    add = commands.add_parser(
        "train",
        help="train a small VAE, or fit a PPCA, with pictures",
        description="Train a small VAE, or fit probabilistic PCA. Writes metrics.csv, config.json, checkpoint.pt and\n"
        "pictures. --model ppca takes --data, --latent-dim, --method, --seed, --config and --out alone.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # a resumed run must tell which options were set
        allow_abbrev=False,
    ).add_argument
    add("--model", choices=MODELS, default="vae", help="default: vae")
    options.add_flags(add, Config, PPCAConfig)
    config = "a TOML file of options, or the config.json of a run; flags go first"
    add("--config", type=Path, metavar="FILE", help=config)
    logger = "also write every figure there, into DIR; needs pip install tensorboard"
    add("--logger", choices=("tensorboard",), help=logger)
    add("--out", type=Path, default=Path("runs/train"), metavar="DIR", help="default: runs/train")
    add("--resume", action="store_true", help="continue the run in DIR, with its options")
    add = commands.add_parser(
        "evaluate",
        help="held-out log p(x) of a trained model",
        description="Estimate log p(x) of held-out data by importance sampling, beside the ELBO; of a PPCA, exactly.",
        allow_abbrev=False,
    ).add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint.pt, or the folder of a run")
    add("--data", metavar="DATA", help="all of these, as in train; by default what the run held out")
    add("--layer", metavar="NAME", help="as in train; by default that of the run")
    add("--samples", type=int, default=5000, metavar="K", help="samples per datum (default: 5000)")
    add("--chunk-size", type=int, metavar="K", help="at most so many samples in memory at a time")
    add("--seed", type=int, default=0, metavar="SEED", help="of the noise (default: 0)")
    add("--json", action="store_true", help="print one JSON object, for programs")
    add = commands.add_parser(
        "sample",
        help="draw data from a trained model",
        description="Draw x from a trained model, z from its prior, and write them to an .npy file.",
        allow_abbrev=False,
    ).add_argument
    add("checkpoint", type=Path, metavar="RUN", help="the folder of a run, or a checkpoint.pt")
    add("--n", type=int, default=64, metavar="N", help="how many (default: 64)")
    add("--mean", action="store_true", help="the mean of p(x | z) in place of a draw")
    add("--seed", type=int, default=0, metavar="SEED", help="of the draws (default: 0)")
    add("--out", type=Path, default=Path("samples.npy"), metavar="FILE", help="default: samples.npy")
    return parser


def _line(row: Metrics, config: Config, held_out: int) -> str:
    active = f"{row['active_units']:.0f}" if held_out > 1 else "?"  # one datum does not tell
    bound = "" if config.objective == "elbo" else f"  {config.objective} bound {row['held_out_bound']:8.3f}"
    ess = "" if config.num_samples == 1 else f"  ESS {row['ess']:.1f}/{config.num_samples}"
    if config.keep is not None:
        ess += f", 99 % of the weight in {row['samples_99']:.1f}, {row['kept_share']:.0%} kept"
    return (
        f"epoch {row['epoch']:{len(str(config.epochs))}.0f}/{config.epochs}  train ELBO {row['train_elbo']:8.3f}  "
        f"held-out ELBO {row['held_out_elbo']:8.3f}{bound}  log p(x|z) {row['held_out_log_likelihood']:8.3f}  "
        f"KL {row['held_out_kl']:6.3f}  {active}/{config.latent_dim} units active"
        f"{ess}  {row['ms_per_step']:.2f} ms/step, loss {row['loss_share']:.0%}"
    )


def _collapse(since: dict[int, int]) -> str:
    epochs = sorted(set(since.values()))
    named = "; ".join(
        f"{', '.join(str(d) for d, first in sorted(since.items()) if first == n)} since epoch {n}" for n in epochs
    )
    return (
        f"posterior collapse (held-out variance of mu at most {ACTIVE_VARIANCE}) in latent dimensions {named}; "
        "--beta-warmup, --free-bits or a smaller --latent-dim may help"
    )


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the model that were set, over those of the file `--config`."""
    config, flags = MODELS[args.model]
    names = options.names(config)
    if foreign := [name for name in vars(args) if name not in {*names.values(), *flags, *FLAGS}]:
        raise ValueError(f"{', '.join(foreign)} has no effect with model {args.model!r}: leave it out")
    found = files.read_config(args.config, {"model": "model", **names}) if "config" in args else {}
    if found.pop("model", args.model) != args.model:
        raise ValueError(f"{args.config} is of another model: give --model as there")
    found |= {name: getattr(args, name) for name in names.values() if name in args}
    for name in ("data", "test_data"):
        if isinstance(found.get(name), str) and found[name] not in BUILT_IN:
            found[name] = str(Path(found[name]).resolve())  # a run may be resumed from another folder
    return found


def _describe(dataset: data.Split, name: str, more: str) -> None:
    for remark in dataset.remarks:
        print(remark)
    train, missing, block = dataset.train, dataset.summary.missing, dataset.train.block
    gaps = f", {missing / math.prod(dataset.summary.shape):.2%} of the cells missing and masked" if missing else ""
    order = "exactly" if block == 1 else f"by blocks of {block} rows, which the file stores together"
    order = "" if train.resident else f"; read from the file, shuffled {order}"
    print(
        f"{name}: {len(train)} training and {len(dataset.held_out)} held-out data of shape {train.shape[1:]}{gaps}"
        f"{more}{order}; figures in nats per datum"
    )


def _fit_ppca(args: argparse.Namespace) -> list[Path]:
    """-> the pictures that were made."""
    from fastelbo.commands import pictures

    out: Path = args.out
    config = PPCAConfig(**_options(args))
    if (out / "checkpoint.pt").exists():
        raise FileExistsError(f"{out} already holds a run: write to another directory")
    run = ppca.Run(config)

    def report(row: ppca.Figures) -> None:
        print(
            f"{row['components']:4.0f} components  log p(x): training {row['train_log_prob']:9.3f}  "
            f"held-out {row['held_out_log_prob']:9.3f}  BIC {row['bic']:12.1f}  sigma {row['sigma']:.4f}"
            + (f"  {row['steps']:.0f} steps" if row["steps"] else ""),
            flush=True,
        )

    _describe(run.data, run.config.data, f"; PPCA by {run.config.method}")
    model = run.fit(out, report)
    if len(run.history) > 1:
        largest = model.n_components == run.history[-1]["components"]
        more = ", which is the largest number tried: more may be better" if largest else ""
        print(f"kept: {model.n_components} components, the lowest BIC{more}")
    return pictures.save_ppca(model, run.data, run.history, out)


def _logger(out: Path, epochs: int) -> Callable[[Metrics], None]:
    """Writes a row of figures as scalars into the folder of the run; those of epochs after `epochs` are dropped."""
    if find_spec("tensorboard") is None:
        raise ValueError("logger 'tensorboard' needs the package of that name: pip install tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out), purge_step=epochs + 1)

    def write(row: Metrics) -> None:
        for name, value in row.items():
            if name != "epoch":
                writer.add_scalar(name, value, int(row["epoch"]))
        writer.flush()

    return write


def _saved_config(out: Path, given: Collection[str] = ()) -> Config:
    """The options of the run in a folder; its data are looked for, unless `given` names them."""
    saved = files.read_checkpoint(out)
    if saved["model_kind"] != "vae":
        raise ValueError(f"the run is one of model {saved['model_kind']!r}, which is not resumed")
    if saved["config"].get("keep") == "auto":
        raise ValueError(f"{out} holds a run of keep 'auto', which is gone and cannot be continued: start a new one")
    with files.reading(out / "checkpoint.pt", files.CHECKPOINT):
        config = Config(**saved["config"])
    named = {name: getattr(config, name) for name in ("data", "test_data") if name not in given}
    now: dict[str, Any] = {k: data.located(k, v, saved["data"], out) for k, v in named.items() if v is not None}
    return replace(config, **now)


def _fit_vae(args: argparse.Namespace) -> list[Path]:
    """-> the pictures that were made."""
    from fastelbo.commands import pictures

    out: Path = args.out
    resume, changes = "resume" in args, _options(args)
    trainer = train.prepare(replace(_saved_config(out, changes) if resume else Config(), **changes), out, resume=resume)
    log = _logger(out, len(trainer.history)) if "logger" in args and not trainer.processes.rank else None
    config, dataset = trainer.config, trainer.data
    if config.data in BUILT_IN and (source := BUILT_IN[config.data].generated):
        print(f"{config.data}: generated, not measured: {source}")
    _describe(dataset, config.data, f", likelihood {config.likelihood}; {config.impl} on {trainer.device}")
    if trainer.history:
        print(f"resumed after epoch {len(trainer.history)}")
    if len(trainer.history) >= config.epochs:
        print(f"nothing to train: all {config.epochs} epochs are done; --epochs N trains up to epoch N")
    collapsed = train.collapses(trainer.history) if len(dataset.held_out) > 1 else {}
    reported: set[int] = set()

    def report(row: Metrics) -> None:
        nonlocal collapsed
        print(_line(row, config, len(dataset.held_out)), flush=True)
        if log is not None:
            log(row)
        collapsed = train.collapses([row], collapsed) if len(dataset.held_out) > 1 else {}
        settled = row["epoch"] >= max(SETTLED, config.beta_warmup + 1)
        if settled and collapsed.keys() - reported:
            reported.update(collapsed)
            print(_collapse(collapsed), flush=True)

    train.fit(trainer, out, report)
    if trainer.processes.rank:
        return []
    if len(trainer.history) < config.epochs:
        print(f"stopped: no better held-out bound in {config.patience} epochs; best.pt is epoch {trainer.best}")
    if collapsed and config.epochs >= SETTLED:
        print(f"at the end: {_collapse(collapsed)}")
    made = pictures.save_all(trainer.model.cpu(), dataset, trainer.history, out)
    if all(path.stem != "reconstructions" for path in made):
        print(f"no pictures of data and samples: {tuple(dataset.train.shape[1:])} is not the shape of an image")
    return made


@contextmanager
def _processes(model: str) -> Iterator[int]:
    """The process group that torchrun asks for -> the rank of this process; 0 without one."""
    number = os.environ.get("WORLD_SIZE", "1")
    if not number.isdecimal() or int(number) < 2:
        yield 0
        return
    if model == "ppca":
        raise ValueError(f"model 'ppca' takes one process here; torchrun, by WORLD_SIZE, started {number}")
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def _train(args: argparse.Namespace) -> int:
    try:
        with _processes(args.model) as rank:
            # the first process writes, and prints what there is to say
            locked = files.locked(args.out) if rank == 0 else nullcontext()
            quiet = nullcontext() if rank == 0 else redirect_stdout(io.StringIO())
            with locked, quiet:
                made = _fit_ppca(args) if args.model == "ppca" else _fit_vae(args)
                names = ["metrics.csv", "config.json", "checkpoint.pt", *(path.name for path in made)]
                print(f"in {args.out}: {', '.join(names)}")
    except train.Diverged as error:
        say(f"fastelbo train: {error}")
        return 1
    except KeyboardInterrupt:
        there = (args.out / "checkpoint.pt").exists()
        if args.model == "ppca":
            left = f"the model is in {args.out}, its pictures are not all there" if there else "no model was written"
        elif there:
            left = f"--resume --out {shlex.quote(str(args.out))} goes on after the last whole epoch"
        else:
            left = "no epoch was finished, so that there is nothing to resume"
        raise KeyboardInterrupt(left) from None
    return 0


class _Evaluated(NamedTuple):
    """What is evaluated."""

    name: str
    x: Dataset
    held_out: bool  # by the run; otherwise every row of a file
    seen: bool  # the file is the one that the run was trained on


def _evaluated(args: argparse.Namespace, saved: dict[str, Any], likelihood: str) -> _Evaluated:
    with files.reading(args.checkpoint, files.CHECKPOINT):
        config, before = saved["config"], saved["data"]
        name, test_data, layer = str(config["data"]), config.get("test_data"), args.layer or config.get("layer")
        event, fractions = tuple(before["shape"][1:]), config.get("fractions", False)
        known = before.get("contents", [before.get("content")])  # of the training part, and of that of --test-data
        assert isinstance(before["dtype"], str)
    folder, seen = args.checkpoint if args.checkpoint.is_dir() else args.checkpoint.parent, False
    if args.data is None and test_data is None:
        place = data.located("data", name, before, folder)
        split = data.load(place, likelihood, layer=layer, fractions=fractions)
        data.check_unchanged(split, before)
        x = split.held_out
    else:
        place = args.data or data.located("test_data", test_data, before, folder)
        layer = layer if args.layer or Path(place).suffix == Path(name).suffix else None
        x, content = data.load_all(place, likelihood, before, layer=layer, fractions=fractions)
        if args.data is None and "contents" in before and content != known[-1]:
            raise ValueError(f"data {place} are not what the run was trained on; changed: content")
        seen = args.data is not None and (content == known[0] or (place == name and place in BUILT_IN))
    if event != x.shape[1:]:
        raise ValueError(f"data must be of shape {event} as in training; got {x.shape[1:]}")
    return _Evaluated(place, x, args.data is None, seen)


def _evaluate(args: argparse.Namespace) -> int:
    count("num_samples", args.samples)
    integer()("seed", args.seed)
    model, saved = fastelbo.load(args.checkpoint), files.read_checkpoint(args.checkpoint)
    of = _evaluated(args, saved, "gaussian" if isinstance(model, PPCA) else model.likelihood)
    if isinstance(model, PPCA):
        about, text = {}, f"PPCA with {model.n_components} components"
    else:
        with files.reading(args.checkpoint, files.CHECKPOINT):
            about = {"samples": args.samples, "epoch": int(saved["epoch"])}
        text = f"{args.samples} samples each, after epoch {about['epoch']}"
    found = fastelbo.evaluate(model, of.x, args.samples, chunk_size=args.chunk_size, seed=args.seed)
    if args.json:
        shown = {"data": of.name, "held_out": of.held_out, **about, **found._asdict()}
        strict = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in shown.items()}
        print(json.dumps(strict, allow_nan=False))
        return 0
    what = "held-out data" if of.held_out else "data (training saw most of them)" if of.seen else "data"
    print(f"{of.name}: {len(of.x)} {what}, {text}; nats per datum")
    by_choice = _error(found.data_error, "the choice of data")
    if found.elbo is None:
        print(f"log p(x)         {found.log_prob:10.4f}  exactly; {by_choice}")
    else:
        active = "unknown" if found.active_units is None else found.active_units
        print(
            f"log p(x)         {found.log_prob:10.4f}  {_error(found.sampling_error, 'sampling')}, {by_choice}\n"
            f"ELBO             {found.elbo:10.4f}  on the same samples\n"
            f"log p(x) - ELBO  {found.log_prob - found.elbo:10.4f}  the KL of q(z | x) from the posterior\n"
            f"mean ESS         {found.ess:10.1f}  of {args.samples}; the largest weight is {found.max_weight:.1%} of "
            f"all\nactive units     {active:>10}  of {found.latent_dim}\n"
            f"I(x; z)          {_figure(found.mutual_information)}  of data and latents; q(z) is the mean of q(z | x)\n"
            f"KL of q(z)       {_figure(found.marginal_kl)}  from the prior; with I(x; z) the mean KL of q(z | x)\n"
            f"total corr.      {_figure(found.total_correlation)}  the KL of q(z) from the product of its dimensions"
        )
    if found.bits_per_dim is None:
        print("bits per dim           none  a Bernoulli is no density of values between 0 and 1")
    else:
        unit = ", of pixels from 0 to 255" if of.x.dtype == torch.uint8 else ""
        print(f"bits per dim     {found.bits_per_dim:10.4f}  -log2 p(x) per cell{unit}")
    return 0


def _figure(value: float | None) -> str:
    return f"{'none':>10}" if value is None else f"{value:10.4f}"


def _error(value: float | None, of: str) -> str:
    return f"no standard error by {of}" if value is None else f"standard error {value:.4f} by {of}"


def _sample(args: argparse.Namespace) -> int:
    import numpy as np

    count("n", args.n)
    integer()("seed", args.seed)
    model = fastelbo.load(args.checkpoint)
    if args.mean and isinstance(model, PPCA):
        raise ValueError("mean has no effect with a PPCA: leave it out")
    draw = model.sample if isinstance(model, PPCA) else partial(model.sample, mean=args.mean)
    row, generator = draw(1, generator=torch.Generator())[0].numpy(), torch.Generator().manual_seed(args.seed)
    needed, free = args.n * row.nbytes, shutil.disk_usage(args.out.parent).free
    if needed > free:
        sizes = f"take {needed / 1e9:.4g} GB; {free / 1e9:.4g} GB of disk are free in {args.out.parent}"
        raise ValueError(f"n must be smaller: {args.n} samples of shape {row.shape} {sizes}")
    header, rows = io.BytesIO(), max(1, min(PIECE[0], PIECE[1] // row.size))
    about = {"descr": row.dtype.str, "fortran_order": False, "shape": (args.n, *row.shape)}
    np.lib.format.write_array_header_1_0(header, about)
    starts = range(0, args.n, rows)
    drawn = (
        draw(min(rows, args.n - start), generator=generator).numpy().tobytes()
        for start in progress(starts, str(args.out), "piece", len(starts))
    )
    files.write_pieces(args.out, chain([header.getvalue()], drawn))
    print(f"{args.out}: {args.n} samples of shape {row.shape}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command -> its exit status: 0, 1 (training diverged), 2 (bad arguments), 130 (interrupted)."""
    command = "fastelbo"
    try:
        with printing():
            args = _parser().parse_args(argv)
            command += f" {args.command}"
            if args.command == "info":
                print(json.dumps(fastelbo.build_info(), indent=2, default=str))
                return 0
            if missing := [name for name in PACKAGES[args.command] if find_spec(name) is None]:
                say(f"{command} needs {', '.join(missing)}: pip install fastelbo[train]")
                return 2
            return {"evaluate": _evaluate, "sample": _sample, "train": _train}[args.command](args)
    except (ValueError, TypeError, OverflowError, OSError, MemoryError, RuntimeError) as error:  # the last: of torch
        say(f"{command}: error: {' '.join(str(error).splitlines()) or type(error).__name__}")
        raise SystemExit(2) from error
    except KeyboardInterrupt as stopped:
        say(f"interrupted: {str(stopped) or 'nothing was written'}")
        return 130
