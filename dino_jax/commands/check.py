"""Reads and decodes every image of a data set, as training would.

    dino-jax check folder:photos --report=report.json

SOURCE has the form of --config.data.source. The command prints sizes, formats, mean and standard deviation of pixels
as settings, and the names of duplicate images and of images that cannot be decoded; the report lists all of them. The
exit code is 1 if any image cannot be decoded, else 0.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from dino_jax import atomic
from dino_jax.commands import cli
from dino_jax.data.examination import check, summarize
from dino_jax.data.pixels import WHITE, Pixels
from dino_jax.data.sources import open_source
from dino_jax.errors import UserError

USAGE = "SOURCE [--report=FILE.json]"
SHOWN = 20  # names that are printed per kind; the report lists all


def describe(report: dict[str, Any], max_bad_fraction: float) -> str:
    """Formats the report for the terminal; what needs action comes last."""
    images, bad, duplicates = report["images"], report["bad"], report["duplicates"]
    lines = [f"{images:,} images" + (f", {report['classes']:,} classes" if report["classes"] else ", no labels")]
    lines += [f"  {count:,} {kind}" for kind, count in report["kinds"].items()]
    lines += [
        f"{side}: {size['least']:,} to {size['most']:,} pixels, median {size['median']:,}"
        for side, size in report["sizes"].items()
    ]
    if found := report["statistics"]:
        flags_of = " ".join(f"--config.data.{name}={','.join(map(str, found[name]))}" for name in ("mean", "std"))
        lines += [f"pixels: {flags_of}"]
    if found := report["values"]:
        low, high = found["percentiles"]
        lines += [
            f"values of more than 8 bits: {found['least']:g} to {found['most']:g}; white is {found['white']:g}",
            f"98% of them are in the range --config.data.range={low:g},{high:g}",
        ]
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
        source,
        canvas_size=values.canvas_size,
        pixels=Pixels(values.channels, values.dtype, cli.range_of(values.range)),
        workers=values.workers,
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
    flags.DEFINE_enum("dtype", "uint8", list(WHITE), "data.dtype of the planned training")
    flags.DEFINE_list(
        "range", [], "data.range of the planned training: LOW,HIGH; by default as the type of the images implies"
    )
    flags.DEFINE_float("max_bad_fraction", 0.01, "data.max_bad_fraction of the planned training")


def _first(lines: list[str]) -> list[str]:
    more = len(lines) - SHOWN
    return [f"  {line}" for line in lines[:SHOWN]] + ([f"  and {more:,} more: see --report=FILE"] if more > 0 else [])
