"""What a VAE maximizes, as a value: the name of a bound with its numbers."""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any

from torch import Tensor

from fastelbo import estimators
from fastelbo._internal import arguments
from fastelbo._internal.arguments import checked
from fastelbo._internal.ordered import ordered_sum, reduce
from fastelbo.losses import LossParts, Posterior, elbo_parts, kept, log_prob, loss_of, multi_sample_parts, weighted

# Every objective with the numbers that it reads. "elbo" is the one with the KL in closed form; the others are the
# estimators of `multi_sample_loss`.
OBJECTIVES: dict[str, tuple[str, ...]] = {name: row.options for name, row in estimators.ESTIMATORS.items()}
OBJECTIVES["elbo"] = ("beta", "free_bits")
_BETA = {"elbo": 1.0, "ciwae": 0.5}
_UNREAD = {"beta": None, "free_bits": 0.0, "alpha": 0.0, "groups": 1}

_expected = "a float in an Objective; give a tensor to VAE.loss, beside it"
_Float = Annotated[float, arguments.number(expected=_expected)]
_NotNegative = Annotated[float, arguments.number(lambda value: value >= 0, "at least 0", _expected)]


@dataclass(frozen=True)
class Objective:
    """A bound on log p(x), its gradient estimator, and their numbers: what `VAE.loss` minimizes, with a minus.

    "elbo": mean_k log p(x | z_k) - beta KL(q(z | x) || p(z)), the KL in closed form where the prior is a Gaussian.
    "stl", "iwae", "dreg", "rws", "vr", "ciwae", "miwae": see `fastelbo.multi_sample_loss`.

    Args:
        name: a name above.
        num_samples: K.
        beta: of "elbo", the weight of the KL (1 if None); of "ciwae", the weight of the ELBO (0.5 if None).
        free_bits: of "elbo", the floor in nats of every dimension's KL.
        alpha, groups: of "vr" and of "miwae".

    Raises:
        ValueError: an unknown name, an option that the objective does not read, or a number that it is not defined for.
        TypeError: an option of another type, such as a tensor.

    Reference: those of `fastelbo.elbo_loss` and `fastelbo.multi_sample_loss`.
    """

    name: arguments.Text
    _: KW_ONLY
    num_samples: arguments.Count = 1
    beta: _Float | None = None
    free_bits: _NotNegative = 0.0
    alpha: _Float = 0.0
    groups: arguments.Integer = 1

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}; got {self.name!r}")
        for option, unread in _UNREAD.items():
            if (value := getattr(self, option)) != unread:
                self._check_read(option, value)
        if self.beta is None:
            object.__setattr__(self, "beta", _BETA.get(self.name))
        self.estimator()  # refuses what it is not defined for

    def _check_read(self, option: str, value: object) -> None:
        if option not in OBJECTIVES[self.name]:
            raise ValueError(f"{option} has no effect with objective {self.name!r}: leave it out; got {value!r}")

    def _read(self, numbers: dict[str, Any]) -> dict[str, Any]:
        """The numbers that the objective reads: its own, but for those that were given in their place."""
        for option, value in numbers.items():
            if value is not None:
                self._check_read(option, value)
        own = {option: getattr(self, option) for option in OBJECTIVES[self.name]}
        return own | {option: value for option, value in numbers.items() if value is not None}

    @property
    def draws(self) -> int | None:
        """num_samples of `rsample`: the plain ELBO of one sample needs no K dimension."""
        return None if self.name == "elbo" and self.num_samples == 1 else self.num_samples

    def estimator(self, **numbers: float | Tensor | None) -> estimators.Estimator:
        """The row of `fastelbo.estimators`, of these numbers in place of the objective's own."""
        read = {} if self.name == "elbo" else self._read(numbers)
        return estimators.estimator(self.name, self.num_samples, **read)

    @property
    def row(self) -> estimators.Estimator:
        """The row of `fastelbo.estimators`."""
        return self.estimator()

    @checked
    def check_keep(self, keep: arguments.Count) -> None:
        """Check that `keep` samples per datum can be kept of those that the objective draws.

        Raises:
            ValueError: more than num_samples; "elbo" or "stl", whose samples all weigh the same.
        """
        kept.check_weighs(self.name)
        if keep > self.num_samples:
            raise ValueError(f"keep must be at most num_samples={self.num_samples}; got {keep}")

    @checked
    def parts(
        self,
        recon: arguments.Recon,
        x: arguments.Data,
        posterior: arguments.AnyPosterior,
        *,
        likelihood: arguments.Likelihood = "bernoulli",
        mask: arguments.Mask | None = None,
        reduction: arguments.Reduction = "mean",
        beta: arguments.NumberOrFloats | None = None,
        free_bits: arguments.NotNegative | None = None,
        alpha: arguments.Number | None = None,
    ) -> LossParts:
        """Minus the bound, on what `VAE.forward` returned.

        Args:
            recon, x, likelihood, mask: as in `fastelbo.log_prob`; recon [K?, B, *event].
            posterior: from `rsample` with num_samples=`draws`, or of a `fastelbo.VAE`.
            reduction: "mean" (over B), "sum" or "none".
            beta, free_bits, alpha: in place of the objective's own; a float or a 0-d tensor, learned or not.

        Returns:
            `loss`: a scalar, or [B] with reduction="none", in nats.
            `parts`: LossParts(loss, log_likelihood [K?, B], kl [B]).

        Raises:
            ValueError: a number that the objective does not read; free_bits with a prior of which only the density is
                known.
            ValueError, TypeError: as in `fastelbo.elbo_loss` and `fastelbo.multi_sample_loss`.
        """
        options: dict[str, Any] = {"likelihood": likelihood, "mask": mask, "reduction": reduction}
        numbers = self._read({"beta": beta, "free_bits": free_bits, "alpha": alpha})
        if self.name != "elbo":
            return multi_sample_parts(recon, x, posterior, estimator=self.name, **numbers, **options)
        if len(posterior.prior) == 1:
            return _elbo_of_samples(recon, x, posterior, **numbers, **options)
        return elbo_parts(recon, x, posterior.mu, posterior.logvar, **posterior.prior_options, **numbers | options)  # type: ignore[arg-type]

    loss = loss_of(parts, "loss")


