"""The numbers that runs and commands take, and which values of them are valid."""

import math
import sys
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """Values of a kind, from a smallest one on; a float must be finite."""

    kind: type[int] | type[float]
    least: float
    words: str


_COUNT = Rule(int, 1, "at least 1")
_LARGEST = {int: 2**63 - 1, float: sys.float_info.max}

RULES = {
    **dict.fromkeys(("num_samples", "chunk_size", "groups", "latent_dim", "hidden", "epochs", "batch_size"), _COUNT),
    "beta": Rule(float, 0.0, "finite and at least 0"),
    "beta_warmup": Rule(int, 0, "at least 0"),
    "free_bits": Rule(float, 0.0, "finite and at least 0"),
    "alpha": Rule(float, -sys.float_info.max, "finite"),
    "lr": Rule(float, math.ulp(0.0), "positive and finite"),
    "seed": Rule(int, -(2**63), "at least -2**63"),
}


def check(**options: Any) -> None:
    """Check the numbers among the options, by their names; None is one that was not given.

    Raises:
        TypeError: one of another kind.
        ValueError: NaN, infinity, or a number out of range.
    """
    for name, value in options.items():
        if value is None or name not in RULES:
            continue
        kind, least, words = RULES[name]
        if isinstance(value, bool) or not isinstance(value, int | kind):
            raise TypeError(f"{name} must be of type {kind.__name__}; got {value!r}")
        if kind is int and value > _LARGEST[int]:
            raise ValueError(f"{name} must be less than 2**63; got {value}")
        if not least <= value <= _LARGEST[kind]:
            raise ValueError(f"{name} must be {words}; got {value}")
