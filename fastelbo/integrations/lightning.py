"""Lightning: a mixin that logs the parts of a loss, and a LightningModule around a `fastelbo.VAE`.

Written for lightning 2.6; `import lightning` must work, pytorch_lightning alone is not enough.
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor

import fastelbo
from fastelbo import LossParts

__all__ = ["LightningVAE", "PartsMixin"]


class PartsMixin:
    """For a LightningModule of your own: logs a loss and its parts, and returns the loss.

        class Model(PartsMixin, lightning.LightningModule):
            def training_step(self, x):
                ...
                return self.log_parts(fastelbo.elbo_parts(recon, x, mu, logvar))

    Means over batches of different sizes are weighted by the number of data. Outside "train" they are averaged over
    processes, too.
    """

    def log_parts(self, parts: LossParts, stage: str = "train", **options: Any) -> Tensor:
        """Logs stage/loss, stage/log_likelihood and stage/kl, in nats per datum.

        Args:
            parts: from a function such as `fastelbo.elbo_parts`, or from `VAE.parts`.
            stage: the prefix of the names.
            options: of LightningModule.log, such as on_step, on_epoch or prog_bar.

        Returns:
            parts.loss.
        """
        means = {
            "loss": parts.loss.mean(),
            "log_likelihood": parts.log_likelihood.mean(),
            "kl": parts.kl.mean(),
        }
        values = {f"{stage}/{name}": value.detach() for name, value in means.items()}
        defaults = {"batch_size": parts.kl.shape[-1], "sync_dist": stage != "train"}
        self.log_dict(values, **(defaults | options))  # type: ignore[attr-defined]
        return parts.loss


def _data(batch: Any) -> Tensor:
    x: Tensor = batch[0] if isinstance(batch, list | tuple) else batch
    return x


class LightningVAE(PartsMixin, lightning.LightningModule):  # type: ignore[misc]
    """Trains a `fastelbo.VAE` with Adam. Batches are x, or a list or tuple that starts with x.

    Logs train/, val/ and test/ loss, log_likelihood and kl; val/ and test/ also log_marginal where `eval_samples` is
    given. Precision plugins, gradient accumulation and DDP work as for any LightningModule.

    A checkpoint holds the weights and the arguments below, but not the networks:
    `LightningVAE.load_from_checkpoint(path, model=fastelbo.VAE(...))`. What is given there replaces what was saved.

    Args:
        model: a `fastelbo.VAE`.
        lr: Adam's.
        eval_samples: K of the estimate of log p(x) in validation and test; 0: without it.
        options: of `fastelbo.VAE.loss`, such as objective, num_samples, keep or beta. A checkpoint leaves out
            `generator`.

    Raises:
        TypeError: no model.
    """

    def __init__(
        self, model: fastelbo.VAE | None = None, *, lr: float = 1e-3, eval_samples: int = 0, **options: Any
    ) -> None:
        super().__init__()
        if model is None:
            raise TypeError(
                "model must be a fastelbo.VAE; got None: a checkpoint holds no networks, so give "
                "load_from_checkpoint(path, model=fastelbo.VAE(...)) those that were trained"
            )
        self.save_hyperparameters(ignore=["model", "generator"])
        self.model, self.lr, self.eval_samples, self.options = model, lr, eval_samples, options

    def forward(self, x: Tensor) -> Any:
        """What the model returns: recon and posterior."""
        return self.model(x)

    def _step(self, batch: Any, stage: str) -> Tensor:
        x = _data(batch)
        loss = self.log_parts(self.model.parts(x, **self.options), stage)
        if stage != "train" and self.eval_samples:
            log_p = self.model.log_marginal(x, self.eval_samples).log_prob.mean()
            self.log(f"{stage}/log_marginal", log_p, batch_size=len(x), sync_dist=True)
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        return self._step(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs val/."""
        self._step(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Logs test/."""
        self._step(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """What the model returns: recon and posterior."""
        return self(_data(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), self.lr)
