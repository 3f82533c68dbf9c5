"""The variational autoencoder: any encoder and decoder around `rsample` and the losses."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, Unpack, overload

import torch
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastelbo import likelihoods, reference
from fastelbo._internal import domains
from fastelbo._internal.arguments import ORDINALS, checked
from fastelbo._internal.ordered import reduce
from fastelbo._internal.progress import progress
from fastelbo.estimators import ESTIMATORS, Estimator
from fastelbo.losses import (
    LossParts,
    Posterior,
    Recon,
    elbo_parts,
    expand,
    gaussian_kl,
    join_recon,
    kept,
    likelihood_mean,
    likelihood_sample,
    log_prob,
    multi_sample_parts,
    rsample,
    seed_tensor,
    split_recon,
)
from fastelbo.models.marginal import (
    Condition,
    LogMeanExp,
    MarginalEstimate,
    by_rows,
    fold,
    given,
    log_weights,
    pieces,
    rows_between,
    rows_of,
)

# Every objective with the options that it reads; the others must keep their defaults.
# "elbo" is the one with the KL in closed form; the others are the estimators of `multi_sample_loss`.
OBJECTIVES: dict[str, tuple[str, ...]] = {name: row.options for name, row in ESTIMATORS.items()}
OBJECTIVES["elbo"] = ("beta", "free_bits")
_DEFAULTS = {"beta": None, "free_bits": 0.0, "alpha": 0.0, "groups": 1}


class VAEOutput(NamedTuple):
    """What `VAE.forward` returns: the arguments of the losses."""

    recon: Recon  # [K?, B, *event], or a tuple such as (mean, logvar)
    posterior: Posterior


class _Options(TypedDict, total=False):
    """Options of `VAE.loss`, and of a call with an objective."""

    condition: Condition | None
    mask: Tensor | None
    beta: float | Tensor | None
    free_bits: float
    alpha: float
    groups: int
    keep: int | Literal["auto"] | None
    reduction: str
    seed: int | Tensor | None
    generator: Generator | None
    eps: Tensor | None


class VAEOptions(_Options, total=False):
    """Options of `VAE.loss`."""

    objective: str
    num_samples: int


class _ForwardOptions(TypedDict, total=False):
    """What a call with an objective passes on to `VAE.loss` besides the arguments that every call takes."""

    beta: float | Tensor | None
    free_bits: float
    alpha: float
    groups: int
    keep: int | Literal["auto"] | None
    reduction: str
    return_parts: bool


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
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> LossParts:
    """The loss of an objective by its name, on what `VAE.forward` returned; the arguments are those of `VAE.loss`."""
    check_objective(objective, beta=beta, free_bits=free_bits, alpha=alpha, groups=groups)
    if objective == "elbo":
        return elbo_parts(
            recon,
            x,
            posterior.mu,
            posterior.logvar,
            **posterior.prior_options,
            likelihood=likelihood,
            mask=mask,
            beta=1.0 if beta is None else beta,
            free_bits=free_bits,
            reduction=reduction,
        )
    assert not isinstance(beta, Tensor)
    return multi_sample_parts(
        recon,
        x,
        posterior,
        likelihood=likelihood,
        mask=mask,
        estimator=objective,
        alpha=alpha,
        beta=0.5 if beta is None else beta,
        groups=groups,
        reduction=reduction,
    )


class _Pair(nn.Module):
    """A prior of a mean and a log variance, which are parameters if they were given as such."""

    def __init__(self, mu: Tensor, logvar: Tensor) -> None:
        super().__init__()
        for name, t in (("mu", mu), ("logvar", logvar)):
            register = self.register_parameter if isinstance(t, nn.Parameter) else self.register_buffer
            register(name, t)  # type: ignore[arg-type]

    def forward(self, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        return self.mu, self.logvar  # type: ignore[return-value]


def _check_nan(x: Tensor, mask: Tensor | None, loss: Tensor) -> None:
    """Refuse NaN in x, where the loss tells of it. A CUDA device would have to be waited for: there it stays NaN."""
    if torch.compiler.is_compiling() or loss.device.type != "cpu" or not x.is_floating_point():
        return
    if torch._C._are_functorch_transforms_active() or not loss.isnan().any():
        return
    missing = x.isnan()
    if mask is not None:
        missing = missing & (mask != 0)
    if missing.any():
        where = "" if mask is None else " where mask is not 0"
        raise ValueError(f"x holds NaN in {int(missing.sum())} places{where}; give mask=~x.isnan() to leave them out")


class VAE(nn.Module):
    """Variational autoencoder: z ~ p(z), x ~ p(x | decoder(z)), q(z | x) = N(mu, diag exp(logvar)) from encoder(x).

    Every method takes a `condition`, such as a label: a tensor [B, ...] or a tuple of them. Encoder, decoder and a
    prior module are given it as their second argument (the prior as its first), with K and B folded as in z. Methods
    that read x take a `mask` as in `fastelbo.log_prob`: what it leaves out counts for nothing, and the encoder sees 0
    there (the zero imputation of Mattei & Frellsen 2019).

    The first batch of `loss` is looked at, on the CPU and where nothing is compiled: data outside of the likelihood's
    domain, and a decoder whose last layer cannot reach its parameters (a Tanh where logits are due, a ReLU below data
    that are negative), are refused. A compiled model, and one on another device, is not checked.

    Under DistributedDataParallel, call the wrapped model: `ddp(x, objective="iwae", num_samples=50)` is the loss.

    Args:
        encoder: a module x [B, *event] -> (mu, logvar), each [B, *latent], or one tensor that is halved on dim 1:
            [B, 2 M], or channels [B, 2 C, ...]. Where a layer acts on the last of several dimensions, return the pair.
        decoder: a module z [B, *latent] -> recon [B, *event], or a tuple such as (mean, logvar) whose further tensors
            broadcast to the first: [B, *event], [*event], or 0-d for one learned variance.
        likelihood: a name of `fastelbo.log_prob`, which says what recon means.
        prior: p(z) = N(mu_p, diag exp(logvar_p)): a pair of tensors or parameters (mu_p, logvar_p) that broadcast to
            [B, *latent], or a module that returns one, called with the condition if there is one. None: N(0, I).
        latent_shape: the shape of one latent, without B; `encode` refuses another. None: taken from the latest
            `encode`, so that only `decode` and `sample` before any `encode` need it. It travels in the state dict,
            which has no entry for it before it is known; torch.distributed.checkpoint loads only entries that are
            there.

    Raises:
        ValueError: an unknown likelihood.

    Reference: Kingma & Welling 2014; conditions: Sohn et al. 2015.
    """

    _stated_shape: tuple[int, ...] | None = None  # the latent_shape that was given; pickles of older versions have none

    @checked
    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: str = "bernoulli",
        *,
        prior: nn.Module | tuple[Tensor, Tensor] | None = None,
        latent_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.likelihood = encoder, decoder, likelihood
        self.prior = prior if prior is None or isinstance(prior, nn.Module) else _Pair(*prior)
        self.latent_shape = self._stated_shape = latent_shape
        self._wrapped = False  # by DistributedDataParallel
        self._looked = 0  # of first batches: 1 after one without a graph, 2 after one with it
        self._auto: dict[tuple[object, ...], kept.AutoKeep] = {}  # of keep="auto", by objective

    def _like(self) -> Tensor:
        """A tensor of the model's dtype, on its device."""
        return next((p for p in self.parameters() if p.is_floating_point()), torch.empty(0))

    def _latent_shape(self) -> tuple[int, ...]:
        if self.latent_shape is None:
            raise ValueError("latent_shape is not known yet: encode a batch first, or give VAE(..., latent_shape=(M,))")
        return self.latent_shape

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

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> Sequence[str]:
        """Read by DistributedDataParallel of the module that it wraps: so `loss` knows that it is wrapped."""
        self._wrapped = True
        names: Sequence[str] = self.__dict__.get("_ddp_ignored", ())
        return names

    @_ddp_params_and_buffers_to_ignore.setter
    def _ddp_params_and_buffers_to_ignore(self, names: Sequence[str]) -> None:
        self.__dict__["_ddp_ignored"] = names

    def _prior_parameters(self, condition: Condition | None = None) -> dict[str, Tensor]:
        """prior_mu and prior_logvar, as `fastelbo.rsample` and the losses take them; nothing for N(0, I)."""
        if self.prior is None:
            return {}
        out = self.prior(*given(condition))
        if not isinstance(out, tuple | list) or len(out) != 2 or not all(isinstance(t, Tensor) for t in out):
            raise TypeError(f"prior must return a pair of tensors (mu, logvar); got {type(out).__name__}")
        return {"prior_mu": out[0], "prior_logvar": out[1]}

    @checked
    def encode(
        self, x: Tensor, condition: Condition | None = None, *, mask: Tensor | None = None
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
        if mask is not None:
            x = x.masked_fill(expand("mask", mask, x.shape, "x") == 0, 0)
        out = self.encoder(x, *given(condition))
        if isinstance(out, Tensor):
            if out.dim() < 2 or out.shape[1] % 2:
                raise ValueError(
                    "encoder must return a pair (mu, logvar), or one tensor of even size on dim 1 to split in half; "
                    f"got a tensor {tuple(out.shape)}"
                )
            if self._stated_shape is None:
                domains.check_halved(out)
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
        if self._stated_shape is not None and tuple(mu.shape[1:]) != self._stated_shape:
            halved = f", half of one tensor {tuple(out.shape)} on dim 1" if isinstance(out, Tensor) else ""
            raise ValueError(
                f"encoder must return latents of the latent_shape={self._stated_shape} that was given; got "
                f"{tuple(mu.shape[1:])}{halved}: return a pair (mu, logvar) of that shape, or give another latent_shape"
            )
        # not read before, or compiled code would depend on what was there; but torch.export warns of what is written,
        # and torch.jit.trace refuses a state dict that changes
        learns = not torch.compiler.is_exporting() or self.latent_shape != tuple(mu.shape[1:])
        if learns and not torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            self.latent_shape = tuple(mu.shape[1:])
        return mu, logvar

    @checked
    def decode(self, z: Tensor, condition: Condition | None = None) -> Recon:
        """Parameters of p(x | z). The decoder sees K and B folded into one batch dimension.

        Args:
            z: [B, *latent] or [K, B, *latent].
            condition: see `VAE`.

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
        out = self.decoder(batch, *given(fold(condition, z.shape[:lead])))
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
            others = [torch.unflatten(t, 0, z.shape[:2]) if w else t for t, w in zip(others, whole, strict=True)]
            first = torch.unflatten(first, 0, z.shape[:2])  # torch.compile refuses the method under a default device
        return join_recon(first, *others)

    if TYPE_CHECKING:

        @overload
        def __call__(
            self,
            x: Tensor,
            num_samples: int | None = None,
            *,
            condition: Condition | None = None,
            mask: Tensor | None = None,
            seed: int | Tensor | None = None,
            generator: Generator | None = None,
            eps: Tensor | None = None,
        ) -> VAEOutput: ...

        @overload
        def __call__(
            self,
            x: Tensor,
            num_samples: int = 1,
            *,
            objective: str,
            return_parts: Literal[False] = False,
            **options: Unpack[_Options],
        ) -> Tensor: ...

        @overload
        def __call__(
            self,
            x: Tensor,
            num_samples: int = 1,
            *,
            objective: str,
            return_parts: Literal[True],
            **options: Unpack[_Options],
        ) -> LossParts: ...

        def __call__(self, x: Tensor, *args: object, **kwargs: object) -> object: ...

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
        objective: str | None = None,
        **options: Unpack[_ForwardOptions],
    ) -> VAEOutput | Tensor | LossParts:
        """Encode, draw z = mu + exp(logvar / 2) eps, decode: everything that a loss needs.

        Args:
            x: [B, *event], of a dtype that `encode` takes.
            num_samples: K. None draws one sample without the K dimension.
            condition, mask: see `VAE`. The output does not depend on mask, but for what the encoder sees.
            seed, generator, eps: the noise, as in `fastelbo.rsample`; torch's default generator without them.
            objective: return the loss in place of the output: `loss` with these arguments and `options`. The way to
                train under DistributedDataParallel, which synchronizes gradients of what is called through it.

        Returns:
            VAEOutput(recon [K?, B, *event] or a tuple, posterior): posterior is what `fastelbo.rsample` returns. With
            an objective, what `loss` returns.

        Raises:
            ValueError, TypeError: as in `encode`, `decode` and `fastelbo.rsample`; options without an objective.

        Reference: Kingma & Welling 2014, sec. 2.4.
        """
        if objective is not None:
            found: Tensor | LossParts = self.loss(
                x,
                objective=objective,
                num_samples=1 if num_samples is None else num_samples,
                condition=condition,
                mask=mask,
                seed=seed,
                generator=generator,
                eps=eps,
                **options,
            )
            return found
        if options:
            raise TypeError(f"{', '.join(options)} has no effect without an objective: give one, or leave it out")
        mu, logvar = self.encode(x, condition, mask=mask)
        posterior = rsample(
            mu, logvar, num_samples, **self._prior_parameters(condition), seed=seed, generator=generator, eps=eps
        )
        return VAEOutput(self.decode(posterior.z, condition), posterior)

    def reconstruct(self, x: Tensor, condition: Condition | None = None, *, mask: Tensor | None = None) -> Tensor:
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
        n: int,
        condition: Condition | None = None,
        *,
        mean: bool = False,
        generator: Generator | None = None,
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
        z = torch.randn(n, *self._latent_shape(), dtype=like.dtype, device=like.device, generator=generator)
        if prior := self._prior_parameters(condition):
            z = prior["prior_mu"] + torch.exp(0.5 * prior["prior_logvar"]) * z
        fold(condition, (n,))  # refuses one of another number of rows

        def drawn(first: int, last: int) -> Tensor:
            recon = self.decode(z[first:last], rows_between(condition, first, last))
            if mean:
                return likelihood_mean(recon, self.likelihood)
            return likelihood_sample(recon, self.likelihood, generator=generator)

        return by_rows(drawn, n)

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
        condition: Condition | None = None,
        mask: Tensor | None = None,
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

        "elbo": -mean_k log p(x | z_k) + beta KL(q(z | x) || p(z)), the KL in closed form.
        "stl", "iwae", "dreg", "rws", "vr", "ciwae", "miwae": see `fastelbo.multi_sample_loss`.

        Args:
            x: [B, *event], of a dtype that `encode` takes; the loss reads uint8 as the encoder does.
            objective: a name above.
            num_samples: K. "elbo" draws a single sample without the K dimension.
            condition, mask: see `VAE`. With a mask, log p(x | z) is that of what it leaves.
            beta: of "elbo", the weight of the KL (1 if None); of "ciwae", the weight of the ELBO (0.5 if None).
            free_bits: of "elbo", the floor in nats of every dimension's KL.
            alpha, groups: of "vr" and of "miwae".
            keep: of the K samples, how many per datum are back-propagated, on average; all if None. The loss is the
                same; its gradient is unbiased for that of all, given the weights (`fastelbo.keep_samples`). The decoder
                runs over all K without a graph, in pieces that fit the cache, and once more over keep * B rows with a
                graph, in half the time where keep is a tenth of K; neither z nor recon of all K exists at once.
                "auto": the smallest of a few sizes that adds at most 5 % to the variance of the gradient, by the
                weights of earlier batches; all samples where keeping fewer is no less work. Compiled code takes the
                size that calls in eager mode have found, and looks at no weights itself.
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
                two runs differ: dropout, batch norm and spectral norm in training mode, by their modules; any other
                by log p of the kept samples, on the CPU and where nothing is compiled.
            ValueError: NaN in x that no mask leaves out, on the CPU; elsewhere the loss is NaN.
            ValueError: a first batch or a decoder that contradicts the likelihood; see `VAE`.
            ValueError, TypeError: as in `forward`, `fastelbo.elbo_loss` and `fastelbo.multi_sample_loss`.

        Reference: Kingma & Welling 2014, eq. 10; those of `fastelbo.multi_sample_loss`.
        """
        check_objective(objective, beta=beta, free_bits=free_bits, alpha=alpha, groups=groups)
        self._warn_of_ddp()
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
                parts = self._kept_loss(x, condition, mask, row, num_samples, keep, auto, reduction, seed, generator)
                _check_nan(x, mask, parts.loss)
                return parts if return_parts else parts.loss
        recon, posterior = self(
            x,
            draws(objective, num_samples),
            condition=condition,
            mask=mask,
            seed=seed,
            generator=generator,
            eps=eps,
        )
        self._look(x, mask, recon)
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
            mask=mask,
            reduction=reduction,
        )
        _check_nan(x, mask, parts.loss)
        if auto is not None and auto.due():
            auto.update(kept.weigh(parts.log_likelihood + posterior.log_ratio, row).a)
        return parts if return_parts else parts.loss

    def _look(self, x: Tensor, mask: Tensor | None, recon: Recon | None = None) -> None:
        """Refuse what contradicts the likelihood in a first batch, and in the first with a graph; see `domains`."""
        if torch.compiler.is_compiling():
            return
        if not self._looked:
            domains.check_data(x, self.likelihood, mask)
        if recon is None:
            return
        parameters = split_recon(recon)
        level = 1 + parameters[0].requires_grad
        if self._looked >= level:
            return
        domains.check_decoder(parameters, x, self.likelihood, mask)
        first, self._looked = not self._looked, level
        logits = parameters[0].detach()
        if self.likelihood != "bernoulli" or not first or logits.numel() < 64 or not domains.readable(logits):
            return
        low, high = logits.aminmax()
        if 0 <= low < high <= 1:
            warnings.warn(
                f"every number that the decoder returned is in [0, 1], from {low:.3g} to {high:.3g}, as if it were a "
                "probability; likelihood 'bernoulli' takes logits: leave out the sigmoid, or take 'bernoulli_probs'",
                stacklevel=4,
            )

    def _warn_of_ddp(self) -> None:
        if torch.compiler.is_compiling() or not self._wrapped or not torch.is_grad_enabled():
            return
        if DistributedDataParallel._active_ddp_module is None:
            self._wrapped = False  # once
            warnings.warn(
                "loss was called on the module that DistributedDataParallel wraps, whose gradients are then not "
                'synchronized: call the wrapper, ddp(x, objective="elbo", ...), which returns the same loss',
                stacklevel=4,
            )

    def _auto_keep(self, row: Estimator, num_samples: int) -> kept.AutoKeep:
        """What `keep="auto"` has seen of an objective's weights, for checkpoints: `state_dict`, `load_state_dict`."""
        known = self._auto.get if torch.compiler.is_compiling() else self._auto.setdefault
        return known((row, num_samples), kept.AutoKeep(num_samples))

    def _kept_loss(
        self,
        x: Tensor,
        condition: Condition | None,
        mask: Tensor | None,
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
        mu, logvar = self.encode(x, condition, mask=mask)
        self._look(x, mask)
        prior = self._prior_parameters(condition)
        key = seed_tensor(seed, generator, mu.device)
        log_p, log_ratio = [], []
        with torch.no_grad(), kept.autocast_cache_off():
            for first, last in pieces(x, 0, num_samples):
                drawn = rsample(mu, logvar, last - first, **prior, seed=key, first_sample=first)
                log_p.append(log_prob(self.decode(drawn.z, condition), x, likelihood=self.likelihood, mask=mask))
                log_ratio.append(drawn.log_ratio)
        log_likelihood = torch.cat(log_p)
        weights = kept.weigh(log_likelihood + torch.cat(log_ratio), row)
        if auto is not None and auto.due():
            auto.update(weights.a)
        if not torch.is_grad_enabled():
            loss = -weights.bound.to(log_likelihood.dtype)
            return LossParts(reduce(loss, reduction), log_likelihood, gaussian_kl(mu, logvar, **prior))
        chosen = kept.select(weights.a, keep, generator=generator)
        posterior = rsample(mu, logvar, kept=chosen, **prior, seed=key)
        recon = self.decode(posterior.z, rows_of(condition, chosen.datum))
        left = None if mask is None else expand("mask", mask, x.shape, "x").index_select(0, chosen.datum)
        self._look(x, mask, recon)
        rows = log_prob(recon, x.index_select(0, chosen.datum), likelihood=self.likelihood, mask=left)
        kept.check_runs(rows, chosen, log_likelihood, split_recon(recon)[0])
        loss = kept.loss_of(rows, posterior, chosen, weights, row)
        return LossParts(reduce(loss, reduction), log_likelihood, posterior.kl)

    def log_marginal(
        self,
        x: Tensor,
        num_samples: int,
        *,
        chunk_size: int | None = None,
        proposal: str = "posterior",
        condition: Condition | None = None,
        mask: Tensor | None = None,
        seed: int | Tensor | None = None,
        generator: Generator | None = None,
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
                The same seed draws the same samples for any chunk_size.
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
