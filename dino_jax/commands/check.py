"""Reads and decodes every image of a data set, as training would.

    dino-jax check folder:photos --report=report.json

SOURCE has the form of --config.data.source. The command prints sizes, formats, mean and standard deviation of pixels
as settings, and the names of duplicate images and of images that cannot be decoded; the report lists all of them. The
exit code is 1 if any image cannot be decoded, else 0.

--beam reads them on the workers of Apache Beam instead of on this machine, to the same report (docs/data.md).
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

from absl import flags

from dino_jax import atomic
from dino_jax.commands import cli
from dino_jax.data import beam, summary
from dino_jax.data.examination import Finding, Values, check, examine_all
from dino_jax.data.pixels import WHITE, Pixels
from dino_jax.data.sources import Source, files, names_digest, open_source
from dino_jax.errors import UserError
from dino_jax.storage import is_remote

USAGE = "SOURCE [--report=FILE.json]"
SLICE = 1024  # images that a worker of Beam examines at a time
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
    pixels = Pixels(values.channels, values.dtype, cli.range_of(values.range))
    if values.beam:
        path = cli.required("report", values.report)
        found = check_on_beam(spec, path, values.canvas_size, pixels, values.beam)
    else:
        source = open_source(spec)
        findings = check(source, canvas_size=values.canvas_size, pixels=pixels, workers=values.workers)
        found = summary.summarize(source, findings)
        if values.report:
            _write_report(found, spec, values.report)
    print(describe(found, values.max_bad_fraction))
    sys.exit(1 if found["bad"] else 0)


def check_on_beam(spec: str, path: str, canvas_size: int, pixels: Pixels, options: str) -> dict[str, Any]:
    """Writes the report to `path` on the workers of Beam, and returns it. They need both under the same paths.

    The findings of each slice are kept beside the report until it is written, so that the next call resumes.
    """
    source, path = open_source(spec), path if is_remote(path) else os.path.abspath(path)
    parts, numbers = f"{path}.parts", range(-(-len(source) // SLICE))
    examine = partial(
        _examine_slice, spec=spec, names=names_digest(source), parts=parts, canvas_size=canvas_size, pixels=pixels
    )
    with beam.pipeline(options) as made:
        import apache_beam as b

        slices = beam.spread(made, numbers) | "examine" >> b.Map(examine)
        copies = (
            slices
            | "contents" >> b.FlatMap(itemgetter(1))
            | "by content" >> b.GroupByKey()
            | "images" >> b.Map(_images)
            | "copies" >> b.Filter(_several)
        )
        total = slices | "tallies" >> b.Map(itemgetter(0)) | "total" >> b.CombineGlobally(summary.merge)
        summed = total | "sum up" >> b.Map(summary.report, b.pvalue.AsList(copies), source.num_classes)
        summed | "report" >> b.Map(_write_report, spec, path)
    beam.require_results(len(files.sizes(parts)), len(numbers), parts)
    files.remove_files(parts)
    found: dict[str, Any] = json.loads(files.read(path) or b"")
    return found


def define_flags(arguments: Sequence[str]) -> None:
    """Defines the flags for reading the images and writing the report."""
    flags.DEFINE_string("report", None, "JSON file to write all findings to, also in a bucket")
    flags.DEFINE_integer("workers", os.cpu_count(), "processes that read and decode", lower_bound=0)
    flags.DEFINE_string("beam", "", f"{beam.HELP}; needs --report")
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


def _write_report(found: dict[str, Any], spec: str, path: str) -> None:
    files.write(path, atomic.to_json({"source": spec, **found}).encode())


def _examine_slice(
    number: int, *, spec: str, names: str, parts: str, canvas_size: int, pixels: Pixels
) -> tuple[summary.Tally, list[summary.Content]]:
    """Examines a slice on a worker of Beam, unless its findings are in `parts`."""
    source = beam.reopened(spec, names)
    records = range(number * SLICE, min((number + 1) * SLICE, len(source)))
    path = f"{parts}/{_key(source, records, canvas_size, pixels)}.json"
    if known := files.read(path):
        findings = [_finding(row) for row in json.loads(known)]
    else:
        findings = examine_all(source, records, canvas_size, pixels)
        files.write(path, atomic.to_json(findings).encode())
    return summary.tally(source, findings), list(summary.contents(source, findings))


def _key(source: Source, records: range, canvas_size: int, pixels: Pixels) -> str:
    """Returns a hash of what the findings of these records depend on, as far as it is known without reading them."""
    lines = [str((records, canvas_size, pixels)), *map(source.identity, records)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def _finding(row: list[Any]) -> Finding:
    """Returns a finding that was written as JSON."""
    finding = Finding(*row)
    (height, width), values = finding.size, finding.values
    return finding._replace(size=(height, width), values=Values(*values) if values else None)


def _images(content: tuple[str, Iterable[tuple[int, str]]]) -> list[tuple[int, str]]:
    return list(content[1])


def _several(images: list[tuple[int, str]]) -> bool:
    return len(images) > 1
