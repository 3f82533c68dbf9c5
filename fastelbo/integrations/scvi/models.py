"""scvi-tools' models and modules of counts and of peaks with their likelihoods computed by fastelbo."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from scvi import REGISTRY_KEYS, model
from scvi.distributions import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from scvi.module import LDVAE, PEAKVAE, SCANVAE, VAE
from scvi.module._constants import MODULE_KEYS
from scvi.module.base import auto_move_data
from scvi.nn import DecoderSCVI, LinearDecoderSCVI
from torch import Tensor, nn
from torch.distributions import Normal
from torch.distributions.utils import lazy_property

import fastelbo
from fastelbo.likelihoods import SCVI_ADDED
from fastelbo.losses import join_recon

Outputs = dict[str, Any]  # tensors and distributions, by scvi's keys


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
    computed: ClassVar[Sequence[str]]  # the parameters of scvi's constructor
    arg_constraints: ClassVar[dict[str, Any]]
    library: Tensor
    activation: nn.Module
    logits: Tensor
    log_theta: Any
    zi_logits: Any

    @classmethod
    def of_outputs(cls, **outputs: Any) -> "_Fused":
        """What the constructor of scvi's class sets beside the parameters is taken from it."""
        one = outputs["logits"].new_ones(())
        given: Any = {name: cls._placeholder(one, outputs["logits"]) for name in cls.computed}
        px: _Fused = cls(**given, validate_args=False)  # type: ignore[call-arg]
        for name in (*cls.computed, "scale"):
            vars(px).pop(name, None)
        vars(px).update(outputs)
        return px

    @staticmethod
    def _placeholder(one: Tensor, like: Tensor) -> Tensor:
        return one

    @lazy_property
    def scale(self) -> Tensor:
        return self.activation(self.logits)  # type: ignore[no-any-return]

    def _mean(self) -> Tensor:
        return torch.exp(self.library) * self.scale

    def log_prob(self, value: Tensor) -> Tensor:
        """log p of every element of value [B, G]: [K?, B, G]. As scvi's of what scvi has built from parameters."""
        if "logits" not in vars(self):
            return super().log_prob(value)  # type: ignore[misc, no-any-return]
        if isinstance(self.activation, nn.Softmax):
            log_mean = self.library + F.log_softmax(self.logits, dim=-1)
        else:
            log_mean = torch.log(self._mean() + SCVI_ADDED)
        # autocast leaves the others in half
        others = (t.to(log_mean.dtype) for t in (self.log_theta, self.zi_logits) if t is not None)
        recon = join_recon(log_mean, *others)
        return fastelbo.log_prob(recon, value, likelihood=self.likelihood, reduce=False)

    def __repr__(self) -> str:
        for name in self.arg_constraints:  # scvi shows what is there
            getattr(self, name)
        return super().__repr__()


class FusedPoisson(_Fused, Poisson):  # type: ignore[misc]
    likelihood = "poisson"
    computed = ("rate",)

    @staticmethod
    def _placeholder(one: Tensor, like: Tensor) -> Tensor:
        return one.expand(like.shape)  # of which torch takes the shape

    @lazy_property
    def rate(self) -> Tensor:
        return self._mean()


class FusedNegativeBinomial(_Fused, NegativeBinomial):  # type: ignore[misc]
    likelihood = "nb"
    computed: ClassVar[Sequence[str]] = ("mu", "theta")

    @lazy_property
    def mu(self) -> Tensor:
        return self._mean()

    @lazy_property
    def theta(self) -> Tensor:
        return torch.exp(self.log_theta).expand(self.logits.shape)


class FusedZeroInflatedNegativeBinomial(FusedNegativeBinomial, ZeroInflatedNegativeBinomial):  # type: ignore[misc]
    likelihood = "zinb"
    computed = ("mu", "theta", "zi_logits")


FUSED: dict[str, type[_Fused]] = {
    kind.likelihood: kind for kind in (FusedPoisson, FusedNegativeBinomial, FusedZeroInflatedNegativeBinomial)
}


_SOFTMAX = nn.Softmax(dim=-1)

# ----------------------------------------------------------------------------------------------------------------------
# The modules and the models.


class FusedVAE(VAE):  # type: ignore[misc]
    """scvi.module.VAE, with px a distribution whose log_prob is `fastelbo.log_prob`.

    The likelihoods "nb", "zinb" and "poisson" are fused, with every `dispersion`; for others ("normal"), and for
    decoders of other classes than scvi's DecoderSCVI and LinearDecoderSCVI, scvi computes log p.

    Arguments, parameters, outputs and random draws are those of scvi's class, and so is everything computed without a
    loss, to the last bit. log p differs in three ways:

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
        decoder, linear = self.decoder, type(self.decoder) is LinearDecoderSCVI
        if self.gene_likelihood not in FUSED or not (linear or type(decoder) is DecoderSCVI):
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
        decoder_input, dropout = torch.cat(inputs, dim=-1), decoder.px_dropout_decoder
        if linear:
            hidden, activation = None, _SOFTMAX
            logits = decoder.factor_regressor(decoder_input, *categories, y)
        else:
            hidden = decoder.px_decoder(decoder_input, *categories, y)
            last, activation = decoder.px_scale_decoder
            logits = last(hidden)
        zi_logits = None
        if self.gene_likelihood == "zinb":
            zi_logits = dropout(decoder_input, *categories, y) if linear else dropout(hidden)
        px = FUSED[self.gene_likelihood].of_outputs(
            library=size_factor if self.use_size_factor_key else library,
            activation=activation,
            logits=logits,
            log_theta=None if self.gene_likelihood == "poisson" else self._log_theta(hidden, batch_index, y),
            zi_logits=zi_logits,
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

    def _log_theta(self, hidden: Tensor | None, batch_index: Tensor, y: Tensor | None) -> Tensor:
        """[G] for dispersion "gene", so that the kernel sums the gradient over cells; else [K?, B, G]."""
        if self.dispersion == "gene-cell":
            return self.decoder.px_r_decoder(hidden)  # type: ignore[no-any-return]
        # theta is computed later, maybe where gradients are enabled again
        px_r: Tensor = self.px_r if torch.is_grad_enabled() else self.px_r.detach()
        if self.dispersion == "gene":
            return px_r
        index: Any = batch_index if self.dispersion == "gene-batch" else y
        return F.linear(F.one_hot(index.squeeze(-1), px_r.shape[1]).to(px_r.dtype), px_r)


class FusedSCANVAE(FusedVAE, SCANVAE):  # type: ignore[misc]
    """scvi.module.SCANVAE, as `FusedVAE`. Reference: Xu et al. 2021."""


class FusedLDVAE(FusedVAE, LDVAE):  # type: ignore[misc]
    """scvi.module.LDVAE, as `FusedVAE`.

    scvi's decoder computes zero logits for "nb" and "poisson" too, which have none. They are left out, and the running
    statistics of their batch normalization stay as they are.

    Reference: Svensson et al. 2020.
    """


class SCVI(model.SCVI):  # type: ignore[misc]
    """scvi.model.SCVI with `FusedVAE` as its module. It has scvi's name, by which scvi recognizes saved models."""

    _module_cls = FusedVAE


class SCANVI(model.SCANVI):  # type: ignore[misc]
    """scvi.model.SCANVI with `FusedSCANVAE` as its module, and with its name; `from_scvi_model` takes either SCVI."""

    _module_cls = FusedSCANVAE


class LinearSCVI(model.LinearSCVI):  # type: ignore[misc]
    """scvi.model.LinearSCVI with `FusedLDVAE` as its module, and with its name."""

    _module_cls = FusedLDVAE


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
