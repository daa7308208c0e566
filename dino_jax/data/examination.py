"""Reads and decodes every image of a source, as training would, and sums up what it holds."""

import hashlib
import io
from collections import Counter, defaultdict
from functools import partial
from typing import Any, NamedTuple

import grain
import numpy as np
from PIL import Image

from dino_jax.data.decoding import FORMATS, DecodeError, levels, to_canvas
from dino_jax.data.sources import Source, read_example
from dino_jax.data.workers import iterate
from dino_jax.progress import progress

CHUNK = 64  # images that a worker examines per task


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
    levels: tuple[float, float] | None = None  # brightest value and level of white, of more than 8 bits


def examine(source: Source, record: int, canvas_size: int, channels: int, white: float = 0.0) -> Finding:
    """Reads and decodes one image exactly as `train_batches` does. Raises UserError like `to_canvas`."""
    try:
        image, _ = read_example(source, record)
        canvas, size = to_canvas(image, canvas_size, channels, white)
    except (DecodeError, OSError) as error:
        return Finding(record, getattr(error, "strerror", None) or str(error))
    moments = _moments(canvas[: size[0], : size[1]])
    return Finding(record, "", _kind(image), size, _digest(image), moments, levels(image, white))


def check(source: Source, *, canvas_size: int, channels: int, workers: int, white: float = 0.0) -> list[Finding]:
    """Examines every image, in the source's order. workers: number of processes; 0 uses only this one."""
    total = len(source)
    chunks = [range(start, min(start + CHUNK, total)) for start in range(0, total, CHUNK)]
    examine_chunk = partial(_examine_all, source, canvas_size=canvas_size, channels=channels, white=white)
    with iterate(grain.MapDataset.source(chunks).map(examine_chunk), workers) as results:
        return [finding for part in progress(results, total, "check", size=len) for finding in part]


def summarize(source: Source, findings: list[Finding]) -> dict[str, Any]:
    """Builds the report, as plain JSON: `bad` as name -> reason, `duplicates` as lists of names, and counts."""
    good = [finding for finding in findings if not finding.problem]
    names_by_digest = defaultdict(list)
    for finding in good:
        names_by_digest[finding.digest].append(source.name(finding.record))
    wide = [finding.levels for finding in good if finding.levels]
    shapes = np.array([finding.size for finding in good]).reshape(-1, 2)
    return {
        "images": len(findings),
        "classes": source.num_classes,
        "kinds": dict(Counter(finding.kind for finding in good).most_common()),
        "sizes": {
            name: {"least": int(sides.min()), "median": int(np.median(sides)), "most": int(sides.max())}
            for name, sides in {"height": shapes[:, 0], "width": shapes[:, 1]}.items()
            if len(good)
        },
        "statistics": dict(zip(("mean", "std"), map(list, mean_and_std(good)), strict=True)) if good else {},
        "levels": {"brightest": max(wide)[0], "white": max(wide)[1]} if wide else {},
        "duplicates": [names for names in names_by_digest.values() if len(names) > 1],
        "bad": {source.name(finding.record): finding.problem for finding in findings if finding.problem},
    }


def mean_and_std(findings: list[Finding]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns data.mean and data.std of the images that can be used, by channel: each image has the same weight."""
    moments = np.mean([finding.moments for finding in findings if finding.moments is not None], axis=0)
    std = np.sqrt(np.maximum(moments[1] - moments[0] ** 2, 0))
    return tuple(float(m) for m in moments[0].round(3)), tuple(float(s) for s in std.round(3).clip(0.01))


def _moments(pixels: np.ndarray) -> list[list[float]]:
    """Pixels, uint8 [H, W, C] -> [2][C], from the histogram of each channel, which is exact and fast."""
    levels = np.arange(256) / 255
    counts = [np.bincount(pixels[..., c].ravel(), minlength=256) for c in range(pixels.shape[-1])]
    moments = np.stack([levels, levels**2]) @ np.transpose(counts) / max(pixels[..., 0].size, 1)
    return moments.tolist()


def _examine_all(source: Source, records: range, canvas_size: int, channels: int, white: float) -> list[Finding]:
    return [examine(source, record, canvas_size, channels, white) for record in records]


def _kind(image: bytes | np.ndarray) -> str:
    if isinstance(image, np.ndarray):
        return f"array {image.dtype} x {image.shape[2] if image.ndim == 3 else 1}"
    with Image.open(io.BytesIO(image), formats=FORMATS) as picture:
        return f"{picture.format} {picture.mode}"


def _digest(image: bytes | np.ndarray) -> str:
    content = image if isinstance(image, bytes) else str(image.shape).encode() + np.ascontiguousarray(image).tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()
