"""Features of every image of a source: one table, in the order of the source, whatever the number of devices."""

import hashlib
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dino_jax.data.pipeline import EvalBatch, eval_batches
from dino_jax.data.sources import FolderSource, Source, Subset
from dino_jax.distributed.sharding import replicate, shard_batch
from dino_jax.errors import UserError
from dino_jax.evals.common.feature_cache import Kept, fingerprint, say_found
from dino_jax.progress import progress
from dino_jax.weights.backbone import Backbone

# Rows gathered from every process at a time: bounds what the exchange takes of the devices' memory.
GATHER_ROWS = 65536
PART = 16384  # images whose features are kept as one file: what a run that is cut off loses at most


class FeatureTable(NamedTuple):
    """One row an image that could be decoded, in the order of the source."""

    features: np.ndarray  # float32 [N, D]
    labels: np.ndarray  # int32 [N], -1 where unlabeled
    records: np.ndarray  # int32 [N], record number in the source


def tabulate(
    apply_fn: Callable,
    variables,
    source: Source,
    what: str,
    mesh: Mesh,
    *,
    batch_size: int,
    resize: int,
    crop: int,
    channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    workers: int = 0,
    kept: Kept | None = None,
) -> FeatureTable:
    """Features of every image of a source: read, cropped, extracted (see `eval_batches` and `extract`).

    Says on stderr how far it is and which images could not be decoded, calling the source `what`. All processes call it
    and get the whole table. With `kept` every so many images are kept, and not computed again where they are there:
    its key must hold all that the features depend on but the images, see `identities`. Raises UserError if not one
    image can be decoded.
    """
    # Whole batches, so that parts begin where batches do whichever of them are missing.
    size = batch_size * max(1, PART // batch_size) if kept else max(1, len(source))
    parts = [np.arange(start, min(start + size, len(source))) for start in range(0, len(source), size)]
    tables = [_kept_table(source, records, kept) for records in parts]
    missing = [records for records, table in zip(parts, tables, strict=True) if table is None]
    if kept:
        say_found(what, len(source) - sum(map(len, missing)), len(source), kept)
    if missing:
        todo = Subset(source, np.concatenate(missing))
        with eval_batches(
            todo,
            batch_size=batch_size,
            resize=resize,
            crop=crop,
            channels=channels,
            workers=workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        ) as batches:
            shown = progress(
                (x._replace(index=todo.records[x.index]) for x in batches), len(todo), what, size=images_in
            )
            for number, records in enumerate(parts):
                if tables[number] is None:
                    own = itertools.islice(shown, -(-len(records) // batch_size))
                    tables[number] = table = extract(apply_fn, variables, own, mesh, mean, std)
                    if kept:
                        kept.computed += len(records)
                        kept.save(identities(source, records), **table._asdict())
    found = [table for table in tables if table is not None and len(table.records)]
    if not found:
        raise UserError(f"{what}: not one of its {len(source):,} images can be decoded")
    whole = FeatureTable(*(np.concatenate(x) if len(x) > 1 else x[0] for x in zip(*found, strict=True)))
    if bad := undecodable(source, whole):
        names = ", ".join(bad[:5]) + ", ..." * (len(bad) > 5)
        print(f"{what}: left out {len(bad)} of {len(source):,} images, undecodable: {names}", file=sys.stderr)
    return whole


def tabulate_backbone(
    backbone: Backbone, source: Source, what: str, mesh: Mesh, config, kept: Kept, apply_fn: Callable | None = None
) -> FeatureTable:
    """`tabulate` with a protocol's knobs: batch_size, workers, resize, crop. `apply_fn`: another than the model's."""
    trained = backbone.card["preprocessing"]
    return tabulate(
        apply_fn or backbone.model.apply,
        backbone.variables,
        source,
        what,
        mesh,
        batch_size=config.batch_size,
        channels=backbone.config["in_channels"],
        mean=trained["mean"],
        std=trained["std"],
        workers=config.workers,
        kept=kept,
        **image_size(backbone, config),
    )


def keep_in(out: Path, backbone: Backbone, config, *kind) -> Kept:
    """`out`/features, for `tabulate_backbone`. `kind`: what an apply_fn of its own takes, anything that JSON holds."""
    return Kept(out / "features", fingerprint(backbone, image_size(backbone, config), *kind))


def image_size(backbone: Backbone, config) -> dict[str, int]:
    """{"resize", "crop"}: a protocol's knobs, or what the checkpoint's card says where they are not set."""
    return {key: config[key] or backbone.card["preprocessing"][key] for key in ("resize", "crop")}


def undecodable(source: Source, table: FeatureTable) -> list[str]:
    """Names of the images that a table has no row of."""
    return [source.name(i) for i in np.setdiff1d(np.arange(len(source)), table.records).tolist()]


def identities(source: Source, records: np.ndarray) -> list[str]:
    """What a table of these images depends on, as lines.

    Of files in folders: relative path, class, size and time of change. Elsewhere (TFDS, ArrayRecord) only the name and
    number, since to read a record is to read the image; but of the first and the last of these records the content
    counts too, which tells most versions of a set apart. One where only others were changed in place is not noticed.
    """
    return [
        *(_content(source, i) for i in records[[0, -1]].tolist()),
        *(_identity(source, i) for i in records.tolist()),
    ]


def _identity(source: Source, i: int) -> str:
    if isinstance(source, Subset):
        return _identity(source.source, int(source.records[i]))
    if isinstance(source, FolderSource):
        try:
            status = os.stat(os.path.join(source.root, source.paths[i]))
        except OSError:
            return f"{source.name(i)} is not there"
        return f"{source.name(i)} {source.label(i)} {status.st_size} {status.st_mtime_ns}"
    return source.name(i)


def _content(source: Source, i: int) -> str:
    try:
        image = source[i].image
    except OSError as error:
        return str(error)
    return hashlib.sha256(image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes()).hexdigest()


def _kept_table(source: Source, records: np.ndarray, kept: Kept | None) -> FeatureTable | None:
    """What is kept of these records, if every process finds it."""
    if kept is None:
        return None
    arrays = kept.load(identities(source, records))
    there = np.array(arrays is not None)
    if jax.process_count() > 1:
        there = multihost_utils.process_allgather(there)
    return FeatureTable(**arrays) if arrays is not None and there.all() else None


def raw_pixels(variables, images: jax.Array) -> jax.Array:
    """An apply_fn for `extract`: the pixels themselves as features [b, H*W*C], what any learnt feature has to beat."""
    return images.reshape(len(images), -1)


def extract(
    apply_fn: Callable, variables, batches: Iterable[EvalBatch], mesh: Mesh, mean: Sequence[float], std: Sequence[float]
) -> FeatureTable:
    """Runs apply_fn(variables, images float32 [b, H, W, C], normalized) -> [b, D] over all batches.

    Each process runs its share of the images on its own devices (no communication), then the tables are gathered and
    every process returns the whole one. The devices compute a batch while the host prepares the next.

    Args:
        apply_fn: `model.apply` or any function of that shape; the same object in later calls is not compiled again.
        variables: parameters and statistics, on the host or whole on each device.
        batches: this process's share. Those smaller than the largest so far (the last, or after images that could not
            be decoded) are padded to its size on the way to the devices and cut back after: one program serves all.
        mesh: all devices.
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
    """
    local = mesh.local_mesh
    variables = replicate(jax.device_get(variables), local)
    mean, std = replicate((np.asarray(mean, np.float32), np.asarray(std, np.float32)), local)
    size, running, features, labels, index = local.size, [], [], [], []
    for batch in batches:
        n = len(batch.images)
        size = max(size, -(-n // local.size) * local.size)
        running.append((_forward(apply_fn, variables, shard_batch(_pad_rows(batch.images, size), local), mean, std), n))
        # Copies: arrays from grain's workers each hold a file descriptor, which thousands of batches would use up.
        labels.append(np.array(batch.labels))
        index.append(np.array(batch.index))
        # Waiting only for the batch before keeps the devices busy while this loop waits for the host's next one.
        if len(running) > 1:
            features.append(_fetch(*running.pop(0)))
    features += [_fetch(*last) for last in running]
    return _gather(FeatureTable(np.concatenate(features), np.concatenate(labels), np.concatenate(index)))


def l2_normalize(features: np.ndarray) -> np.ndarray:
    """[N, D] -> [N, D], rows of length 1."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def images_in(batch: EvalBatch) -> int:
    """For `progress`."""
    return len(batch.images)


@partial(jax.jit, static_argnums=0)
def _forward(apply_fn, variables, images, mean, std):
    """uint8 [b, H, W, C] split over the devices -> float32 [b, D], split alike."""
    return apply_fn(variables, (images / jnp.float32(255) - mean) / std).astype(jnp.float32)


def _fetch(output: jax.Array, n: int) -> np.ndarray:
    return np.asarray(output)[:n]


def _gather(share: FeatureTable) -> FeatureTable:
    """Every process's rows, sorted by record number."""
    if jax.process_count() > 1:
        # Shares differ by a few records and the exchange wants equal ones: rows of zeros are added, and real records
        # counted from 1 meanwhile to tell them apart.
        rows = int(multihost_utils.process_allgather(np.array(len(share.records))).max())
        table = FeatureTable(*(_all_rows(_pad_rows(x, rows)) for x in share._replace(records=share.records + 1)))
        real = table.records > 0
        share = FeatureTable(*(x[real] for x in table._replace(records=table.records - 1)))
    order = np.argsort(share.records)
    return FeatureTable(*(x[order] for x in share))


def _pad_rows(x: np.ndarray, rows: int) -> np.ndarray:
    """[n, ...] -> [rows, ...], zeros at the end."""
    return x if len(x) == rows else np.pad(x, ((0, rows - len(x)),) + ((0, 0),) * (x.ndim - 1))


def _all_rows(x: np.ndarray) -> np.ndarray:
    """[n, ...] of each process -> [processes * n, ...]."""
    pieces = [x[i : i + GATHER_ROWS] for i in range(0, len(x), GATHER_ROWS)]
    return np.concatenate([np.asarray(multihost_utils.process_allgather(piece, tiled=True)) for piece in pieces])
