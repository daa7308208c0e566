"""Reads the ground truth of the revisited Oxford and Paris buildings, a pickle, without executing code from it.

The interpreter in `weights/torch_pickle.py` drops the state of objects, where NumPy keeps an array's content, and hooks
for it would be longer than the restricted `pickle.Unpickler` here.
"""

import io
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dino_jax.errors import UserError


def read_ground_truth(path: Path) -> dict[str, Any]:
    """Reads the ground truth: {"imlist": names, "qimlist": names, "gnd": [{"bbx", "easy", "hard", "junk"}, ...]}.

    bbx is left, upper, right, lower in pixels; the others are lists of indices into imlist. No code in the pickle is
    executed. It may contain lists, dicts, strings, numbers and NumPy arrays; raises UserError for anything else.
    """
    try:
        data = path.read_bytes()
        _check_memo(data)
        truth = _PlainUnpickler(io.BytesIO(data)).load()
    except OSError as error:
        raise UserError(
            f"--config.data: can't read {path} ({error.strerror}): it belongs beside the folder jpg/"
        ) from error
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can make the unpickler raise anything
        raise UserError(f"{path} is damaged ({type(error).__name__}): download it again") from error
    try:
        images, queries = len(truth["imlist"]), len(truth["qimlist"])
        consistent = queries == len(truth["gnd"]) > 0 and all(
            len(query["bbx"]) == 4 and all(0 <= i < images for level in ("easy", "hard", "junk") for i in query[level])
            for query in truth["gnd"]
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not a ground truth (no {error}): download it again") from error
    if not consistent:
        raise UserError(f"{path} is damaged (its queries do not fit its images): download it again")
    return truth


class _Dtype:
    """Replaces a pickled NumPy dtype: i8, f4, U20."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.code = state[1].replace("|", "") + self.code


class _Array(list[Any]):
    """Replaces a pickled NumPy array by a flat list of its values."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, _, dtype, _, data = state
        self[:] = np.frombuffer(data, dtype.code).tolist()  # refuses dtypes of objects


# NumPy's own functions would read and write arbitrary memory if given hostile arguments.
_STAND_INS: dict[str, Callable[..., Any]] = {
    "_reconstruct": lambda *_: _Array(),
    "scalar": lambda dtype, data: np.frombuffer(data, dtype.code)[0].item(),
    "ndarray": _Array,
    "dtype": _Dtype,
    "encode": lambda text, _: text.encode("latin1"),
    "bytes": lambda *_: b"",  # of an empty array
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if module.split(".")[0] in ("numpy", "_codecs", "builtins", "__builtin__") and name in _STAND_INS:
            return _STAND_INS[name]
        raise UserError(f"the ground truth's pickle asks for {module}.{name}: refused, download it from its authors")


def _check_memo(data: bytes) -> None:
    """Raises ValueError for a place in the unpickler's memo beyond any use: it allocates all places up to it."""
    if any(
        "PUT" in opcode.name and isinstance(place, int) and place > len(data)
        for opcode, place, _ in pickletools.genops(data)
    ):
        raise ValueError
