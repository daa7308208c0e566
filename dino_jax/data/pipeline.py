"""Input pipeline on the host: from stored images to shuffled batches of pixels, a share for each process.

Training images become square canvases, from which `multicrop` takes all crops on the device; evaluation images become
center crops. The order is a pure function of (seed, step), so resuming means starting at another step.
"""

from functools import partial
from typing import NamedTuple

import grain
import numpy as np

from dino_jax.data.decoding import DecodeError, eval_image, to_canvas
from dino_jax.data.order import part_of_batches, shuffled
from dino_jax.data.pixels import Pixels
from dino_jax.data.sources import Source, read_example
from dino_jax.data.workers import STALL_TIMEOUT, Batches, iterate
from dino_jax.errors import UserError

SUBSTITUTES = 8  # number of images to try instead of one that cannot be decoded


class Batch(NamedTuple):
    """One process's share of a training batch: b images, S canvas side, C channels."""

    canvas: np.ndarray  # pixels.dtype [b, S, S, C], see `decoding.to_canvas`
    size: np.ndarray  # float32 [b, 2], original height and width in pixels, upright
    position: np.ndarray  # int32 [b], index in the global batch: 0 .. batch_size - 1
    index: np.ndarray  # type: ignore[assignment]  # int32 [b], record number of the image in the source
    label: np.ndarray  # int32 [b], of this image, -1 if it has none
    bad: np.ndarray  # int32 [b], record that could not be decoded and was replaced by this image, or -1


class EvalBatch(NamedTuple):
    """One process's share of an evaluation batch: b center crops."""

    images: np.ndarray  # pixels.dtype [b, crop, crop, C]
    labels: np.ndarray  # int32 [b], -1 if there is none
    index: np.ndarray  # type: ignore[assignment]  # int32 [b], record number in the source


def train_batches(
    source: Source,
    *,
    batch_size: int,
    canvas_size: int,
    pixels: Pixels,
    seed: int,
    start_step: int = 0,
    workers: int = 0,
    stall_timeout: float = STALL_TIMEOUT,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches[Batch]:
    """Returns this process's share of an endless stream of training batches, starting at step `start_step`.

    Each epoch has all images in a new order. Batches may span two epochs, so no image is dropped. The order depends
    only on seed and step. Process p of n has the p-th of n equal parts of every global batch. An image that
    cannot be decoded is replaced by another one, always the same, and recorded in `Batch.bad`.

    Args:
        source: the images; pickled to the workers.
        batch_size: images in the global batch.
        canvas_size: side S of the canvases in pixels.
        pixels: of the canvases.
        seed: of the order.
        start_step: number of batches to skip, at no cost.
        workers: number of processes that decode; 0 decodes in threads of this process (best for images in memory).
        stall_timeout: seconds without a batch after which the stream raises; 0: never.
        process_index: p.
        process_count: n.

    Raises: UserError if batch_size is not a multiple of the number of processes; while iterating, if an image and all
        its substitutes cannot be decoded, a worker was killed, or no batch came for `stall_timeout` seconds.
    """
    if batch_size % process_count:
        raise UserError(
            f"batch_size {batch_size} does not divide over {process_count} processes: "
            f"set --config.batch_size to a multiple of {process_count}"
        )
    share = batch_size // process_count
    batches = part_of_batches(shuffled(source, seed), batch_size, process_index * share, share)
    positions = np.arange(process_index * share, (process_index + 1) * share, dtype=np.int32)
    load = partial(_load_train, source=source, positions=positions, canvas_size=canvas_size, pixels=pixels)
    return iterate(batches.map(load)[start_step:], workers, stall_timeout)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    resize: int,
    crop: int,
    pixels: Pixels,
    workers: int = 0,
    stall_timeout: float = STALL_TIMEOUT,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches[EvalBatch]:
    """Returns this process's share of one pass over all images, in order, as center crops (see `eval_image`).

    Global batch k has the records from k * batch_size on; process p of n has every n-th of them, starting at the p-th.
    Every process gets the same number of batches; the last may be smaller, even empty. An image that cannot be decoded
    is skipped, and its record number is missing from `EvalBatch.index`.

    Raises: UserError if crop > resize.
    """
    if crop > resize:
        raise UserError(f"eval.crop {crop} is larger than eval.resize {resize}: set eval.resize to at least {crop}")
    shares = [
        np.arange(start + process_index, min(start + batch_size, len(source)), process_count)
        for start in range(0, len(source), batch_size)
    ]
    load = partial(_load_eval, source=source, resize=resize, crop=crop, pixels=pixels)
    return iterate(grain.MapDataset.source(shares).map(load), workers, stall_timeout)


def _load_train(
    records: np.ndarray, *, source: Source, positions: np.ndarray, canvas_size: int, pixels: Pixels
) -> Batch:
    """Reads the images with these record numbers [b] and puts them on canvases."""
    b = len(records)
    batch = Batch(
        canvas=np.empty((b, canvas_size, canvas_size, pixels.channels), pixels.dtype),
        size=np.empty((b, 2), np.float32),
        position=positions,
        index=records.astype(np.int32),
        label=np.full(b, -1, np.int32),
        bad=np.full(b, -1, np.int32),
    )
    # Substitutes are spread over the source, because damage comes in runs (for example, a partially copied folder).
    stride = max(1, len(source) // (SUBSTITUTES + 1))
    for row, record in enumerate(records):
        for candidate in (record + stride * np.arange(SUBSTITUTES + 1)) % len(source):
            try:
                image, label = read_example(source, int(candidate))
                batch.canvas[row], batch.size[row] = to_canvas(image, canvas_size, pixels)
            except (DecodeError, OSError) as error:
                batch.bad[row] = record
                reason = error
            else:
                batch.index[row], batch.label[row] = candidate, label
                break
        else:
            raise UserError(
                f"data.source: {source.name(int(record))} and its {SUBSTITUTES} substitutes cannot be decoded, "
                f"the last, {source.name(int(candidate))}, because: {reason}"
            )
    return batch


def _load_eval(records: np.ndarray, *, source: Source, resize: int, crop: int, pixels: Pixels) -> EvalBatch:
    """Reads, decodes and crops the images with these record numbers [b], skipping those that cannot be decoded."""
    images, labels, index = [], [], []
    for record in records.tolist():
        try:
            image, label = read_example(source, record)
            images.append(eval_image(image, resize=resize, crop=crop, pixels=pixels))
        except (DecodeError, OSError):
            continue
        labels.append(label)
        index.append(record)
    stacked = np.stack(images) if images else np.empty((0, crop, crop, pixels.channels), pixels.dtype)
    return EvalBatch(stacked, np.array(labels, np.int32), np.array(index, np.int32))
