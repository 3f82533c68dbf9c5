"""The numbers that runs and commands take, and which values of them are valid."""

import math
from typing import Any

from fastelbo._internal.arguments import count, integer, keep, number, size

_weight = number(lambda value: 0 <= value < math.inf, "finite and at least 0")

CHECKS = {
    **dict.fromkeys(
        ("num_samples", "chunk_size", "groups", "latent_dim", "hidden", "epochs", "batch_size", "patience"), count
    ),
    "keep": keep,
    "beta": _weight,
    "beta_warmup": size,
    "free_bits": _weight,
    "alpha": number(math.isfinite, "finite"),
    "lr": number(lambda value: 0 < value < math.inf, "positive and finite"),
    "seed": integer(),
}


def check(**options: Any) -> None:
    """Check the numbers among the options, by their names; None is an option that is not set.

    Raises:
        TypeError: a number of another kind, or no number.
        ValueError: NaN, infinity, or a number out of range.
    """
    for name, value in options.items():
        if value is not None and name in CHECKS:
            CHECKS[name](name, value)
