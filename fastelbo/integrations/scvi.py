"""scvi-tools' SCVI and PEAKVI with their losses computed by fastelbo. One import changes:

    from fastelbo.integrations.scvi import SCVI  # was: from scvi.model import SCVI

Methods, options, seeds and files stay: either class loads the models of the other. A program that must keep its import
gets the same after `scvi.model.SCVI._module_cls = FusedVAE`. Written for scvi-tools 1.4.
"""

from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from scvi import REGISTRY_KEYS, model
from scvi.distributions import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from scvi.module import PEAKVAE, VAE
from scvi.module._constants import MODULE_KEYS
from scvi.module.base import LossOutput, auto_move_data
from scvi.nn import DecoderSCVI
from torch import Tensor, nn
from torch.distributions import Distribution, Normal
from torch.distributions.utils import lazy_property

import fastelbo
from fastelbo.losses import join_recon

__all__ = ["PEAKVI", "SCVI", "FusedPEAKVAE", "FusedVAE"]

Outputs = dict[str, Any]  # tensors and distributions, by scvi's keys
EPS = 1e-8  # scvi adds it to a mean before it takes the logarithm


# ----------------------------------------------------------------------------------------------------------------------
# scvi's distributions of counts, whose parameters are computed when they are asked for.


class _Fused:
    """The tensors of which scvi computes a distribution's parameters; a fused loss starts from them.

    `of_outputs` sets them. The constructor is that of scvi's class: scvi rebuilds distributions from their parameters.

    Attributes:
        library: [K?, B, 1]. log of the factor between `scale` and the mean.
        activation, logits: a module, and its argument [K?, B, G]; the result is `scale`.
        log_theta: [G] or [K?, B, G]; None for Poisson.
        zi_logits: [K?, B, G]; None but for ZeroInflatedNegativeBinomial.
    """

    likelihood: ClassVar[str]
    arg_constraints: ClassVar[dict[str, Any]]
    library: Tensor
    activation: nn.Module
    logits: Tensor
    log_theta: Any
    zi_logits: Any

    @classmethod
    def of_outputs(cls, **outputs: Any) -> "_Fused":
        px = cls.__new__(cls)
        vars(px).update(outputs)
        px._complete()
        return px

    def _complete(self) -> None:
        """What the constructor of scvi's class sets beside the parameters."""
        raise NotImplementedError

    @lazy_property
    def scale(self) -> Tensor:
        return self.activation(self.logits)  # type: ignore[no-any-return]

    def _mean(self) -> Tensor:
        return torch.exp(self.library) * self.scale

    def log_prob_of_cells(self, x: Tensor) -> Tensor:
        """log p(x), summed over genes: [K?, B, 1]."""
        if isinstance(self.activation, nn.Softmax):
            log_mean = self.library + F.log_softmax(self.logits, dim=-1)
        else:
            log_mean = torch.log(self._mean() + EPS)
        # autocast leaves the others in half
        others = (t.to(log_mean.dtype) for t in (self.log_theta, self.zi_logits) if t is not None)
        return fastelbo.log_prob(join_recon(log_mean, *others), x, likelihood=self.likelihood).unsqueeze(-1)

    def __repr__(self) -> str:
        for name in self.arg_constraints:  # scvi shows what is there
            getattr(self, name)
        return super().__repr__()


class FusedPoisson(_Fused, Poisson):  # type: ignore[misc]
    likelihood = "poisson"

    def _complete(self) -> None:
        Distribution.__init__(self, self.logits.shape)

    @lazy_property
    def rate(self) -> Tensor:
        return self._mean()


class FusedNegativeBinomial(_Fused, NegativeBinomial):  # type: ignore[misc]
    likelihood = "nb"

    def _complete(self) -> None:
        self.on_mps, self._eps = self.logits.device.type == "mps", EPS
        Distribution.__init__(self, validate_args=False)

    @lazy_property
    def mu(self) -> Tensor:
        return self._mean()

    @lazy_property
    def theta(self) -> Tensor:
        return torch.exp(self.log_theta).expand(self.logits.shape)


class FusedZeroInflatedNegativeBinomial(FusedNegativeBinomial, ZeroInflatedNegativeBinomial):  # type: ignore[misc]
    likelihood = "zinb"


FUSED: dict[str, type[_Fused]] = {
    kind.likelihood: kind for kind in (FusedPoisson, FusedNegativeBinomial, FusedZeroInflatedNegativeBinomial)
}


# ----------------------------------------------------------------------------------------------------------------------
# The module and the model.


