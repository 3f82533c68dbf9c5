"""The variational autoencoder: any encoder and decoder around `rsample` and the losses."""

from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict, Unpack, overload

import torch
from torch import Generator, Tensor, nn

from fastelbo import kept, likelihoods, reference
from fastelbo.arguments import ORDINALS, checked
from fastelbo.estimators import ESTIMATORS, Estimator
from fastelbo.functional import (
    LossParts,
    Posterior,
    Recon,
    elbo_loss,
    gaussian_kl,
    join_recon,
    likelihood_mean,
    likelihood_sample,
    log_prob,
    multi_sample_loss,
    rsample,
    seed_tensor,
    split_recon,
)
from fastelbo.marginal import LogMeanExp, MarginalEstimate, log_weights, pieces
from fastelbo.progress import progress

# Every objective with the options that it reads; the others must keep their defaults.
# "elbo" is the one with the KL in closed form; the others are the estimators of `multi_sample_loss`.
OBJECTIVES: dict[str, tuple[str, ...]] = {name: row.options for name, row in ESTIMATORS.items()}
OBJECTIVES["elbo"] = ("beta", "free_bits")
_DEFAULTS = {"beta": None, "free_bits": 0.0, "alpha": 0.0, "groups": 1}


class VAEOutput(NamedTuple):
    """What `VAE.forward` returns: the arguments of the losses."""

    recon: Recon  # [K?, B, *event], or a tuple such as (mean, logvar)
    posterior: Posterior


class VAEOptions(TypedDict, total=False):
    """Options of `VAE.loss`."""

    objective: str
    num_samples: int
    beta: float | Tensor | None
    free_bits: float
    alpha: float
    groups: int
    keep: int | Literal["auto"] | None
    reduction: str
    seed: int | Tensor | None
    generator: Generator | None
    eps: Tensor | None


def check_objective(
    objective: str, *, beta: float | Tensor | None, free_bits: float, alpha: float, groups: int
) -> None:
    """Check the name of an objective, and that it reads every option whose value is not the default.

    Raises:
        ValueError: an unknown name, or an option without effect.
        TypeError: a tensor beta where the objective takes a float.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}; got {objective!r}")
    options = {"beta": beta, "free_bits": free_bits, "alpha": alpha, "groups": groups}
    for name, value in options.items():
        # a tensor is never compared with the default: on a GPU that would synchronize
        changed = isinstance(value, Tensor) or value != _DEFAULTS[name]
        if changed and name not in OBJECTIVES[objective]:
            raise ValueError(f"{name} has no effect with objective {objective!r}: leave it out; got {value!r}")
    if objective != "elbo" and isinstance(beta, Tensor):
        raise TypeError(f"beta must be a float with objective {objective!r}; got a tensor")


def draws(objective: str, num_samples: int) -> int | None:
    """rsample's num_samples: the plain ELBO of one sample needs no K dimension."""
    return None if objective == "elbo" and num_samples == 1 else num_samples


def objective_loss(
    objective: str,
    recon: Recon,
    x: Tensor,
    posterior: Posterior,
    *,
    beta: float | Tensor | None = None,
    free_bits: float = 0.0,
    alpha: float = 0.0,
    groups: int = 1,
    likelihood: str = "bernoulli",
    reduction: str = "mean",
) -> LossParts:
    """The loss of an objective by its name, on what `VAE.forward` returned; the arguments are those of `VAE.loss`."""
    check_objective(objective, beta=beta, free_bits=free_bits, alpha=alpha, groups=groups)
    if objective == "elbo":
        return elbo_loss(
            recon,
            x,
            posterior.mu,
            posterior.logvar,
            likelihood=likelihood,
            beta=1.0 if beta is None else beta,
            free_bits=free_bits,
            reduction=reduction,
            return_parts=True,
        )
    assert not isinstance(beta, Tensor)
    return multi_sample_loss(
        recon,
        x,
        posterior,
        likelihood=likelihood,
        estimator=objective,
        alpha=alpha,
        beta=0.5 if beta is None else beta,
        groups=groups,
        reduction=reduction,
        return_parts=True,
    )