def objective_of(objective: Objective | str, **options: float | None) -> Objective:
    """The objective itself, or that of a name with those options that are not None."""
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(objective, str):
        return Objective(objective, **given)  # type: ignore[arg-type]
    if not isinstance(objective, Objective):
        raise arguments.refusal("objective", "the name of one, or a fastelbo.Objective", objective)
    for name, value in given.items():
        raise ValueError(f"{name} is the objective's own: leave it out, or give Objective(..., {name}={value!r})")
    return objective


def _elbo_of_samples(
    recon: arguments.Recon, x: Tensor, posterior: Posterior, beta: Any, free_bits: Any, reduction: str, **options: Any
) -> LossParts:
    """The ELBO whose KL is that of the samples."""
    why = "a prior known by log_prob has no KL per dimension"
    if isinstance(free_bits, Tensor) or free_bits != 0:
        raise ValueError(f"free_bits must be 0: {why}; got {free_bits}")
    if isinstance(beta, Tensor) and beta.dim() > 0:
        raise ValueError(f"beta must be a float or a 0-d tensor: {why}; got the shape {tuple(beta.shape)}")
    log_likelihood = log_prob(recon, x, **options)
    fit, kl = (ordered_sum(t, 0) / len(t) if t.dim() == 2 else t for t in (log_likelihood, posterior.kl))
    return LossParts(reduce(weighted(beta, kl) - fit, reduction), log_likelihood, kl)


Objective.__init__ = checked(Objective.__init__)  # type: ignore[method-assign]
