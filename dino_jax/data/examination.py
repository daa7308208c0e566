"""Reads and decodes every image of a source, as training would."""

import hashlib
import io
from functools import partial
from typing import NamedTuple

import grain
import numpy as np
from PIL import Image

from dino_jax.data.array_files import read_array
from dino_jax.data.decoding import FORMATS, MAX_MEMORY, DecodeError, is_deep, to_canvas, white_of
from dino_jax.data.pixels import Pixels, to_unit
from dino_jax.data.sources import Source, read_example
from dino_jax.data.workers import iterate
from dino_jax.progress import progress

CHUNK = 64  # images that a worker examines per task
SAMPLED = 256  # values of a deep image that are kept for percentiles


class Values(NamedTuple):
    """Values as stored in an image of more than 8 bits."""

    least: float
    most: float
    white: float  # the value that becomes white
    some: list[float]  # about `SAMPLED` of them


class Finding(NamedTuple):
    """The result of examining one image.

    It holds no arrays: Grain would send each from worker to trainer in a shared memory of its own, which takes a file.
    """

    record: int  # number in the source
    problem: str = ""  # why it cannot be used; if set, the other fields are empty
    kind: str = ""  # format and Pillow mode, such as "JPEG RGB"; dtype and channels of an array
    size: tuple[int, int] = (0, 0)  # height and width in pixels, upright
    digest: str = ""  # hash of the stored content
    moments: list[list[float]] | None = None  # [2][C]: means of the levels, from 0 to 1, and of their squares
    values: Values | None = None  # of an image of more than 8 bits


def examine(source: Source, record: int, canvas_size: int, pixels: Pixels) -> Finding:
    """Reads and decodes one image exactly as `train_batches` does. Raises UserError like `to_canvas`."""
    try:
        image, _ = read_example(source, record)
        canvas, size = to_canvas(image, canvas_size, pixels)
    except (DecodeError, OSError) as error:
        return Finding(record, getattr(error, "strerror", None) or str(error))
    kind, values = _look(image, pixels)
    return Finding(record, "", kind, size, _digest(image), _moments(canvas[: size[0], : size[1]]), values)


def examine_all(source: Source, records: range, canvas_size: int, pixels: Pixels) -> list[Finding]:
    """Examines some images."""
    return [examine(source, record, canvas_size, pixels) for record in records]


def check(source: Source, *, canvas_size: int, pixels: Pixels, workers: int) -> list[Finding]:
    """Examines every image, in the source's order. workers: number of processes; 0 uses only this one."""
    total = len(source)
    chunks = [range(start, min(start + CHUNK, total)) for start in range(0, total, CHUNK)]
    examine_chunk = partial(examine_all, source, canvas_size=canvas_size, pixels=pixels)
    with iterate(grain.MapDataset.source(chunks).map(examine_chunk), workers) as results:
        return [finding for part in progress(results, total, "check", size=len) for finding in part]


def _moments(pixels: np.ndarray) -> list[list[float]]:
    """Pixels [H, W, C] -> [2][C]; of 8 bits from the histogram of each channel, which is fast."""
    count, channels = max(pixels[..., 0].size, 1), pixels.shape[-1]
    if pixels.dtype == np.uint8:
        levels = np.arange(256) / 255
        counts = np.transpose([np.bincount(pixels[..., c].ravel(), minlength=256) for c in range(channels)])
    else:
        levels, counts = to_unit(pixels).astype(np.float64).reshape(-1, channels).T, None
    sums = np.stack([levels, levels**2]) @ counts if counts is not None else np.stack([levels, levels**2]).sum(-1)
    return (sums / count).tolist()


def _look(image: bytes | np.ndarray, pixels: Pixels) -> tuple[str, Values | None]:
    """Returns the kind of an image that can be decoded, and the values of a deep one."""
    if isinstance(image, np.ndarray):
        array, kind = image, "array"
    elif found := read_array(image, pixels, MAX_MEMORY):
        array, kind = found[0], "array file"
    else:
        with Image.open(io.BytesIO(image), formats=FORMATS) as picture:
            kind = f"{picture.format} {picture.mode}"
            if not is_deep(picture):
                return kind, None
            array = np.asarray(picture)
            return kind, _values(array, pixels)
    kind += f" {array.dtype} x {array.shape[2] if array.ndim == 3 else 1}"
    return kind, None if array.dtype in (np.uint8, bool) else _values(array, pixels)


def _values(array: np.ndarray, pixels: Pixels) -> Values:
    some = array.reshape(-1)[:: max(1, array.size // SAMPLED)]
    return Values(float(array.min()), float(array.max()), white_of(array.dtype, pixels), some.astype(float).tolist())


def _digest(image: bytes | np.ndarray) -> str:
    content = image if isinstance(image, bytes) else str(image.shape).encode() + np.ascontiguousarray(image).tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()
