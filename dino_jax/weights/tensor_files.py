"""Reads and writes files of named tensors: safetensors, and torch.save (.pth, .pt, .bin)."""

import json
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dino_jax import atomic
from dino_jax.errors import UserError
from dino_jax.weights import torch_pickle
from dino_jax.weights.torch_pickle import Unreadable

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
EXPECTED = "weights as .safetensors or as torch.save's .pth"
MAX_ENTRIES = 1_000_000  # nested dicts that share entries could otherwise expand beyond any memory


def read(path: str | Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a file by dotted name ("teacher.backbone.cls_token"), in the file's order.

    The content of the file determines its format, not its name. Nested dicts are flattened. Objects that are not
    tensors (an epoch, arguments, None) are omitted. Arrays (float64, float32, float16, bfloat16, integers, bool) are
    read-only views of the memory-mapped file, so their data is read on first use. Code in a file is never executed
    (see `torch_pickle`).

    Raises UserError if the file is missing, damaged, holds no weights, or would have to execute code.
    """
    path = Path(path)
    if path.name.endswith(".safetensors.index.json"):
        return _read_shards(path)
    if not path.is_file():
        raise UserError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}: give {EXPECTED}")
    try:
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise Unreadable("is empty: download or copy it again")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            start = mapped[:512]
            if torch_pickle.is_torch_file(start):
                arrays = _tensors(torch_pickle.read(file, mapped))
            elif start[8:9] == b"{":
                arrays = _read_safetensors(path, mapped)
            else:
                raise Unreadable(_not_weights(start))
        if not arrays:
            raise Unreadable(f"holds no named tensors: expected {EXPECTED}")
        return arrays
    except Unreadable as error:
        raise UserError(f"{path} {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    """Reads the files that the index of a sharded Hugging Face model names."""
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({str(file) for file in where.values()})
        names = set(where)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index of sharded weights ({error}): download or copy it again") from error
    if outside := [file for file in files if Path(file).name != file]:
        raise UserError(f"{index} names a file elsewhere ({outside[0]}): download or copy it again")
    tensors = {name: x for file in files for name, x in read(index.with_name(file)).items()}
    if missing := sorted(names - set(tensors)):
        raise UserError(f"{index}: the files lack {', '.join(missing[:5])}: download or copy them again")
    return tensors


def read_metadata(path: str | Path) -> dict[str, str]:
    """Returns the metadata of a safetensors file that `read` accepts; {} for torch files, which have none."""
    try:
        with safe_open(path, framework="np") as file:
            return file.metadata() or {}
    except SafetensorError:
        return {}


def write(path: str | Path, tree: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Atomically writes a flat or nested dict of arrays to `path`.

    `.safetensors` stores nested names with dots, and `metadata`. `.pth` and `.pt` store dicts of torch tensors, nested
    as given, without metadata, and require torch. Raises UserError for another suffix, if torch is missing, or if the
    path cannot be written.
    """
    path = Path(path)
    if path.suffix not in WRITERS:
        raise UserError(f"can't write {path}: name it .safetensors, or .pth for torch.save's format")
    if not path.parent.is_dir():
        raise UserError(f"can't write {path}: {path.parent} is not a folder; create it or give another path")
    with atomic.file(path) as unfinished:
        unfinished.touch()
        mode = unfinished.stat().st_mode  # follows the user's umask; safetensors writes files that only the user reads
        try:
            WRITERS[path.suffix](unfinished, tree, metadata or {})
        except (SafetensorError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
            raise UserError(f"can't write {path} ({error}): {atomic.WAY_OUT}") from error
        unfinished.chmod(mode)


def _read_safetensors(path: Path, mapped: mmap.mmap) -> dict[str, np.ndarray]:
    """Maps the data, which the library would copy; the library checks the header (tensors fill the file in order)."""
    arrays = {}
    position = 8 + int.from_bytes(mapped[:8], "little")
    try:
        with safe_open(path, framework="np") as file:
            for name in file.offset_keys():
                tensor = file.get_slice(name)
                if tensor.get_dtype() not in DTYPES:
                    raise Unreadable(
                        f"holds {name[:100]!a} as {tensor.get_dtype()}: expected one of {', '.join(DTYPES)}"
                    )
                arrays[name] = np.ndarray(tensor.get_shape(), DTYPES[tensor.get_dtype()], mapped, position)
                position += arrays[name].nbytes
    except (SafetensorError, ValueError, TypeError) as error:
        raise Unreadable(f"is truncated or damaged ({error}): download or copy it again") from error
    return arrays


def _not_weights(start: bytes) -> str:
    """Describes what a file that begins with `start` probably is."""
    if start.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the weights it points to: run `git lfs pull`, or download the file itself"
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "is a web page, not weights: download the file itself (on a hub, its raw or download link)"
    if start.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return f"is a pickle, but not of torch.save: expected {EXPECTED}"
    return f"is not a weights file (it begins with {start[:12]!r}): expected {EXPECTED}"


def _tensors(tree: Any) -> dict[str, np.ndarray]:
    """Returns the tensors of a torch file by dotted name."""
    arrays: dict[str, np.ndarray] = {}
    try:
        for count, (name, leaf) in enumerate(_walk(tree)):
            if count == MAX_ENTRIES:
                raise Unreadable(f"is refused: its dicts hold more than {MAX_ENTRIES} entries")
            if isinstance(leaf, torch_pickle.Tensor):
                if name in arrays:
                    raise Unreadable(f"holds two tensors named {name[:100]!a}")
                arrays[name] = leaf.array()
    except RecursionError as error:
        raise Unreadable("is refused: a dict in it contains itself") from error
    return arrays


def _walk(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every value in nested dicts, and the dicts themselves, with their dotted names."""
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        yield f"{prefix}{key}", value
        yield from _walk(value, f"{prefix}{key}.")


def _write_safetensors(path: Path, tree: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    # The library writes the raw memory of an array, so transposed arrays must be made contiguous first.
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in _walk(tree) if not isinstance(leaf, Mapping)}
    # transformers requires "format"; "pt" means PyTorch's names and layouts.
    save_file(arrays, path, metadata={"format": "pt", **metadata})


def _write_torch(path: Path, tree: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    try:
        import torch  # imported here because it is an optional dependency
    except ImportError as error:
        raise UserError(f"{path.suffix} needs torch: write .safetensors, or pip install 'dino_jax[torch]'") from error

    def convert(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: convert(child) for key, child in value.items()}
        array = np.array(value, order="C")  # a copy, because torch warns about read-only arrays
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    with open(path, "wb") as file:
        torch.save(convert(tree), file)


WRITERS = {".safetensors": _write_safetensors, ".pth": _write_torch, ".pt": _write_torch}
