"""Ranges of numeric settings, checked before anything is read or compiled.

The upper ends are far beyond any sensible value: they catch mistyped exponents and numbers that libraries cannot hold.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from dino_jax.errors import UserError
from dino_jax.provenance import flat

SHARE = (0, 1)
COUNT = (1, 2**31 - 1)
COUNT_OR_NONE = (0, 2**31 - 1)
PIXELS = (1, 16_384)
SECONDS = (0, 1e8)  # three years
EPOCHS = (0, 1e6)
FACTOR = (0, 1e9)
SEED = (0, 2**63 - 1)
# Softmax at these temperatures still has finite float32 logits.
TEMPERATURE = (1e-4, 1e4)


class Above(NamedTuple):
    """A range without its lower end."""

    least: float
    most: float


Limits = Mapping[str, tuple[float, float] | Above]


def check_numbers(settings: Any, limits: Limits) -> None:
    """Raises UserError for the first number, alone or in a tuple, that is outside its range or not finite.

    Args:
        settings: a config.
        limits: dotted name of each numeric setting -> (smallest, largest value).
    """
    for name, value in flat(settings.to_dict()).items():
        for number in value if isinstance(value, tuple | list) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool):
                _check(name, value, number, limits[name])


def _check(name: str, value: Any, number: float, limit: tuple[float, float] | Above) -> None:
    least, most = limit
    open_end = isinstance(limit, Above)
    if math.isnan(number):
        raise UserError(f"{name} is {value}: set --config.{name} to a finite number")
    if number > most:
        raise UserError(f"{name} is {value}: set --config.{name} to at most {most:,}")
    if number < least or (open_end and number == least):
        way_out = f"above {least:,}" if open_end else f"to {least:,} or more"
        raise UserError(f"{name} is {value}: set --config.{name} {way_out}")