class VAE(nn.Module):
    """Variational autoencoder: z ~ N(0, I), x ~ p(x | decoder(z)), q(z | x) = N(mu, diag exp(logvar)) from encoder(x).

    Args:
        encoder: a module x [B, *event] -> (mu, logvar), each [B, *latent], or one tensor that is halved on dim 1.
        decoder: a module z [B, *latent] -> recon [B, *event], or a tuple such as (mean, logvar) whose further tensors
            broadcast to the first: [B, *event], [*event], or 0-d for one learned variance.
        likelihood: a name of `fastelbo.log_prob`, which says what recon means.
        latent_shape: the shape of one latent, without B. None: taken from the latest `encode`, so that only
            `decode` and `sample` before any `encode` need it.

    Raises:
        ValueError: an unknown likelihood.

    Reference: Kingma & Welling 2014.
    """

    @checked
    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: str = "bernoulli",
        *,
        latent_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.likelihood = encoder, decoder, likelihood
        self.latent_shape = latent_shape
        self._auto: dict[tuple[object, ...], kept.AutoKeep] = {}  # of keep="auto", by objective

    def _like(self) -> Tensor:
        """A tensor of the model's dtype, on its device."""
        return next((p for p in self.parameters() if p.is_floating_point()), torch.empty(0))

    def _latent_shape(self) -> tuple[int, ...]:
        if self.latent_shape is None:
            raise ValueError("latent_shape is not known yet: encode a batch first, or give VAE(..., latent_shape=(M,))")
        return self.latent_shape

    @checked
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Parameters of q(z | x) = N(mu, diag exp(logvar)).

        Args:
            x: [B, *event]; floating, uint8 (the encoder sees x / 255) or bool. Counts: floating, uint8, int16, int32
                or int64; the encoder sees them as they are, in the model's dtype, and may begin with log1p.

        Returns:
            mu, logvar: each [B, *latent].

        Raises:
            ValueError, TypeError: x of another dtype; an encoder that returns neither a pair of one shape nor a tensor
                that halves on dim 1.

        Reference: Kingma & Welling 2014, sec. 2.4.
        """
        if not x.is_floating_point():
            x = reference.read_data(x, self._like().dtype, likelihoods.get(self.likelihood).domain)
        out = self.encoder(x)
        if isinstance(out, Tensor):
            if out.dim() < 2 or out.shape[1] % 2:
                raise ValueError(
                    "encoder must return a pair (mu, logvar), or one tensor of even size on dim 1 to split in half; "
                    f"got a tensor {tuple(out.shape)}"
                )
            mu, logvar = out.chunk(2, 1)
        elif isinstance(out, tuple | list) and len(out) == 2 and all(isinstance(t, Tensor) for t in out):
            mu, logvar = out
        else:
            raise TypeError(f"encoder must return a pair (mu, logvar) or one tensor; got {type(out).__name__}")
        if mu.shape != logvar.shape:
            raise ValueError(
                "encoder must return mu and logvar of the same shape [B, *latent]; "
                f"got {tuple(mu.shape)} and {tuple(logvar.shape)}"
            )
        if self.latent_shape != tuple(mu.shape[1:]):
            self.latent_shape = tuple(mu.shape[1:])
        return mu, logvar

    @checked
    def decode(self, z: Tensor) -> Recon:
        """Parameters of p(x | z). The decoder sees K and B folded into one batch dimension.

        Args:
            z: [B, *latent] or [K, B, *latent].

        Returns:
            recon: [B, *event] or [K, B, *event], or a tuple of which that is the first tensor; a further one that
            broadcasts is left as it is.

        Raises:
            ValueError, TypeError: z of another shape; `latent_shape` not known yet; a decoder whose output does not
                keep the batch, or is neither a tensor nor a tuple of two or three.
        """
        latent = self._latent_shape()
        lead = z.dim() - len(latent)
        if lead not in (1, 2) or tuple(z.shape[lead:]) != latent:
            raise ValueError(f"z must be [B, *latent] or [K, B, *latent] with latent={latent}; got {tuple(z.shape)}")
        batch = z.flatten(0, 1) if lead == 2 else z
        out = self.decoder(batch)
        several = isinstance(out, tuple | list) and 2 <= len(out) <= len(ORDINALS)
        if not isinstance(out, Tensor) and not (several and all(isinstance(t, Tensor) for t in out)):
            many, kind = isinstance(out, tuple | list), type(out).__name__
            came = f"a {kind} of {', '.join(type(t).__name__ for t in out)}" if many else kind
            expected = "a tensor, or a tuple of two or three tensors such as (mean, logvar)"
            raise TypeError(f"decoder must return {expected}; got {came}")
        first, *others = split_recon(out)
        size = batch.shape[0]
        if first.dim() == 0 or first.shape[0] != size:
            raise ValueError(f"decoder must return [{size}, *event] for {size} latents; got {tuple(first.shape)}")
        if lead == 2:
            whole = [t.dim() == first.dim() and t.shape[0] == size for t in others]
            others = [t.unflatten(0, z.shape[:2]) if w else t for t, w in zip(others, whole, strict=True)]
            first = first.unflatten(0, z.shape[:2])
        return join_recon(first, *others)

    if TYPE_CHECKING:

        def __call__(
            self,
            x: Tensor,
            num_samples: int | None = None,
            *,
            seed: int | Tensor | None = None,
            generator: Generator | None = None,
            eps: Tensor | None = None,
        ) -> VAEOutput: ...

    def forward(
        self,
        x: Tensor,
        num_samples: int | None = None,
        *,
        seed: int | Tensor | None = None,
        generator: Generator | None = None,
        eps: Tensor | None = None,
    ) -> VAEOutput:
        """Encode, draw z = mu + exp(logvar / 2) eps, decode: everything that a loss needs.

        Args:
            x: [B, *event], of a dtype that `encode` takes.
            num_samples: K. None draws one sample without the K dimension.
            seed, generator, eps: the noise, as in `fastelbo.rsample`; torch's default generator without them.

        Returns:
            VAEOutput(recon [K?, B, *event] or a tuple, posterior): posterior is what `fastelbo.rsample` returns.

        Raises:
            ValueError, TypeError: as in `encode`, `decode` and `fastelbo.rsample`.

        Reference: Kingma & Welling 2014, sec. 2.4.
        """
        mu, logvar = self.encode(x)
        posterior = rsample(mu, logvar, num_samples, seed=seed, generator=generator, eps=eps)
        return VAEOutput(self.decode(posterior.z), posterior)

    def reconstruct(self, x: Tensor) -> Tensor:
        """E[x | z = mu(x)]: the mean of the likelihood at the posterior mean; draws nothing.

        Args:
            x: [B, *event], of a dtype that `encode` takes.

        Returns:
            [B, *event], in the decoder's dtype; for uint8 data that are no counts, on the scale of x / 255.

        Raises:
            ValueError, TypeError: as in `encode` and `decode`.
        """
        return likelihood_mean(self.decode(self.encode(x)[0]), self.likelihood)

    @torch.no_grad()
    @checked
    def sample(self, n: int, *, mean: bool = False, generator: Generator | None = None) -> Tensor:
        """Ancestral samples: z ~ N(0, I), then x ~ p(x | z).

        Args:
            n: how many.
            mean: return E[x | z] in place of the draw x, as pictures of prior samples usually do.
            generator: the source of the noise, on the model's device; torch's default one if None.

        Returns:
            [n, *event], in the decoder's dtype.

        Raises:
            ValueError: `latent_shape` is not known yet.
        """
        like = self._like()
        z = torch.randn(n, *self._latent_shape(), dtype=like.dtype, device=like.device, generator=generator)
        recon = self.decode(z)
        if mean:
            return likelihood_mean(recon, self.likelihood)
        return likelihood_sample(recon, self.likelihood, generator=generator)

    @overload
    def loss(self, x: Tensor, *, return_parts: Literal[False] = False, **options: Unpack[VAEOptions]) -> Tensor: ...

    @overload
    def loss(self, x: Tensor, *, return_parts: Literal[True], **options: Unpack[VAEOptions]) -> LossParts: ...

    @overload
    def loss(self, x: Tensor, *, return_parts: bool, **options: Unpack[VAEOptions]) -> Tensor | LossParts: ...

    @checked
    def loss(
        self,
        x: Tensor,
        *,
        objective: str = "elbo",
        num_samples: int = 1,
        beta: float | Tensor | None = None,
        free_bits: float = 0.0,
        alpha: float = 0.0,
        groups: int = 1,
        keep: int | Literal["auto"] | None = None,
        reduction: str = "mean",
        return_parts: bool = False,
        seed: int | Tensor | None = None,
        generator: Generator | None = None,
        eps: Tensor | None = None,
    ) -> Tensor | LossParts:
        """Minus a lower bound on log p(x), to be minimized; never averaged over D.

        "elbo": -mean_k log p(x | z_k) + beta KL(q(z | x) || N(0, I)), the KL in closed form.
        "stl", "iwae", "dreg", "rws", "vr", "ciwae", "miwae": see `fastelbo.multi_sample_loss`.

        Args:
            x: [B, *event], of a dtype that `encode` takes; the loss reads uint8 as the encoder does.
            objective: a name above.
            num_samples: K. "elbo" draws a single sample without the K dimension.
            beta: of "elbo", the weight of the KL (1 if None); of "ciwae", the weight of the ELBO (0.5 if None).
            free_bits: of "elbo", the floor in nats of every dimension's KL.
            alpha, groups: of "vr" and of "miwae".
            keep: of the K samples, how many per datum are back-propagated, on average; all if None. The loss is the
                same; its gradient is unbiased for that of all, given the weights (`fastelbo.keep_samples`). The decoder
                runs over all K without a graph, in pieces that fit the cache, and once more over keep * B rows with a
                graph, in half the time where keep is a tenth of K; neither z nor recon of all K exists at once.
                "auto": the smallest of a few sizes that adds at most 5 % to the variance of the gradient, by the
                weights of earlier batches; all samples where keeping fewer is no less work.
            reduction: "mean" (over B), "sum" or "none".
            return_parts: also return log p(x | z) and the KL per datum; with keep, log p(x | z) has no graph.
            seed, generator, eps: the noise, as in `fastelbo.rsample`; eps is [B, *latent] for "elbo" with one sample,
                [K, B, *latent] otherwise.

        Returns:
            A scalar, or [B] with reduction="none", in nats; with return_parts,
            LossParts(loss, log_likelihood [B] or [K, B], kl [B]).

        Raises:
            ValueError: an unknown objective, an option that the objective does not read or is not defined for.
            ValueError: keep with "elbo" or "stl", whose samples all weigh the same, with eps, or with a decoder whose
                two runs differ: dropout, and batch norm in training mode.
            ValueError, TypeError: as in `forward`, `fastelbo.elbo_loss` and `fastelbo.multi_sample_loss`.

        Reference: Kingma & Welling 2014, eq. 10; those of `fastelbo.multi_sample_loss`.
        """
        check_objective(objective, beta=beta, free_bits=free_bits, alpha=alpha, groups=groups)
        auto = None
        if keep is not None:
            if eps is not None:
                raise ValueError("eps and keep exclude each other: kept noise is drawn again from its seed; give that")
            row = kept.row_of(
                objective,
                num_samples,
                alpha=alpha,
                beta=0.5 if isinstance(beta, Tensor | None) else beta,
                groups=groups,
            )
            if isinstance(keep, str):
                auto = self._auto_keep(row, num_samples)
                keep = auto.keep
            elif keep > num_samples:
                raise ValueError(f"keep must be at most num_samples={num_samples}; got {keep}")
            if keep < num_samples:
                parts = self._kept_loss(x, row, num_samples, keep, auto, reduction, seed, generator)
                return parts if return_parts else parts.loss
        recon, posterior = self(x, draws(objective, num_samples), seed=seed, generator=generator, eps=eps)
        parts = objective_loss(
            objective,
            recon,
            x,
            posterior,
            beta=beta,
            free_bits=free_bits,
            alpha=alpha,
            groups=groups,
            likelihood=self.likelihood,
            reduction=reduction,
        )
        if auto is not None and auto.due():
            auto.update(kept.weigh(parts.log_likelihood + posterior.log_ratio, row).a)
        return parts if return_parts else parts.loss

    def _auto_keep(self, row: Estimator, num_samples: int) -> kept.AutoKeep:
        """What `keep="auto"` has seen of an objective's weights, for checkpoints: `state_dict`, `load_state_dict`."""
        return self._auto.setdefault((row, num_samples), kept.AutoKeep(num_samples))

    def _kept_loss(
        self,
        x: Tensor,
        row: Estimator,
        num_samples: int,
        keep: int,
        auto: kept.AutoKeep | None,
        reduction: str,
        seed: int | Tensor | None,
        generator: Generator | None,
    ) -> LossParts:
        """The loss of all samples, whose graph holds `keep` of them per datum."""
        kept.check_repeats(self.decoder)
        mu, logvar = self.encode(x)
        key = seed_tensor(seed, generator, mu.device)
        log_p, log_ratio = [], []
        with torch.no_grad(), kept.autocast_cache_off():
            for first, last in pieces(x, 0, num_samples):
                drawn = rsample(mu, logvar, last - first, seed=key, first_sample=first)
                log_p.append(log_prob(self.decode(drawn.z), x, likelihood=self.likelihood))
                log_ratio.append(drawn.log_ratio)
        log_likelihood = torch.cat(log_p)
        weights = kept.weigh(log_likelihood + torch.cat(log_ratio), row)
        if auto is not None and auto.due():
            auto.update(weights.a)
        if not torch.is_grad_enabled():
            loss = -weights.bound.to(log_likelihood.dtype)
            return LossParts(reference.reduce(loss, reduction), log_likelihood, gaussian_kl(mu, logvar))
        chosen = kept.select(weights.a, keep, generator=generator)
        posterior = kept.rsample_kept(mu, logvar, chosen, seed=key)
        recon = self.decode(posterior.z)
        rows = log_prob(recon, x.index_select(0, chosen.datum), likelihood=self.likelihood)
        loss = kept.loss_of(rows, posterior, chosen, weights, row)
        return LossParts(reference.reduce(loss, reduction), log_likelihood, posterior.kl)

    def log_marginal(
        self,
        x: Tensor,
        num_samples: int,
        *,
        chunk_size: int | None = None,
        proposal: str = "posterior",
        seed: int | Tensor | None = None,
        generator: Generator | None = None,
    ) -> MarginalEstimate:
        """Estimate log p(x) = log E_{z ~ r}[p(x | z) p(z) / r(z)] with K samples of the proposal r.

        "posterior": r = q(z | x), importance sampling. "prior": r = p(z), plain Monte Carlo: the same K samples serve
        all data, and the estimate falls off fast with the number of latent dimensions. Both are lower bounds in
        expectation. The encoder runs once; the memory does not grow with K; no gradient is recorded. Modules run in the
        mode they are in: call `eval()` first where that matters.

        Args:
            x: [B, *event], of a dtype that `encode` takes.
            num_samples: K.
            chunk_size: at most so many samples per datum are decoded at a time; fewer where they would leave the cache.
                The same seed draws the same samples for any chunk_size.
            proposal: "posterior" or "prior".
            seed, generator: the noise, as in `fastelbo.rsample`.

        Returns:
            MarginalEstimate(log_prob, ess, std_error, max_weight), each [B], float64, log_prob in nats.

        Raises:
            ValueError, TypeError: a number below 1, an unknown proposal; as in `encode` and `decode`.

        Reference: Burda et al. 2016, eq. 8.
        """
        total = LogMeanExp()
        chunks = log_weights(
            self, x, num_samples, chunk_size=chunk_size, proposal=proposal, seed=seed, generator=generator
        )
        for log_w in progress(chunks, "log p(x)", "sample", num_samples, len):
            total.update(log_w)
        return total.result()
