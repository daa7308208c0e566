"""Reads and decodes every image of a data set, as training would.

    dino-jax check folder:photos --report=report.json

SOURCE has the form of --config.data.source. The command prints sizes, formats, and the names of duplicate images and of
images that cannot be decoded; the report lists all of them. The exit code is 1 if any image cannot be decoded, else 0.
"""

import hashlib
import io
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags
from PIL import Image

from dino_jax import atomic
from dino_jax.data.decoding import FORMATS, DecodeError, levels, to_canvas
from dino_jax.data.sources import Source, open_source, read_example
from dino_jax.data.workers import iterate
from dino_jax.errors import UserError
from dino_jax.progress import progress

USAGE = "SOURCE [--report=FILE.json]"
CHUNK = 64  # images that a worker examines per task
SHOWN = 20  # names that are printed per kind; the report lists all


class Finding(NamedTuple):
    """The result of examining one image."""

    record: int  # number in the source
    problem: str = ""  # why it cannot be used; if set, the other fields are empty
    kind: str = ""  # format and Pillow mode, such as "JPEG RGB"; dtype and channels of an array
    size: tuple[int, int] = (0, 0)  # height and width in pixels, upright
    digest: str = ""  # hash of the stored content
    levels: tuple[float, float] | None = None  # brightest value and level of white, of more than 8 bits


def examine(source: Source, record: int, canvas_size: int, channels: int, white: float = 0.0) -> Finding:
    """Reads and decodes one image exactly as `train_batches` does. Raises UserError like `to_canvas`."""
    try:
        image, _ = read_example(source, record)
        _, size = to_canvas(image, canvas_size, channels, white)
    except (DecodeError, OSError) as error:
        return Finding(record, getattr(error, "strerror", None) or str(error))
    return Finding(record, "", _kind(image), size, _digest(image), levels(image, white))


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
        "levels": {"brightest": max(wide)[0], "white": max(wide)[1]} if wide else {},
        "duplicates": [names for names in names_by_digest.values() if len(names) > 1],
        "bad": {source.name(finding.record): finding.problem for finding in findings if finding.problem},
    }


def describe(report: dict[str, Any], max_bad_fraction: float) -> str:
    """Formats the report for the terminal; what needs action comes last."""
    images, bad, duplicates = report["images"], report["bad"], report["duplicates"]
    lines = [f"{images:,} images" + (f", {report['classes']:,} classes" if report["classes"] else ", no labels")]
    lines += [f"  {count:,} {kind}" for kind, count in report["kinds"].items()]
    lines += [
        f"{side}: {size['least']:,} to {size['most']:,} pixels, median {size['median']:,}"
        for side, size in report["sizes"].items()
    ]
    if found := report["levels"]:
        unused = ": set --config.data.white" if found["brightest"] <= found["white"] / 2 else ""
        lines += [f"brightest value {found['brightest']:g} of {found['white']:g}{unused}"]
    copies = sum(len(names) - 1 for names in duplicates)
    lines += [f"{copies:,} images have the content of another one{':' if copies else ''}"]
    lines += _first([" = ".join(names) for names in duplicates])
    allowed = len(bad) <= max_bad_fraction * images
    verdict = "training would replace them" if allowed else "training would stop: fix or remove them"
    limit = f" (data.max_bad_fraction is {max_bad_fraction:.3%}): {verdict}" if bad else ""
    lines += [f"{len(bad):,} of {images:,} images ({len(bad) / max(images, 1):.3%}) cannot be decoded{limit}"]
    return "\n".join(lines + _first([f"{name}: {problem}" for name, problem in bad.items()]))


def main(arguments: Sequence[str]) -> None:
    """Checks SOURCE and prints the findings."""
    if len(arguments) != 1:
        raise UserError(f"usage: dino-jax check {USAGE}, where SOURCE has the form of --config.data.source")
    values, [spec] = flags.FLAGS, arguments
    source = open_source(spec)
    findings = check(
        source, canvas_size=values.canvas_size, channels=values.channels, workers=values.workers, white=values.white
    )
    report = summarize(source, findings)
    if values.report:
        atomic.write_json(values.report, {"source": spec, **report})
    print(describe(report, values.max_bad_fraction))
    sys.exit(1 if report["bad"] else 0)


def define_flags(arguments: Sequence[str]) -> None:
    """Defines the flags for reading the images and writing the report."""
    flags.DEFINE_string("report", None, "JSON file to write all findings to")
    flags.DEFINE_integer("workers", os.cpu_count(), "processes that read and decode", lower_bound=0)
    flags.DEFINE_integer("canvas_size", 512, "data.canvas_size of the planned training", lower_bound=1)
    flags.DEFINE_integer("channels", 3, "model.in_channels of the planned training", lower_bound=1)
    flags.DEFINE_float("white", 0.0, "data.white of the planned training", lower_bound=0)
    flags.DEFINE_float("max_bad_fraction", 0.01, "data.max_bad_fraction of the planned training")


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


def _first(lines: list[str]) -> list[str]:
    more = len(lines) - SHOWN
    return [f"  {line}" for line in lines[:SHOWN]] + ([f"  and {more:,} more: see --report=FILE"] if more > 0 else [])
