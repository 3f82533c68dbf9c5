"""The K-sample estimators: which bound, and which gradient of it, as rows of numbers.

With log w_k = log p(x | z_k) + log p(z_k) - log q(z_k | x), every bound is

    elbo_weight mean_k log w_k + (1 - elbo_weight) mean_g 1/(1 - alpha) log mean_{k in g} w_k^(1 - alpha)

over `groups` groups g of K / groups consecutive samples. With a_k its derivative by log w_k, the gradient is made of

    a_k on grad_theta log p(x, z_k), the decoder's (and the prior's),
    b_k = a_k (path + path_weight a_k) on the path derivative (d log w_k / dz_k) (dz_k / dphi), and
    c_k = score a_k on the score term -grad_phi log q(z_k | x) at fixed z_k.

To add an estimator is to add a row here, and one to the tests (tests/paper.py).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Estimator(NamedTuple):
    """The six numbers above. elbo_weight and alpha may be 0-d tensors, which are not checked."""

    elbo_weight: float | Tensor = 0.0
    alpha: float | Tensor = 0.0
    groups: int = 1
    path: float = 1.0
    path_weight: float = 0.0
    score: float = 1.0

    @property
    def is_gradient(self) -> bool:
        """Whether b = c = a: the estimator is the gradient of its bound, and autograd alone gets it right."""
        return (self.path, self.path_weight, self.score) == (1.0, 0.0, 1.0)


class Row(NamedTuple):
    make: Callable[..., Estimator]  # of the options below, by their names
    options: tuple[str, ...] = ()
    fewest: int = 1  # K below which it degenerates


# a, b, c beside each row; wt = softmax_k(log w), wa = softmax_k((1 - alpha) log w)
ESTIMATORS = {
    # 1/K, 1/K, 1/K: the ELBO with the KL by Monte Carlo too (Kingma & Welling 2014, eq. 6)
    "elbo": Row(lambda: Estimator(elbo_weight=1.0)),
    # 1/K, 1/K, 0: "sticking the landing", zero variance where q is the posterior (Roeder et al. 2017, eq. 8)
    "stl": Row(lambda: Estimator(elbo_weight=1.0, score=0.0)),
    # wt, wt, wt: the importance-weighted bound (Burda et al. 2016, eq. 8 and 13)
    "iwae": Row(Estimator),
    # wt, wt^2, 0: doubly reparameterized, unbiased for iwae's gradient (Tucker et al. 2019, eq. 8). K = 1: it is stl
    "dreg": Row(lambda: Estimator(path=0.0, path_weight=1.0, score=0.0)),
    # wt, 0, -wt: reweighted wake-sleep, wake-phase encoder update (Bornschein & Bengio 2015, eq. 8). With K = 1 every
    # weight is 1, and the encoder's gradient is noise of mean 0.
    "rws": Row(lambda: Estimator(path=0.0, score=-1.0), fewest=2),
    # wa, wa, wa: the variational Renyi bound (Li & Turner 2016, eq. 14); alpha = 1 is the ELBO by continuity (sec. 2)
    "vr": Row(lambda alpha: Estimator(alpha=alpha), ("alpha",)),
    # beta elbo + (1 - beta) iwae (Rainforth et al. 2018, eq. 10)
    "ciwae": Row(lambda beta: Estimator(elbo_weight=beta), ("beta",)),
    # iwae in each group of K / groups samples, averaged over the groups (Rainforth et al. 2018, eq. 9)
    "miwae": Row(lambda groups: Estimator(groups=groups), ("groups",)),
}


def estimator(name: str, num_samples: int, **options: float | Tensor) -> Estimator:
    """The row of an estimator by its name; options that it does not read are ignored.

    Raises:
        ValueError: an unknown name, or an option or a number of samples that the estimator is not defined for.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}; got {name!r}")
    row = ESTIMATORS[name]
    read = {option: options[option] for option in row.options}
    alpha, beta, groups = read.get("alpha", 0.0), read.get("beta", 0.0), read.get("groups", 1)
    if not isinstance(alpha, Tensor) and not -math.inf < alpha < math.inf:
        raise ValueError(f"alpha must be finite; got {alpha}")
    if not isinstance(beta, Tensor) and not 0 <= beta <= 1:
        raise ValueError(f"beta, the weight of the ELBO in {name!r}, must be in [0, 1]; got {beta}")
    if groups < 1 or num_samples % groups:
        raise ValueError(f"groups must divide the number of samples K={num_samples}; got {groups}")
    if num_samples < row.fewest:
        raise ValueError(
            f"estimator {name!r} needs at least {row.fewest} samples: with K={num_samples} all weights are equal and "
            "the encoder's gradient is noise of mean 0"
        )
    return row.make(**read)
