"""Sums up findings: tallies of parts of a source, which merge in any order to the same sums, and the report of all."""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from dino_jax.data.examination import Finding
from dino_jax.data.sources import Source

UNIT = 2**52  # moments are added as whole numbers of 1 / UNIT: sums of floats would depend on their order
DEEP_IMAGES = 4096  # images of more than 8 bits whose values give the percentiles: those with the smallest hashes
LEAST_STD = 1e-4  # for channels that are constant

Content = tuple[str, tuple[int, str]]  # hash of an image's stored content; its record number and name


class Sample(NamedTuple):
    """Some values of an image of more than 8 bits."""

    digest: str
    record: int
    values: list[float]


@dataclass
class Tally:
    """The sum of the findings of some images. Its size does not grow with them, but for the names of the bad ones."""

    images: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    heights: Counter[int] = field(default_factory=Counter)
    widths: Counter[int] = field(default_factory=Counter)
    moments: list[list[int]] = field(default_factory=list)  # [2][C], sums over images, in 1 / UNIT
    extremes: list[tuple[float, float, float]] = field(default_factory=list)  # at most one: least, most and white
    samples: list[Sample] = field(default_factory=list)
    bad: list[tuple[int, str, str]] = field(default_factory=list)  # record number, name, reason


def tally(source: Source, findings: list[Finding]) -> Tally:
    """Sums up the findings of some images."""
    good = [finding for finding in findings if not finding.problem]
    deep = [(finding, finding.values) for finding in good if finding.values]
    return Tally(
        images=len(findings),
        kinds=Counter(finding.kind for finding in good),
        heights=Counter(finding.size[0] for finding in good),
        widths=Counter(finding.size[1] for finding in good),
        moments=_sum([_in_units(finding.moments) for finding in good if finding.moments]),
        extremes=_widest([(values.least, values.most, values.white) for _, values in deep]),
        samples=_first([Sample(finding.digest, finding.record, values.some) for finding, values in deep]),
        bad=[(found.record, source.name(found.record), found.problem) for found in findings if found.problem],
    )


def merge(tallies: Iterable[Tally]) -> Tally:
    """Returns the sum of some tallies."""
    parts = list(tallies)
    return Tally(
        images=sum(part.images for part in parts),
        kinds=sum((part.kinds for part in parts), Counter()),
        heights=sum((part.heights for part in parts), Counter()),
        widths=sum((part.widths for part in parts), Counter()),
        moments=_sum([part.moments for part in parts if part.moments]),
        extremes=_widest([extremes for part in parts for extremes in part.extremes]),
        samples=_first([sample for part in parts for sample in part.samples]),
        bad=[image for part in parts for image in part.bad],
    )


def contents(source: Source, findings: Iterable[Finding]) -> Iterator[Content]:
    """Yields what tells duplicates: the hash of each image that can be decoded, with its record number and name."""
    for finding in findings:
        if not finding.problem:
            yield finding.digest, (finding.record, source.name(finding.record))


def report(total: Tally, copies: Iterable[Iterable[tuple[int, str]]], classes: int) -> dict[str, Any]:
    """Builds the report, as plain JSON: `bad` as name -> reason, `duplicates` as lists of names, and counts.

    copies: record numbers and names of images of the same content.
    """
    good = total.kinds.total()
    groups = sorted(map(sorted, copies))
    return {
        "images": total.images,
        "classes": classes,
        "kinds": dict(sorted(total.kinds.items(), key=lambda item: (-item[1], item[0]))),
        "sizes": {
            name: {"least": min(sides), "median": _median(sides), "most": max(sides)}
            for name, sides in {"height": total.heights, "width": total.widths}.items()
            if good
        },
        "statistics": dict(zip(("mean", "std"), map(list, mean_and_std(total)), strict=True)) if good else {},
        "values": _values(total) if total.samples else {},
        "duplicates": [[name for _, name in group] for group in groups],
        "bad": {name: problem for _, name, problem in sorted(total.bad)},
    }


def summarize(source: Source, findings: list[Finding]) -> dict[str, Any]:
    """Builds the report of all findings of a source."""
    by_content = defaultdict(list)
    for digest, image in contents(source, findings):
        by_content[digest].append(image)
    copies = [images for images in by_content.values() if len(images) > 1]
    return report(tally(source, findings), copies, source.num_classes)


def mean_and_std(total: Tally) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns data.mean and data.std of the images that can be used, by channel: each image has the same weight."""
    good = total.kinds.total()
    mean, square = (np.array([value / (good * UNIT) for value in row]) for row in total.moments)
    std = np.sqrt(np.maximum(square - mean**2, 0)).clip(LEAST_STD)
    return tuple(map(_rounded, mean)), tuple(map(_rounded, std))


def _in_units(moments: list[list[float]]) -> list[list[int]]:
    return [[round(value * UNIT) for value in row] for row in moments]


def _sum(moments: list[list[list[int]]]) -> list[list[int]]:
    return [[sum(channel) for channel in zip(*rows, strict=True)] for rows in zip(*moments, strict=True)]


def _widest(extremes: list[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    if not extremes:
        return []
    least, most, white = zip(*extremes, strict=True)
    return [(min(least), max(most), max(white))]


def _first(samples: list[Sample]) -> list[Sample]:
    return heapq.nsmallest(DEEP_IMAGES, samples)


def _median(sides: Counter[int]) -> int:
    """Returns the median of numbers that are given by their counts, rounded down."""
    values = sorted(sides)
    ends = np.cumsum([sides[value] for value in values])
    middle = [values[int(np.searchsorted(ends, rank, side="right"))] for rank in ((ends[-1] - 1) // 2, ends[-1] // 2)]
    return sum(middle) // 2


def _values(total: Tally) -> dict[str, Any]:
    [(least, most, white)] = total.extremes
    pooled = np.concatenate([sample.values for sample in total.samples])
    percentiles = [float(value) for value in np.percentile(pooled, (1, 99))]
    return {"least": least, "most": most, "white": white, "percentiles": percentiles}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")  # deep images may fill a small part of their range
