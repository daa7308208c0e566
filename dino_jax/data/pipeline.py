"""From stored images to uint8 batches on the host: decode, resize, shuffle, share out over processes.

Training images become square canvases, from which `multicrop` makes all crops on the device; evaluation images become
the usual center crops. The order is a pure function of (seed, step), so that resuming is starting at another step.
"""

from functools import partial
from typing import NamedTuple

import grain
import numpy as np

from dino_jax.data.decoding import DecodeError, eval_image, to_canvas
from dino_jax.data.sources import Source
from dino_jax.data.workers import STALL_TIMEOUT, Batches, iterate
from dino_jax.errors import UserError

SUBSTITUTES = 8  # images tried in place of one that cannot be decoded


class Batch(NamedTuple):
    """One process's share of a training batch: b images, S canvas side, C channels."""

    canvas: np.ndarray  # uint8 [b, S, S, C], aspect ratio squeezed
    size: np.ndarray  # float32 [b, 2], original height and width in pixels, upright
    position: np.ndarray  # int32 [b], place in the global batch: 0 .. batch_size - 1
    index: np.ndarray  # type: ignore[assignment]  # int32 [b], record number in the source of the image shown
    label: np.ndarray  # int32 [b], of the image shown, -1 where it has none
    bad: np.ndarray  # int32 [b], record that could not be decoded and was replaced, or -1


class EvalBatch(NamedTuple):
    """One process's share of an evaluation batch: b center crops."""

    images: np.ndarray  # uint8 [b, crop, crop, C]
    labels: np.ndarray  # int32 [b], -1 where there is none
    index: np.ndarray  # type: ignore[assignment]  # int32 [b], record number in the source


def train_batches(
    source: Source,
    *,
    batch_size: int,
    canvas_size: int,
    channels: int,
    seed: int,
    start_step: int = 0,
    workers: int = 0,
    stall_timeout: float = STALL_TIMEOUT,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches[Batch]:
    """This process's share of an endless stream of training batches, from step `start_step` on.

    The images of epoch after epoch, each in a new order, run into one another and none is dropped; the order depends on
    seed and step alone. Process p of n has the places p, p + n, p + 2n, ... of every global batch. An image that cannot
    be decoded is replaced by another one, always the same, and recorded in `Batch.bad`.

    Args:
        source: the images; pickled to the workers.
        batch_size: images in the global batch.
        canvas_size: side S of the canvases, pixels.
        channels: of the canvases.
        seed: of the order.
        start_step: number of batches to leave out, at no cost.
        workers: processes that decode; 0 decodes in threads of this process (best for images in memory).
        stall_timeout: seconds without a batch after which the stream ends with an error; 0: never.
        process_index: p.
        process_count: n.

    Raises: UserError if batch_size does not divide over the processes; while iterating, if an image and all its
        substitutes cannot be decoded, a worker was killed, or nothing came for `stall_timeout` seconds.
    """
    if batch_size % process_count:
        raise UserError(
            f"batch_size {batch_size} does not divide over {process_count} processes: "
            f"set --config.batch_size to a multiple of {process_count}"
        )
    records = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()[process_index::process_count]
    batches = records.batch(batch_size // process_count, drop_remainder=True)
    positions = np.arange(process_index, batch_size, process_count, dtype=np.int32)
    load = partial(_load_train, source=source, positions=positions, canvas_size=canvas_size, channels=channels)
    return iterate(batches.map(load)[start_step:], workers, stall_timeout)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    resize: int,
    crop: int,
    channels: int,
    workers: int = 0,
    stall_timeout: float = STALL_TIMEOUT,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches[EvalBatch]:
    """This process's share of all images once, in order, as center crops (see `eval_image`).

    Global batch k holds the records k * batch_size ... of the source; process p of n has every n-th of them from the
    p-th on. Every process gets the same number of batches; the last may be smaller, even empty. An image that cannot be
    decoded is left out together with its label, so its record number is missing from `EvalBatch.index`.

    Raises: UserError if crop > resize.
    """
    if crop > resize:
        raise UserError(f"eval.crop {crop} is larger than eval.resize {resize}: set eval.resize to at least {crop}")
    shares = [
        np.arange(start + process_index, min(start + batch_size, len(source)), process_count)
        for start in range(0, len(source), batch_size)
    ]
    load = partial(_load_eval, source=source, resize=resize, crop=crop, channels=channels)
    return iterate(grain.MapDataset.source(shares).map(load), workers, stall_timeout)


def _load_train(
    records: np.ndarray, *, source: Source, positions: np.ndarray, canvas_size: int, channels: int
) -> Batch:
    """Read, decode and squeeze the images of some record numbers [b]."""
    b = len(records)
    batch = Batch(
        canvas=np.empty((b, canvas_size, canvas_size, channels), np.uint8),
        size=np.empty((b, 2), np.float32),
        position=positions,
        index=records.astype(np.int32),
        label=np.full(b, -1, np.int32),
        bad=np.full(b, -1, np.int32),
    )
    # Substitutes are spread over the whole source, since damage comes in runs (a folder half copied).
    stride = max(1, len(source) // (SUBSTITUTES + 1))
    for row, record in enumerate(records):
        for candidate in (record + stride * np.arange(SUBSTITUTES + 1)) % len(source):
            try:
                image, label = source[int(candidate)]
                batch.canvas[row], batch.size[row] = to_canvas(image, canvas_size, channels)
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


def _load_eval(records: np.ndarray, *, source: Source, resize: int, crop: int, channels: int) -> EvalBatch:
    """Read, decode and crop the images of some record numbers [b], without those that cannot be decoded."""
    images, labels, index = [], [], []
    for record in records.tolist():
        try:
            image, label = source[record]
            images.append(eval_image(image, resize=resize, crop=crop, channels=channels))
        except (DecodeError, OSError):
            continue
        labels.append(label)
        index.append(record)
    pixels = np.stack(images) if images else np.empty((0, crop, crop, channels), np.uint8)
    return EvalBatch(pixels, np.array(labels, np.int32), np.array(index, np.int32))