class FusedVAE(VAE):  # type: ignore[misc]
    """scvi.module.VAE whose log p(x | z) in the loss is computed by `fastelbo.log_prob`.

    The likelihoods "nb", "zinb" and "poisson" are fused, with every `dispersion`; for others ("normal"), and for
    decoders other than scvi's DecoderSCVI, scvi computes log p.

    Arguments, parameters, outputs and random draws are those of scvi's class, and so is everything computed without a
    loss, to the last bit. The loss differs in three ways:

    - Where scvi takes log(mu + 1e-8) and log(theta + 1e-8), these are log(mu) and log(theta): the log p of an entry
      differs by about 1e-8 x / mu. In float32 scvi's also has the rounding of lgamma(x + theta) - lgamma(theta), which
      grows with theta: up to 1 nat per entry at theta = 1e6.
    - With use_size_factor_key the decoder does not end in a softmax, and the logarithm is that of mu + 1e-8.
    - x is not checked to be whole numbers at every step, for which scvi warns ("zinb") or raises ("poisson").

    Reference: Lopez et al. 2018.
    """

    @auto_move_data  # type: ignore[untyped-decorator]
    def generative(
        self,
        z: Tensor,
        library: Tensor,
        batch_index: Tensor,
        cont_covs: Tensor | None = None,
        cat_covs: Tensor | None = None,
        size_factor: Tensor | None = None,
        y: Tensor | None = None,
        transform_batch: Tensor | None = None,
    ) -> Outputs:
        """As scvi's. The distribution of x computes its parameters when they are asked for: the loss asks for none."""
        if self.gene_likelihood not in FUSED or type(self.decoder) is not DecoderSCVI:
            optional = (cont_covs, cat_covs, size_factor, y, transform_batch)
            return super().generative(z, library, batch_index, *optional)  # type: ignore[no-any-return]
        if transform_batch is not None:
            batch_index = torch.ones_like(batch_index) * transform_batch

        inputs, categories = [z], [] if cat_covs is None else list(torch.split(cat_covs, 1, dim=1))
        if cont_covs is not None:
            inputs.append(cont_covs.expand(*z.shape[:-1], -1))
        if self.batch_representation == "embedding":
            inputs.append(self.compute_embedding(REGISTRY_KEYS.BATCH_KEY, batch_index))
        else:
            categories.insert(0, batch_index)
        decoder = self.decoder
        hidden = decoder.px_decoder(torch.cat(inputs, dim=-1), *categories, y)
        linear, activation = decoder.px_scale_decoder
        px = FUSED[self.gene_likelihood].of_outputs(
            library=size_factor if self.use_size_factor_key else library,
            activation=activation,
            logits=linear(hidden),
            log_theta=None if self.gene_likelihood == "poisson" else self._log_theta(hidden, batch_index, y),
            zi_logits=decoder.px_dropout_decoder(hidden) if self.gene_likelihood == "zinb" else None,
        )
        pl = None
        if not self.use_observed_lib_size:
            mean, variance = self._compute_local_library_params(batch_index)
            pl = Normal(mean, variance.sqrt())
        return {
            MODULE_KEYS.PX_KEY: px,
            MODULE_KEYS.PL_KEY: pl,
            MODULE_KEYS.PZ_KEY: Normal(torch.zeros_like(z), torch.ones_like(z)),
        }

    def _log_theta(self, hidden: Tensor, batch_index: Tensor, y: Tensor | None) -> Tensor:
        """[G] for dispersion "gene", so that the kernel sums the gradient over cells; else [K?, B, G]."""
        if self.dispersion == "gene-cell":
            return self.decoder.px_r_decoder(hidden)  # type: ignore[no-any-return]
        # theta is computed later, maybe where gradients are enabled again
        px_r: Tensor = self.px_r if torch.is_grad_enabled() else self.px_r.detach()
        if self.dispersion == "gene":
            return px_r
        index: Any = batch_index if self.dispersion == "gene-batch" else y
        return F.linear(F.one_hot(index.squeeze(-1), px_r.shape[1]).to(px_r.dtype), px_r)

    def loss(
        self, tensors: Outputs, inference_outputs: Outputs, generative_outputs: Outputs, kl_weight: Tensor | float = 1.0
    ) -> LossOutput:
        """As scvi's."""
        px = generative_outputs[MODULE_KEYS.PX_KEY]
        if isinstance(px, _Fused):  # scvi sums over the last dimension
            summed = SimpleNamespace(log_prob=px.log_prob_of_cells)
            generative_outputs = {**generative_outputs, MODULE_KEYS.PX_KEY: summed}
        return super().loss(tensors, inference_outputs, generative_outputs, kl_weight)  # type: ignore[no-any-return]


class SCVI(model.SCVI):  # type: ignore[misc]
    """scvi.model.SCVI with `FusedVAE` as its module. It has scvi's name, by which scvi recognizes saved models."""

    _module_cls = FusedVAE


# ----------------------------------------------------------------------------------------------------------------------
# Peaks: open or closed, one probability per cell and region.


class FusedPEAKVAE(PEAKVAE):  # type: ignore[misc]
    """scvi.module.PEAKVAE whose log-likelihood is computed by fastelbo: the same loss and gradients.

    As scvi's, the loss of B cells is B times the sum of their reconstruction losses, plus kl_weight times the sum of
    their KL: the KL counts 1 / B of what it does in the ELBO.

    Reference: Ashuach et al. 2022.
    """

    def get_reconstruction_loss(self, p: Tensor, d: Tensor | int, f: Tensor | int, x: Tensor) -> Tensor:
        """-log p(x > 0) [B], of the probabilities p d f [B, G]."""
        return -fastelbo.log_prob(p * d * f, x > 0, likelihood="bernoulli_probs")


class PEAKVI(model.PEAKVI):  # type: ignore[misc]
    """scvi.model.PEAKVI with `FusedPEAKVAE` as its module, and with its name, by which scvi recognizes saved models."""

    _module_cls = FusedPEAKVAE
