"""JSON objects in files that anyone may have edited: read once, with the names and types that the reader needs."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dino_jax.errors import UserError


class Kind(NamedTuple):
    """What a value has to be, for the message, and whether it is."""

    what: str
    fits: Callable[[Any], Any]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


TEXT = Kind("a text", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
NUMBER = Kind("a number", _is_number)
WHOLE = Kind("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool))
SIZE = Kind("a whole number above 0", lambda value: WHOLE.fits(value) and 0 < value < 2**31)
NUMBERS = Kind(
    "a list of numbers", lambda value: isinstance(value, list) and value != [] and all(map(_is_number, value))
)
POSITIVES = Kind("a list of numbers above 0", lambda value: NUMBERS.fits(value) and min(value) > 0)


def read_object(path: str | Path, required: Mapping[str, Kind], way_out: str = "copy it again") -> dict[str, Any]:
    """Returns the JSON object in a file.

    Args:
        path: the file.
        required: dotted names that it must have, and what their values are.
        way_out: for the message of an error.

    Raises UserError, which names file and key, if the file cannot be read or does not fit.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({getattr(error, 'strerror', None) or error}): {way_out}") from error
    value = parse(text, str(path), way_out)
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged (it holds no object): {way_out}")
    require(value, required, str(path), way_out)
    return value


def parse(text: str, source: str, way_out: str = "copy it again") -> Any:
    """Returns the JSON value in a text. Raises UserError, which names `source`, if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is damaged ({' '.join(str(error).split())[:200]}): {way_out}") from error


def require(
    value: Mapping[str, Any], required: Mapping[str, Kind], source: str, way_out: str = "copy it again"
) -> None:
    """Raises UserError, which names `source` and the key, unless an object has these names and kinds of values."""
    for name, kind in required.items():
        found: Any = value
        for key in name.split("."):
            if not isinstance(found, Mapping) or key not in found:
                raise UserError(f"{source} is damaged ({name} is missing): {way_out}")
            found = found[key]
        if not kind.fits(found):
            raise UserError(f"{source} is damaged ({name} is {str(found)[:80]}, not {kind.what}): {way_out}")
