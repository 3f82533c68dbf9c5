"""Pictures of trained models as PNG files."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Generator, Tensor

from fastelbo import likelihoods, reference
from fastelbo.commands import files
from fastelbo.commands.data import Split
from fastelbo.commands.ppca import Figures
from fastelbo.commands.train import Metrics
from fastelbo.data.dataset import Dataset
from fastelbo.likelihoods import Domain
from fastelbo.models.pieces import mask_of, masked
from fastelbo.models.vae import VAE
from fastelbo.ppca import PPCA

Data = Tensor | Dataset  # [N, *event]

ROWS = 10_000  # held-out data whose latents are shown
WIDEST = 13.0  # inches

TRAIN, HELD_OUT = "#9aa5b1", "#1f5fa8"


def _figure(width: float, height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _save(figure: Figure, path: Path) -> Path:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130, facecolor="white", bbox_inches="tight", pad_inches=0.12)
    files.write(path, content.getvalue())
    return path


def _label(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _both_parts(axes: Axes, history: Sequence[Mapping[str, float]], x: str, y: str, line: str = "-") -> None:
    """A figure of the training and the held-out part against a column of the history."""
    at = [row[x] for row in history]
    for part, color, label in (("train", TRAIN, "training"), ("held_out", HELD_OUT, "held-out")):
        axes.plot(at, [row[f"{part}_{y}"] for row in history], line, color=color, lw=1.6, ms=4, label=label)
    axes.grid(alpha=0.25, lw=0.6)


def as_images(x: Tensor, domain: Domain = "reals") -> Tensor | None:
    """x [N, *event] as [N, H, W] or [N, H, W, 3] in float, or None where an event is no image.

    Images are [H, W], [C, H, W] or [H, W, C] with 1 or 3 channels, or a flat square number of pixels that are no
    counts.
    """
    x = reference.read_data(x.detach(), torch.float32, domain)
    if x.dim() == 2 and math.isqrt(x.shape[1]) ** 2 == x.shape[1] and domain != "counts":
        return x.reshape(len(x), math.isqrt(x.shape[1]), -1)
    if x.dim() == 4 and x.shape[1] in (1, 3):
        x = x.movedim(1, 3)
    if x.dim() == 4 and x.shape[3] in (1, 3):
        return x.squeeze(3)
    return x if x.dim() == 3 else None


def mosaic(images: Tensor, columns: int) -> Tensor:
    """[N, H, W(, 3)] as one picture of tiles with a white line of one pixel between them; NaN fills what is left."""
    rows, (height, width) = math.ceil(len(images) / columns), images.shape[1:3]
    tiles = torch.full((rows * columns, height + 1, width + 1, *images.shape[3:]), math.nan)
    tiles[: len(images), :height, :width] = images
    lines = torch.unflatten(tiles, 0, (rows, columns)).transpose(1, 2)
    return lines.flatten(2, 3).flatten(0, 1)[:-1, :-1]


LIMIT_VALUES = 1_000_000
SIDE = 2000  # pixels of a mosaic, at most
DRAWN = 1 << 25  # numbers of the samples in a mosaic, at most


def _text(value: object) -> str:
    """A label as it is written: "$" begins no formula, and "_" hides nothing."""
    text = str(value).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _limits(x: Tensor) -> tuple[float, float]:
    """The grey scale: all values but the most extreme ones."""
    low, high = x.flatten()[:LIMIT_VALUES].nanquantile(torch.tensor([0.003, 0.997])).nan_to_num().tolist()
    return low, max(high, low + 1e-6 * max(1.0, abs(low)))


def _show(axes: Axes, images: Tensor, columns: int, limits: tuple[float, float], title: str) -> None:
    low, high = limits
    step = max(
        1, math.ceil(columns * images.shape[2] / SIDE), math.ceil(len(images) / columns * images.shape[1] / SIDE)
    )
    picture = mosaic(images[:, ::step, ::step], columns)
    if picture.dim() == 3:
        picture = ((picture - low) / (high - low)).clamp(0, 1).nan_to_num(1.0)
    axes.imshow(picture.numpy(), cmap="gray", vmin=low, vmax=high, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title, fontsize=10, loc="left")


def _save_images(
    images: Tensor, columns: int, limits: tuple[float, float], title: str, path: Path, height: float = 4.2
) -> Path:
    figure, [axes] = _figure(8, height)
    _show(axes, images, columns, limits, title)
    return _save(figure, path)


def curves(history: Sequence[Metrics], path: Path) -> Path:
    """ELBO, log-likelihood and KL by epoch, training and held-out; also the objective where it is another."""
    panels = [("elbo", "ELBO"), ("log_likelihood", "log p(x | z)"), ("kl", "KL(q(z | x) || p(z))")]
    if not all(math.isclose(row["train_bound"], row["train_elbo"], rel_tol=1e-5) for row in history):
        panels.insert(0, ("bound", "Objective (minus the loss)"))
    figure, every = _figure(3.5 * len(panels), 3.0, len(panels))
    for axes, (name, title) in zip(every, panels, strict=True):
        _both_parts(axes, history, "epoch", name)
        _label(axes, title, "epoch", "nats per datum")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, fontsize=8)
    return _save(figure, path)


def reconstructions(model: VAE, x: Data, path: Path, columns: int = 16, rows: int = 4) -> Path | None:
    """Data above E[x | z = mu(x)], pair by pair; None where the data are no images."""
    shown = x[: min(len(x) // columns * columns or len(x), columns * rows)]
    domain = likelihoods.get(model.likelihood).domain
    with torch.no_grad():
        originals, rebuilt = as_images(shown, domain), as_images(model.reconstruct(shown, mask=mask_of(shown)), domain)
    if originals is None or rebuilt is None:
        return None
    pairs = [row for two in zip(originals.split(columns), rebuilt.split(columns), strict=True) for row in two]
    title = "Held-out data, each above its reconstruction: mean of p(x | z) at mu"
    return _save_images(torch.cat(pairs), min(columns, len(shown)), _limits(originals), title, path)


def prior_samples(model: VAE, x: Data, path: Path, columns: int = 16, rows: int = 8) -> Path | None:
    """E[x | z] for z ~ N(0, I), on the grey scale of the data x; None where the data are no images."""
    domain = likelihoods.get(model.likelihood).domain
    data = as_images(x[: 1 + LIMIT_VALUES // max(1, x[0].numel())], domain)
    rows = max(1, min(rows, DRAWN // (columns * x[0].numel())))
    images = as_images(model.sample(rows * columns, mean=True, generator=Generator().manual_seed(0)), domain)
    if data is None or images is None:
        return None
    return _save_images(images, columns, _limits(data), "Prior samples: mean of p(x | z), z ~ N(0, I)", path)


@torch.no_grad()
def _posterior(model: VAE, x: Dataset) -> tuple[Tensor, Tensor]:
    """Posterior means [N, M] and mean KL [M] of every latent dimension."""
    found = []
    for batch, mask in masked(x):
        mu, logvar = model.encode(batch, mask=mask)
        found.append((mu.flatten(1), reference.kl_terms(mu, logvar).flatten(1)))
    mu, kl = map(torch.cat, zip(*found, strict=True))
    return mu, kl.mean(0)


def latent_plane(mu: Tensor, kl: Tensor, labels: NDArray[Any] | None, path: Path) -> Path | None:
    """Posterior means [N, M] in the plane of the two dimensions with the largest KL [M], coloured by label; None for
    M = 1."""
    if len(kl) < 2:
        return None
    i, j = sorted(kl.topk(2).indices.tolist())
    figure, [axes] = _figure(6.2, 5.2)
    dots: dict[str, Any] = {"s": 12 if len(mu) < 4000 else 4, "linewidths": 0, "alpha": 0.8}
    values = np.array([]) if labels is None else np.unique(labels)
    if labels is None:
        axes.scatter(mu[:, i], mu[:, j], color=HELD_OUT, **dots)
    elif len(values) > 20:
        numbers = labels if labels.dtype.kind in "biuf" else np.searchsorted(values, labels)
        points = axes.scatter(mu[:, i], mu[:, j], c=numbers, cmap="viridis", **dots)
        figure.colorbar(points, label="label" if numbers is labels else "label, by its place in the alphabet")
    else:
        for n, value in enumerate(values):
            chosen = torch.from_numpy(labels == value)
            color = f"C{n}" if len(values) <= 10 else colormaps["tab20"](n)
            axes.scatter(mu[chosen, i], mu[chosen, j], color=color, label=_text(value), **dots)
        axes.legend(title="label", frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    for radius in (1, 2):
        axes.add_patch(Circle((0, 0), radius, fill=False, ls="--", lw=1.0, color="black", zorder=3))
    which = "" if len(kl) == 2 else f"\nthe two of {len(kl)} dimensions with the largest KL"
    title = f"Posterior means of held-out data; circles: 1 and 2 standard deviations of the prior{which}"
    _label(axes, title, f"mu[{i}]", f"mu[{j}]")
    axes.set_aspect("equal", adjustable="datalim")
    return _save(figure, path)


def kl_per_dimension(kl: Tensor, path: Path) -> Path:
    """Mean KL [M] of every latent dimension, largest first."""
    order = kl.argsort(descending=True).tolist()
    figure, [axes] = _figure(min(max(4.2, 0.28 * len(order) + 1.5), WIDEST), 3.0)
    axes.bar(range(len(order)), kl[order].tolist(), color=HELD_OUT, width=0.75)
    if len(order) <= 40:
        axes.set_xticks(range(len(order)), [str(j) for j in order])
    _label(axes, f"KL per latent dimension, held-out: {float(kl.sum()):.2f} nats in all", "dimension", "nats per datum")
    axes.grid(axis="y", alpha=0.25, lw=0.6)
    axes.set_axisbelow(True)
    return _save(figure, path)


def save_all(model: VAE, dataset: Split, history: Sequence[Metrics], out: Path) -> list[Path]:
    """Every picture that the data allow, in the folder `out`, which exists -> their paths."""
    model.eval()
    held_out = dataset.held_out.subset(torch.arange(0, len(dataset.held_out), math.ceil(len(dataset.held_out) / ROWS)))
    mu, kl = _posterior(model, held_out)
    made = [
        curves(history, out / "curves.png"),
        reconstructions(model, dataset.held_out, out / "reconstructions.png"),
        prior_samples(model, dataset.held_out, out / "prior_samples.png"),
        latent_plane(mu, kl, held_out.labels, out / "latent_plane.png"),
        kl_per_dimension(kl, out / "kl_per_dimension.png"),
    ]
    return [path for path in made if path is not None]


def log_prob_by_components(history: Sequence[Figures], kept: int, path: Path) -> Path:
    """log p(x) of training and held-out data against the number of components; a line at the one that was kept."""
    figure, [axes] = _figure(5.2, 3.4)
    _both_parts(axes, history, "components", "log_prob", "o-")
    if len(history) > 1:
        axes.axvline(kept, color="black", lw=0.8, ls="--", label="lowest BIC")
    numbers = [row["components"] for row in history]
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, [f"{n:.0f}" for n in numbers])
    axes.minorticks_off()
    _label(axes, "log p(x) of probabilistic PCA", "components M", "nats per datum")
    axes.legend(frameon=False, fontsize=8)
    return _save(figure, path)


def components(model: PPCA, event: tuple[int, ...], path: Path) -> Path | None:
    """Columns of W for data of a shape; None where they are no images."""
    assert model.W is not None
    images = as_images(model.W.detach().mT[:64].unflatten(1, event))
    if images is None:
        return None
    bound = max(map(abs, _limits(images)))
    title = "Components: columns of W, the longest first"
    return _save_images(images, min(16, len(images)), (-bound, bound), title, path, height=3.0)


def ppca_samples(model: PPCA, x: Data, path: Path) -> Path | None:
    """Data x [N, *event] beside draws from the model; None where the data are no images."""
    data = as_images(torch.nan_to_num(x[:100]))
    drawn = as_images(model.sample(100, generator=Generator().manual_seed(0)).unflatten(1, x.shape[1:]))
    if data is None or drawn is None:
        return None
    figure, (left, right) = _figure(8.2, 4.2, 2)
    _show(left, data, 10, _limits(data), "Held-out data")
    _show(right, drawn, 10, _limits(data), "Samples: W z + b + e")
    return _save(figure, path)


def save_ppca(model: PPCA, dataset: Split, history: Sequence[Figures], out: Path) -> list[Path]:
    """Every picture of a PPCA that the data allow, in the folder `out`, which exists -> their paths."""
    made = [
        log_prob_by_components(history, model.n_components, out / "log_prob.png"),
        components(model, dataset.held_out.shape[1:], out / "components.png"),
        ppca_samples(model, dataset.held_out, out / "samples.png"),
    ]
    return [path for path in made if path is not None]
