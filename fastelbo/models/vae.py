"""The variational autoencoder: any encoder and decoder around `rsample` and the losses."""

from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from fastelbo import likelihoods, reference
from fastelbo._internal import arguments
from fastelbo._internal.arguments import Condition, checked, typed_as
from fastelbo._internal.progress import progress
from fastelbo.losses import (
    LossParts,
    Posterior,
    Recon,
    expand,
    join_recon,
    likelihood_mean,
    likelihood_sample,
    loss_of,
    seed_tensor,
)
from fastelbo.models import checks, priors
from fastelbo.models.kept_samples import kept_parts
from fastelbo.models.marginal import LogMeanExp, MarginalEstimate, log_weights
from fastelbo.models.objective import Objective, objective_of
from fastelbo.models.pieces import by_rows, fold, given, rows_between
from fastelbo.models.scaling import Scaling

_Pair = priors.Pair  # as pickles of earlier versions name it


class VAEOutput(NamedTuple):
    """What `VAE.forward` returns: the arguments of the losses."""

    recon: Recon  # [K?, B, *event], or a tuple such as (mean, logvar)
    posterior: Posterior


class VAE(nn.Module):
    """Variational autoencoder: z ~ p(z), x ~ p(x | decoder(z)), q(z | x) = N(mu, diag exp(logvar)) from encoder(x).

    Every method takes a `condition`, such as a label: a tensor [B, ...] or a tuple of them. Encoder, decoder and a
    prior module are given it as their second argument (the prior as its first), with K and B folded as in z. Methods
    that read x take a `mask` as in `fastelbo.log_prob`: what it leaves out counts for nothing, and the encoder sees 0
    there, with a scaling the mean (the zero imputation of Mattei & Frellsen 2019).

    The first batch of `loss` is checked, on the CPU and where nothing is compiled: data outside of the likelihood's
    domain, and a decoder whose last layer cannot reach its parameters (a Tanh where logits are due, a ReLU below data
    that are negative), are refused. `VAELoss` is what DistributedDataParallel wraps.

    Args:
        encoder: a module x [B, *event] -> (mu, logvar), each [B, *latent], or one tensor that is halved on dim 1:
            [B, 2 M], or channels [B, 2 C, ...]. Where a layer acts on the last of several dimensions, return the pair.
        decoder: a module z [B, *latent] -> recon [B, *event], or a tuple such as (mean, logvar) whose further tensors
            broadcast to the first: [B, *event], [*event], or 0-d for one learned variance.
        likelihood: a name of `fastelbo.log_prob`, which says what recon means.
        prior: p(z) = N(mu_p, diag exp(logvar_p)): a pair of tensors or parameters (mu_p, logvar_p) that broadcast to
            [B, *latent], or a module that returns one, called with the condition if there is one. None: N(0, I).
            Any other density: a module with log_prob(z[, condition]) -> [K?, B] and sample(n[, condition]) ->
            [n, *latent]. The KL is then log q(z | x) - log p(z) at the samples, and there are no free bits.
        scaling: a `fastelbo.Scaling`, for data of any scale under a likelihood of the reals: encoder and decoder see
            standardized data; x, recon and every figure stay in the units of the data.
        latent_shape: the shape of one latent, without B; `encode` refuses another. None: taken from the latest
            `encode`, so that only `decode` and `sample` before any `encode` need it. It travels in the state dict,
            which has no entry for it before it is known; torch.distributed.checkpoint loads only entries that are
            there.

    Raises:
        ValueError: an unknown likelihood.

    Reference: Kingma & Welling 2014; conditions: Sohn et al. 2015.
    """

    scaling: Scaling | None

    # pickles of earlier versions have neither
    _stated_shape: tuple[int, ...] | None = None  # the latent_shape that was given
    _batches_checked = 0  # see `checks.check_batch`

    @checked
    def __init__(
        self,
        encoder: arguments.Module,
        decoder: arguments.Module,
        likelihood: arguments.Likelihood = "bernoulli",
        *,
        prior: arguments.Prior | None = None,
        scaling: Annotated[Scaling, arguments.instance(Scaling, "a fastelbo.Scaling")] | None = None,
        latent_shape: arguments.Shape | None = None,
    ) -> None:
        super().__init__()
        if scaling is not None and likelihoods.get(likelihood).domain != "reals":
            raise ValueError(f"scaling takes a likelihood of the reals, such as 'gaussian'; got {likelihood!r}")
        self.register_module("scaling", scaling)
        self.encoder, self.decoder, self.likelihood = encoder, decoder, likelihood
        self.prior = _Pair(*prior) if isinstance(prior, tuple | list) else prior
        self.latent_shape = self._stated_shape = latent_shape

    def _like(self) -> Tensor:
        """A tensor of the model's dtype, on its device."""
        return next((p for p in self.parameters() if p.is_floating_point()), torch.empty(0))

    def _latent_shape(self) -> tuple[int, ...]:
        if self.latent_shape is None:
            raise ValueError("latent_shape is not known yet: encode a batch first, or give VAE(..., latent_shape=(M,))")
        return self.latent_shape

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._modules.setdefault("scaling", None)  # pickles of earlier versions have none

    def get_extra_state(self) -> Tensor:
        """latent_shape as the size [0, *latent] of an empty tensor, so that no cast and no average can change it."""
        like = self._like()
        return torch.empty(0, *(self.latent_shape or ()), dtype=like.dtype, device=like.device)

    def set_extra_state(self, state: object) -> None:
        if not isinstance(state, Tensor) or self.latent_shape is not None:
            return
        if state.numel() == 0 and state.dtype != torch.int64:
            self.latent_shape = tuple(state.shape[1:])
        elif not state.is_meta:  # by an older version, whose state has the numbers themselves, or none
            self.latent_shape = tuple(round(size) for size in state.tolist()) or None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.latent_shape is None:
            del destination[f"{prefix}_extra_state"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(f"{prefix}_extra_state", None)  # where it was not known
        super()._load_from_state_dict(state_dict, prefix, *args)

    @checked
    def encode(
        self, x: arguments.Data, condition: Condition | None = None, *, mask: arguments.Mask | None = None
    ) -> tuple[Tensor, Tensor]:
        """Parameters of q(z | x) = N(mu, diag exp(logvar)).

        Args:
            condition, mask: see `VAE`.
            x: [B, *event]; floating, uint8 (the encoder sees x / 255) or bool. Counts: floating, uint8, int16, int32
                or int64; the encoder sees them as they are, in the model's dtype, and may begin with log1p.

        Returns:
            mu, logvar: each [B, *latent].

        Raises:
            ValueError, TypeError: x of another dtype; an encoder that returns neither a pair of one shape nor a tensor
                that halves on dim 1, or latents of another shape than the `latent_shape` that was given.

        Reference: Kingma & Welling 2014, sec. 2.4.
        """
        if not x.is_floating_point():
            x = reference.read_data(x, self._like().dtype, likelihoods.get(self.likelihood).domain)
        if self.scaling is not None:
            x = self.scaling(x)
        if mask is not None:
            x = x.masked_fill(expand("mask", mask, x.shape, "x") == 0, 0)
        mu, logvar = checks.encoded(self.encoder(x, *given(condition)), self._stated_shape)
        # not read before, or compiled code would depend on what was there; but torch.export warns of what is written,
        # and torch.jit.trace refuses a state dict that changes
        learns = not torch.compiler.is_exporting() or self.latent_shape != tuple(mu.shape[1:])
        if learns and not torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            self.latent_shape = tuple(mu.shape[1:])
        return mu, logvar

    @checked
    def decode(self, z: arguments.Floats, condition: Condition | None = None) -> Recon:
        """Parameters of p(x | z). The decoder sees K and B folded into one batch dimension.

        Args:
            z: [B, *latent] or [K, B, *latent].
            condition: see `VAE`.

        Returns:
            recon: [B, *event] or [K, B, *event], or a tuple of which that is the first tensor; a further one that
            broadcasts is left as it is.

        Raises:
            ValueError, TypeError: z of another shape; `latent_shape` not known yet; a decoder whose output does not
                keep the batch, or is neither a tensor nor a tuple of two to four.
        """
        latent = self._latent_shape()
        lead = z.dim() - len(latent)
        if lead not in (1, 2) or tuple(z.shape[lead:]) != latent:
            raise ValueError(f"z must be [B, *latent] or [K, B, *latent] with latent={latent}; got {tuple(z.shape)}")
        batch = z.flatten(0, 1) if lead == 2 else z
        size = batch.shape[0]
        first, *others = checks.decoded(self.decoder(batch, *given(fold(condition, z.shape[:lead]))), size)
        if lead == 2:
            whole = [t.dim() == first.dim() and t.shape[0] == size for t in others]
            others = [torch.unflatten(t, 0, z.shape[:2]) if w else t for t, w in zip(others, whole, strict=True)]
            first = torch.unflatten(first, 0, z.shape[:2])  # torch.compile refuses the method under a default device
        recon = join_recon(first, *others)
        return recon if self.scaling is None else self.scaling.inverse(recon, self.likelihood)

    def forward(
        self,
        x: Tensor,
        num_samples: int | None = None,
        *,
        condition: Condition | None = None,
        mask: Tensor | None = None,
        seed: int | Tensor | None = None,
        generator: Generator | None = None,
        eps: Tensor | None = None,
    ) -> VAEOutput:
        """Encode, draw z = mu + exp(logvar / 2) eps, decode: everything that a loss needs.

        Args:
            x: [B, *event], of a dtype that `encode` takes.
            num_samples: K. None draws one sample without the K dimension.
            condition, mask: see `VAE`. The output does not depend on mask, but for what the encoder sees.
            seed, generator, eps: the noise, as in `fastelbo.rsample`; torch's default generator without them.

        Returns:
            VAEOutput(recon [K?, B, *event] or a tuple, posterior): posterior is what `fastelbo.rsample` returns; with a
            prior that has log_prob, its kl is [K?, B] and its prior (log p(z) [K?, B],).

        Raises:
            ValueError, TypeError: as in `encode`, `decode` and `fastelbo.rsample`.

        Reference: Kingma & Welling 2014, sec. 2.4.
        """
        mu, logvar = self.encode(x, condition, mask=mask)
        draw = priors.sampler(self.prior, mu, logvar, condition)
        posterior = draw(num_samples, seed=seed, generator=generator, eps=eps)
        return VAEOutput(self.decode(posterior.z, condition), posterior)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: object, **kwargs: object) -> object: ...

    def reconstruct(
        self, x: arguments.Data, condition: Condition | None = None, *, mask: arguments.Mask | None = None
    ) -> Tensor:
        """E[x | z = mu(x)]: the mean of the likelihood at the posterior mean; draws nothing.

        Without a graph (`torch.no_grad()`), in pieces: beside the result, the memory does not grow with B. Modules run
        in the mode they are in: call `eval()` first.

        Args:
            x: [B, *event], of a dtype that `encode` takes.
            condition, mask: see `VAE`. With a mask, what it leaves out is imputed.

        Returns:
            [B, *event], in the decoder's dtype; for uint8 data that are no counts, on the scale of x / 255.

        Raises:
            ValueError, TypeError: as in `encode` and `decode`.
        """

        def rebuilt(x: Tensor, condition: Condition | None, mask: Tensor | None) -> Tensor:
            return likelihood_mean(self.decode(self.encode(x, condition, mask=mask)[0], condition), self.likelihood)

        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not isinstance(x, Tensor) or x.dim() == 0:
            return rebuilt(x, condition, mask)
        fold(condition, (len(x),))  # refuses one of another number of rows
        left = None if mask is None else expand("mask", mask, x.shape, "x")
        return by_rows(
            lambda a, b: rebuilt(x[a:b], rows_between(condition, a, b), None if left is None else left[a:b]), len(x)
        )

    @torch.no_grad()
    @checked
    def sample(
        self,
        n: arguments.Size,
        condition: Condition | None = None,
        *,
        mean: arguments.Flag = False,
        generator: arguments.Generator | None = None,
    ) -> Tensor:
        """Ancestral samples: z ~ p(z), then x ~ p(x | z).

        The decoder runs in pieces: beside the result and z, the memory does not grow with n. Modules run in the mode
        they are in: call `eval()` first.

        Args:
            n: how many.
            condition: of n rows; see `VAE`.
            mean: return E[x | z] in place of the draw x, as pictures of prior samples usually do.
            generator: the source of the noise, on the model's device; torch's default one if None.

        Returns:
            [n, *event], in the decoder's dtype.

        Raises:
            ValueError: `latent_shape` is not known yet, or condition of another number of rows.
        """
        like = self._like()
        if priors.is_density(self.prior):
            z = priors.sample(self.prior, n, condition, seed_tensor(None, generator, like.device))
        else:
            z = torch.randn(n, *self._latent_shape(), dtype=like.dtype, device=like.device, generator=generator)
            if prior := priors.parameters(self.prior, condition):
                z = prior[0] + torch.exp(0.5 * prior[1]) * z
        fold(condition, (n,))  # refuses one of another number of rows

        def drawn(first: int, last: int) -> Tensor:
            recon = self.decode(z[first:last], rows_between(condition, first, last))
            if mean:
                return likelihood_mean(recon, self.likelihood)
            return likelihood_sample(recon, self.likelihood, generator=generator)

        return by_rows(drawn, n)

    @checked
    def parts(
        self,
        x: arguments.Data,
        objective: Objective | str = "elbo",
        *,
        num_samples: arguments.Count | None = None,
        condition: Condition | None = None,
        mask: arguments.Mask | None = None,
        keep: arguments.Count | None = None,
        beta: arguments.NumberOrFloats | None = None,
        free_bits: arguments.NotNegative | None = None,
        alpha: arguments.Number | None = None,
        groups: arguments.Integer | None = None,
        reduction: arguments.Reduction = "mean",
        seed: arguments.Seed | None = None,
        generator: arguments.Generator | None = None,
        eps: arguments.Floats | None = None,
    ) -> LossParts:
        """Minus a lower bound on log p(x), to be minimized; never averaged over D.

        "elbo": -mean_k log p(x | z_k) + beta KL(q(z | x) || p(z)), the KL in closed form where the prior is a Gaussian.
        "stl", "iwae", "dreg", "rws", "vr", "ciwae", "miwae": see `fastelbo.multi_sample_loss`.

        Args:
            x: [B, *event], of a dtype that `encode` takes; the loss reads uint8 as the encoder does.
            objective: a name above, or a `fastelbo.Objective`.
            num_samples: K of an objective given by its name; 1 if None. "elbo" draws a single sample without the K
                dimension.
            condition, mask: see `VAE`. With a mask, log p(x | z) is that of what it leaves.
            keep: of the K samples, how many per datum are back-propagated, on average; all if None. The loss is the
                same; its gradient is unbiased for that of all, given the weights (`fastelbo.keep_samples`). The decoder
                runs over all K without a graph, in pieces, and over keep * B rows with a graph.
            beta: of "elbo", the weight of the KL (1 if None); of "ciwae", the weight of the ELBO (0.5 if None). beta,
                free_bits and alpha are floats or 0-d tensors, learned or not, and go before those of an Objective.
            free_bits: of "elbo", the floor in nats of every dimension's KL.
            alpha, groups: of "vr" and of "miwae".
            reduction: "mean" (over B), "sum" or "none".
            seed, generator, eps: the noise, as in `fastelbo.rsample`; eps is [B, *latent] for "elbo" with one sample,
                [K, B, *latent] otherwise.

        Returns:
            `loss`: a scalar, or [B] with reduction="none", in nats. `parts`: LossParts(loss, log_likelihood [B] or
            [K, B], kl [B]); with keep, log_likelihood has no graph, nor has a KL of samples.

        Raises:
            ValueError: an unknown objective, an option that the objective does not read or is not defined for.
            ValueError: keep with "elbo" or "stl", whose samples all weigh the same, with eps, with a learned number, or
                with a decoder whose two runs differ: dropout, batch norm and spectral norm in training mode, by their
                modules; any other by log p of the kept samples, on the CPU and where nothing is compiled.
            ValueError: NaN in x that no mask leaves out, on the CPU; elsewhere the loss is NaN.
            ValueError: a first batch or a decoder that contradicts the likelihood; see `VAE`.
            ValueError, TypeError: as in `forward`, `fastelbo.elbo_loss` and `fastelbo.multi_sample_loss`.

        Reference: Kingma & Welling 2014, eq. 10; those of `fastelbo.multi_sample_loss`.
        """
        objective = objective_of(objective, num_samples=num_samples, groups=groups)
        numbers: dict[str, float | Tensor | None] = {"beta": beta, "free_bits": free_bits, "alpha": alpha}
        if keep is not None:
            objective.check_keep(keep)
            if eps is not None:
                raise ValueError("eps and keep exclude each other: kept noise is drawn again from its seed; give that")
        inputs: dict[str, Any] = {"condition": condition, "mask": mask, "seed": seed, "generator": generator}
        if keep is None or keep == objective.num_samples:
            recon, posterior = self(x, objective.draws, eps=eps, **inputs)
            options: dict[str, Any] = {"likelihood": self.likelihood, "mask": mask, "reduction": reduction}
            parts = objective.parts(recon, x, posterior, **options | numbers)
        else:
            row, K = objective.estimator(**numbers), objective.num_samples
            parts, recon = kept_parts(self, x, row, K, keep, reduction=reduction, **inputs)
        if not torch.compiler.is_compiling():
            before = self._batches_checked
            self._batches_checked = checks.check_batch(before, x, mask, self.likelihood, recon, parts.loss)
        return parts

    loss = loss_of(parts, "loss")

    @checked
    def log_marginal(
        self,
        x: arguments.Data,
        num_samples: arguments.Count,
        *,
        chunk_size: arguments.Count | None = None,
        proposal: arguments.Text = "posterior",
        condition: Condition | None = None,
        mask: arguments.Mask | None = None,
        seed: arguments.Seed | None = None,
        generator: arguments.Generator | None = None,
    ) -> MarginalEstimate:
        """Estimate log p(x) = log E_{z ~ r}[p(x | z) p(z) / r(z)] with K samples of the proposal r.

        "posterior": r = q(z | x), importance sampling. "prior": r = p(z), plain Monte Carlo: without a condition, the
        same K samples serve all data; the estimate falls off fast with the number of latent dimensions. Both are lower
        bounds in expectation. The encoder runs once; the memory does not grow with K; no gradient is recorded. Modules
        run in the mode they are in: call `eval()` first where that matters.

        Args:
            x: [B, *event], of a dtype that `encode` takes.
            num_samples: K.
            chunk_size: at most so many samples per datum are decoded at a time; fewer where they would leave the cache.
                The same seed draws the same samples for any chunk_size, but for those of a prior's own `sample`.
            proposal: "posterior" or "prior".
            condition, mask: see `VAE`. With a mask, log p is that of what it leaves of x.
            seed, generator: the noise, as in `fastelbo.rsample`.

        Returns:
            MarginalEstimate(log_prob, ess, std_error, max_weight), each [B], float64, log_prob in nats.

        Raises:
            ValueError, TypeError: a number below 1, an unknown proposal; as in `encode` and `decode`.

        Reference: Burda et al. 2016, eq. 8.
        """
        total = LogMeanExp()
        chunks = log_weights(
            self,
            x,
            num_samples,
            chunk_size=chunk_size,
            proposal=proposal,
            condition=condition,
            mask=mask,
            seed=seed,
            generator=generator,
        )
        for log_w in progress(chunks, "log p(x)", "sample", num_samples, len):
            total.update(log_w)
        return total.result()


class VAELoss(nn.Module):
    """The loss of a VAE as a module: what DistributedDataParallel, or another wrapper of a forward, takes.

    Args:
        vae: a `fastelbo.VAE`.
        objective: a `fastelbo.Objective`, or the name of one.
        options: of `fastelbo.Objective`, with a name: num_samples, beta, free_bits, alpha, groups.

    Raises:
        ValueError, TypeError: as in `fastelbo.Objective`; vae is none.
    """

    def __init__(self, vae: VAE, objective: Objective | str = "elbo", **options: float) -> None:
        super().__init__()
        if not isinstance(vae, VAE):
            raise arguments.refusal("vae", "a fastelbo.VAE", vae)
        self.vae, self.objective = vae, objective_of(objective, **options)

    def forward(self, x: Tensor, **options: object) -> Tensor:
        """`VAE.loss` of the objective: condition, mask, keep, beta and its other options are explained there."""
        return self.vae.loss(x, self.objective, **options)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return repr(self.objective)
