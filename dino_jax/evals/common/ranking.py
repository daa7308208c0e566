"""Parts that protocols with rankings share: average precision, cached features of files, a sheet of answers."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import ml_collections
import numpy as np
from PIL import Image, ImageOps

from dino_jax.data.pipeline import EvalBatch
from dino_jax.data.sources.folder import image_paths
from dino_jax.data.workers import Batches
from dino_jax.distributed.sharding import make_mesh
from dino_jax.errors import UserError
from dino_jax.evals.common.extraction import extract_batches, images_in
from dino_jax.evals.common.feature_cache import FeatureCache, report_cached
from dino_jax.evals.common.images import contact_sheet
from dino_jax.progress import progress
from dino_jax.weights.backbone import Backbone

PART = 64  # batches whose features are cached as one file: the most that an interrupted run loses
ANSWERS = 10  # on the sheet, beside each query
TILE, FRAME = 120, 5  # pixels, on the sheet
CORRECT, IGNORED = (0, 160, 60), (150, 150, 150)  # colors of the frames


class Extraction(NamedTuple):
    """Features of some files, with the cost of those that were not in the cache."""

    features: np.ndarray  # float32 [N, D]
    computed: int  # images that were not in the cache
    seconds: float  # to read and compute them


def average_precision(ranks: Sequence[int] | np.ndarray, positives: int) -> float:
    """Returns the area under one query's precision-recall curve, in 0..1, by the trapezoids of Holidays and Oxford.

    Args:
        ranks: ranks of the correct answers that were found, ascending, from 0.
        positives: number of all correct answers, found or not.
    """
    places, found = np.asarray(ranks, np.float64), np.arange(len(ranks))
    before = np.divide(found, places, out=np.ones(len(places)), where=places > 0)
    after = (found + 1) / (places + 1)
    return float((before + after).sum() / (2 * positives))


def extract_files(
    backbone: Backbone,
    apply_fn: Callable[..., Any],
    batches: Sequence[np.ndarray],
    load: Callable[[np.ndarray], np.ndarray],
    names: Sequence[str],
    cache: FeatureCache,
    what: str,
    workers: int,
) -> Extraction:
    """Extracts the features of N image files, row i from file i, except for those in the cache.

    Args:
        backbone: provides variables and normalization.
        apply_fn: (variables, images float32 [b, H, W, C], normalized) -> [b, D]; compiled once for each shape.
        batches: the file numbers of each batch. The images of a batch have one shape; every file is in one batch.
        load: file numbers of a batch -> its images, uint8 [b, H, W, C]; called in threads.
        names: a line for each file that identifies its content and the part of the image that is used.
        cache: of the features.
        what: name of the images in progress reports on stderr.
        workers: number of threads.
    """
    preprocessing, mesh = backbone.card["preprocessing"], make_mesh()
    parts = [batches[i : i + PART] for i in range(0, len(batches), PART)]
    tables, computed, start = [], 0, time.monotonic()

    def read(numbers: np.ndarray) -> EvalBatch:
        return EvalBatch(load(numbers), np.full(len(numbers), -1, np.int32), np.asarray(numbers, np.int32))

    def compute(part: Sequence[np.ndarray], total: int, title: str) -> np.ndarray:
        # Every process takes its share of the batches. One without a share repeats the first, because all take part in
        # the exchange of features.
        share = part[jax.process_index() :: jax.process_count()] or part[:1]
        # Decoding releases the GIL, so threads are enough.
        options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=workers)
        with Batches[EvalBatch](iter(grain.MapDataset.source(share).map(read).to_iter_dataset(options))) as loaded:
            reported = progress(loaded, total, title, size=images_in)
            table = extract_batches(
                apply_fn, backbone.variables, reported, mesh, preprocessing["mean"], preprocessing["std"]
            )
        return table.features[np.unique(table.records, return_index=True)[1]]

    for number, part in enumerate(parts):
        records = np.sort(np.concatenate(part))
        identity = [names[i] for i in records]
        found = cache.load(identity)
        if found is None:
            title = what if len(parts) == 1 else f"{what}, part {number + 1} of {len(parts)}"
            found = {"features": compute(part, len(records), title)}
            cache.save(identity, **found)
            computed += len(records)
        tables.append((records, found["features"]))
    report_cached(what, len(names) - computed, len(names), cache)
    features = np.empty((len(names), tables[0][1].shape[1]), np.float32)
    for records, table in tables:
        features[records] = table
    return Extraction(features, computed, time.monotonic() - start if computed else 0.0)


def rate(*extractions: Extraction) -> float | None:
    """Returns the images per second that were computed; None if all were cached."""
    seconds = sum(extraction.seconds for extraction in extractions)
    return round(sum(extraction.computed for extraction in extractions) / seconds, 1) if seconds else None


def image_files(folder: Path, knob: str) -> list[Path]:
    """Returns the image files in a folder, at any depth, sorted. Raises UserError with the knob if there are none."""
    return [folder / path for path in image_paths(folder, f"{knob}={folder}")]


def check_at_least_one(config: ml_collections.ConfigDict, *knobs: str) -> None:
    """Raises UserError for the first of these knobs that is below 1."""
    for knob in knobs:
        if config[knob] < 1:
            raise UserError(f"{knob} is {config[knob]}: set --config.{knob} to 1 or more")


def thumbnail(path: Path, box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """Returns a picture (or its box: left, upper, right, lower) scaled to fit a tile of the sheet, uint8 [h, w, 3]."""
    with Image.open(path) as picture:
        return np.array(ImageOps.contain(picture.convert("RGB").crop(box), (TILE, TILE)))


def add_frame(picture: np.ndarray, color: tuple[int, int, int] | None) -> np.ndarray:
    """Draws a frame of this color over the edge of a picture, uint8 [h, w, 3]. None draws nothing."""
    if color is None:
        return picture
    inner = picture[FRAME:-FRAME, FRAME:-FRAME].copy()
    picture = np.broadcast_to(np.array(color, np.uint8), picture.shape).copy()
    picture[FRAME:-FRAME, FRAME:-FRAME] = inner
    return picture


def answers_sheet(rows: list[tuple[np.ndarray, list[np.ndarray]]], path: Path) -> None:
    """Writes a PNG with a row for each query: its `thumbnail`, then those of its first answers (see `add_frame`)."""
    contact_sheet(
        [
            {"query": query, **{str(place + 1): answer for place, answer in enumerate(answers)}}
            for query, answers in rows
        ],
        path,
        tile=TILE,
    )
