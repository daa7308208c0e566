"""What rankings of images share: average precision, features of files kept between runs, a sheet of answers."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import grain
import ml_collections
import numpy as np
from PIL import Image, ImageOps

from dino_jax.data.pipeline import Batches, EvalBatch
from dino_jax.data.sources import IMAGE_EXTENSIONS
from dino_jax.distributed.sharding import make_mesh
from dino_jax.errors import UserError
from dino_jax.evals.common.extraction import extract, images_in
from dino_jax.evals.common.feature_cache import Kept, say_found
from dino_jax.evals.common.pictures import contact_sheet
from dino_jax.progress import progress
from dino_jax.weights.backbone import Backbone

PART = 64  # batches whose features are saved as one file: what a run that is cut off loses at most
ANSWERS = 10  # on the sheet, beside each query
TILE, FRAME = 120, 5  # pixels, on the sheet
CORRECT, IGNORED = (0, 160, 60), (150, 150, 150)  # colors of the frames


class Extraction(NamedTuple):
    """Features of some files, and what it took to compute those that an earlier run had not left."""

    features: np.ndarray  # float32 [N, D]
    computed: int  # images
    seconds: float


def average_precision(ranks: Sequence[int] | np.ndarray, positives: int) -> float:
    """Area under one query's precision-recall curve by trapezoids, in 0..1, as for the Holidays and Oxford data sets.

    Args:
        ranks: places of the correct answers that were found, ascending, the first place being 0.
        positives: number of correct answers that there are, found or not.
    """
    places, found = np.asarray(ranks, np.float64), np.arange(len(ranks))
    before = np.divide(found, places, out=np.ones(len(places)), where=places > 0)
    after = (found + 1) / (places + 1)
    return float((before + after).sum() / (2 * positives))


def extract_files(
    backbone: Backbone,
    apply_fn: Callable,
    batches: Sequence[np.ndarray],
    load: Callable[[np.ndarray], np.ndarray],
    names: Sequence[str],
    kept: Kept,
    what: str,
    workers: int,
) -> Extraction:
    """Features of N image files, row i of file i. Those that an earlier run has left are not computed again.

    Args:
        backbone: whose variables and preprocessing apply.
        apply_fn: (variables, images float32 [b, H, W, C], normalized) -> [b, D]; compiled once for each shape.
        batches: numbers of the images of one batch each, all of one shape; together each of 0..N-1 once.
        load: numbers of a batch -> its images, uint8 [b, H, W, C]; called in threads.
        names: what identifies each file and what is taken of it.
        kept: where features are kept.
        what: to call the images on stderr, which is told how far it is.
        workers: number of threads.
    """
    preprocessing, mesh = backbone.card["preprocessing"], make_mesh()
    parts = [batches[i : i + PART] for i in range(0, len(batches), PART)]
    tables, computed, start = [], 0, time.monotonic()

    def read(numbers: np.ndarray) -> EvalBatch:
        return EvalBatch(load(numbers), np.full(len(numbers), -1, np.int32), np.asarray(numbers, np.int32))

    def compute(part: Sequence[np.ndarray], total: int, title: str) -> np.ndarray:
        # Decoding leaves Python's lock free: threads are enough.
        options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=workers)
        with Batches[EvalBatch](iter(grain.MapDataset.source(part).map(read).to_iter_dataset(options))) as loaded:
            shown = progress(loaded, total, title, size=images_in)
            return extract(
                apply_fn, backbone.variables, shown, mesh, preprocessing["mean"], preprocessing["std"]
            ).features

    for number, part in enumerate(parts):
        records = np.sort(np.concatenate(part))
        identity = [names[i] for i in records]
        found = kept.load(identity)
        if found is None:
            title = what if len(parts) == 1 else f"{what}, part {number + 1} of {len(parts)}"
            found = {"features": compute(part, len(records), title)}
            kept.save(identity, **found)
            computed += len(records)
        tables.append((records, found["features"]))
    say_found(what, len(names) - computed, len(names), kept)
    features = np.empty((len(names), tables[0][1].shape[1]), np.float32)
    for records, table in tables:
        features[records] = table
    return Extraction(features, computed, time.monotonic() - start if computed else 0.0)


def rate(*extractions: Extraction) -> float | None:
    """Images per second of what was computed; None where everything was there already."""
    seconds = sum(extraction.seconds for extraction in extractions)
    return round(sum(extraction.computed for extraction in extractions) / seconds, 1) if seconds else None


def image_files(folder: Path, knob: str) -> list[Path]:
    """Pictures in a folder, at any depth, sorted. UserError that names the knob where it has none or does not exist."""
    if not folder.is_dir():
        raise UserError(f"{knob}: no folder {folder}")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_EXTENSIONS)
    if not paths:
        raise UserError(f"{knob}: no pictures ({', '.join(IMAGE_EXTENSIONS)}) in {folder}")
    return paths


def check_at_least_one(config: ml_collections.ConfigDict, *knobs: str) -> None:
    """UserError for the first of these knobs that is below 1."""
    for knob in knobs:
        if config[knob] < 1:
            raise UserError(f"{knob} is {config[knob]}: set --config.{knob} to 1 or more")


def thumbnail(path: Path, box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """uint8 [h, w, 3] of a picture (or of a box of it: left, upper, right, lower), of the sheet's size."""
    with Image.open(path) as picture:
        return np.array(ImageOps.contain(picture.convert("RGB").crop(box), (TILE, TILE)))


def framed(picture: np.ndarray, color: tuple[int, int, int] | None) -> np.ndarray:
    """The picture, uint8 [h, w, 3], with a frame of that color (None leaves it as it is)."""
    if color is None:
        return picture
    inner = picture[FRAME:-FRAME, FRAME:-FRAME].copy()
    picture = np.broadcast_to(np.array(color, np.uint8), picture.shape).copy()
    picture[FRAME:-FRAME, FRAME:-FRAME] = inner
    return picture


def answers_sheet(rows: list[tuple[np.ndarray, list[np.ndarray]]], path: Path) -> None:
    """Writes queries (see `thumbnail`), each with its first answers (see `framed`) beside it, as one PNG."""
    contact_sheet(
        [
            {"query": query, **{str(place + 1): answer for place, answer in enumerate(answers)}}
            for query, answers in rows
        ],
        path,
        tile=TILE,
    )
