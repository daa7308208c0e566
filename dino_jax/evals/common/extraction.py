"""Feature extraction: one table for a whole source, in its order, independent of the number of devices."""

import hashlib
import itertools
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dino_jax.data.pipeline import EvalBatch, eval_batches
from dino_jax.data.pixels import Pixels, to_unit
from dino_jax.data.sources import Source, Subset, read_example
from dino_jax.distributed.sharding import replicate, shard_batch
from dino_jax.errors import UserError
from dino_jax.evals.common.feature_cache import FeatureCache, fingerprint, report_cached
from dino_jax.progress import progress
from dino_jax.weights.backbone import Backbone

# Rows gathered from every process at a time. Bounds the device memory that the exchange uses.
GATHER_ROWS = 65536
PART = 16384  # images whose features are cached as one file: the most that an interrupted run loses


class FeatureTable(NamedTuple):
    """One row per decodable image, in the order of the source."""

    features: np.ndarray  # float32 [N, D]
    labels: np.ndarray  # int32 [N], -1 where unlabeled
    records: np.ndarray  # int32 [N], record number in the source


class Reading(TypedDict):
    """How the images of a source are read and normalized."""

    batch_size: int
    resize: int
    crop: int
    pixels: Pixels
    mean: Sequence[float]
    std: Sequence[float]
    workers: NotRequired[int]


def extract_source(
    apply_fn: Callable[..., Any],
    variables: Any,
    source: Source,
    what: str,
    mesh: Mesh,
    *,
    cache: FeatureCache | None = None,
    **reading: Unpack[Reading],
) -> FeatureTable:
    """Extracts the features of every image of a source: reads and crops (`eval_batches`), then `extract_batches`.

    Prints progress and the names of undecodable images to stderr, where `what` is the name of the source. All processes
    must call it; all get the complete table. With a `cache`, each part of about `PART` images is looked up and stored;
    the key of the cache must cover everything that features depend on except the images (see `identities`).

    Raises UserError if no image can be decoded.
    """
    parts = parts_of(source, reading["batch_size"], PART if cache else len(source))
    tables = [_cached_table(source, records, cache) for records in parts]
    missing = [records for records, table in zip(parts, tables, strict=True) if table is None]
    if cache:
        report_cached(what, len(source) - sum(map(len, missing)), len(source), cache)
    with closing(extract_parts(apply_fn, variables, source, missing, what, mesh, cache=cache, **reading)) as extracted:
        tables = [table or next(extracted) for table in tables]
    found = [table for table in tables if table is not None and len(table.records)]
    if not found:
        raise UserError(f"{what}: none of its {len(source):,} images can be decoded")
    table = FeatureTable(*(np.concatenate(x) if len(x) > 1 else x[0] for x in zip(*found, strict=True)))
    if bad := undecodable(source, table):
        names = ", ".join(bad[:5]) + ", ..." * (len(bad) > 5)
        print(f"{what}: skipped {len(bad)} of {len(source):,} images that cannot be decoded: {names}", file=sys.stderr)
    return table


def parts_of(source: Source, batch_size: int, images: int) -> list[np.ndarray]:
    """Returns the record numbers of each part of a source, of about so many images.

    Parts are whole batches, so that batches are the same whichever parts are extracted.
    """
    size = batch_size * max(1, -(-images // batch_size))
    return [np.arange(start, min(start + size, len(source))) for start in range(0, len(source), size)]


def extract_parts(
    apply_fn: Callable[..., Any],
    variables: Any,
    source: Source,
    parts: Sequence[np.ndarray],
    what: str,
    mesh: Mesh,
    *,
    cache: FeatureCache | None = None,
    **reading: Unpack[Reading],
) -> Generator[FeatureTable, None, None]:
    """Yields the features of each part, which are stored in the cache. Parts are read ahead as one stream."""
    if not parts:
        return
    todo, batch_size = Subset(source, np.concatenate(parts)), reading["batch_size"]
    with eval_batches(
        todo,
        batch_size=batch_size,
        resize=reading["resize"],
        crop=reading["crop"],
        pixels=reading["pixels"],
        workers=reading.get("workers", 0),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    ) as batches:
        in_source = (batch._replace(index=todo.records[batch.index]) for batch in batches)
        reported = progress(in_source, len(todo), what, size=images_in)
        for records in parts:
            own = itertools.islice(reported, -(-len(records) // batch_size))
            table = extract_batches(apply_fn, variables, own, mesh, reading["mean"], reading["std"])
            if cache:
                cache.computed += len(records)
                cache.save(identities(source, records), **table._asdict())
            yield table


def extract_with_backbone(
    backbone: Backbone,
    source: Source,
    what: str,
    mesh: Mesh,
    config: ConfigDict,
    cache: FeatureCache,
    apply_fn: Callable[..., Any] | None = None,
) -> FeatureTable:
    """Calls `extract_source` with a backbone and the knobs batch_size, workers, resize and crop of a protocol's config.

    `apply_fn` computes other features than `cls`.
    """
    apply_fn, reading = apply_fn or cls_features(backbone.model), reading_of(backbone, config)
    return extract_source(apply_fn, backbone.variables, source, what, mesh, cache=cache, **reading)


def reading_of(backbone: Backbone, config: ConfigDict) -> Reading:
    """Returns how a backbone reads images, with the knobs batch_size, workers, resize and crop of a protocol."""
    trained, size = backbone.card["preprocessing"], image_size(backbone, config)
    return Reading(
        batch_size=config.batch_size,
        resize=size["resize"],
        crop=size["crop"],
        pixels=backbone.pixels,
        mean=trained["mean"],
        std=trained["std"],
        workers=config.workers,
    )


def cache_for(out: Path, backbone: Backbone, config: ConfigDict, *kind: Any) -> FeatureCache:
    """Returns the cache `out`/features for `extract_with_backbone`. `kind` identifies its apply_fn, in JSON types."""
    return FeatureCache(out / "features", fingerprint(backbone, image_size(backbone, config), *kind))


def image_size(backbone: Backbone, config: ConfigDict) -> dict[str, int]:
    """Returns {"resize", "crop"} in pixels: the protocol's knobs, by default the values in the checkpoint's card."""
    return {key: config[key] or backbone.card["preprocessing"][key] for key in ("resize", "crop")}


def undecodable(source: Source, table: FeatureTable) -> list[str]:
    """Returns the names of the images that have no row in the table."""
    return [source.name(i) for i in np.setdiff1d(np.arange(len(source)), table.records).tolist()]


def identities(source: Source, records: np.ndarray) -> list[str]:
    """Returns lines that identify these images, for the key of the feature cache.

    The lines are `Source.identity` of each record, and hashes of the first and the last image. The hashes tell most
    versions of a data set apart whose records have no size and time of their own (TFDS, ArrayRecord). A version in
    which only images between these two were changed in place is not noticed.
    """
    return [
        *(_content_hash(source, i) for i in records[[0, -1]].tolist()),
        *(source.identity(i) for i in records.tolist()),
    ]


def _content_hash(source: Source, i: int) -> str:
    try:
        image = read_example(source, i).image
    except OSError as error:
        return str(error)
    return hashlib.sha256(image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes()).hexdigest()


def _cached_table(source: Source, records: np.ndarray, cache: FeatureCache | None) -> FeatureTable | None:
    """Returns the cached features of these records, or None."""
    arrays = cache.load(identities(source, records)) if cache else None
    return None if arrays is None else FeatureTable(**arrays)


@cache  # one function per model, so that a second call compiles nothing
def cls_features(model: Any) -> Callable[..., Any]:
    """The apply_fn of a backbone's `cls`: (variables, normalized images [b, H, W, C]) -> [b, D]."""

    def apply(variables: Any, images: jax.Array) -> jax.Array:
        return model.apply(variables, images).cls

    return apply


def raw_pixels(variables: Any, images: jax.Array) -> jax.Array:
    """An apply_fn whose features are the pixels, [b, H*W*C]: the baseline that learned features have to beat."""
    return images.reshape(len(images), -1)


def extract_batches(
    apply_fn: Callable[..., Any],
    variables: Any,
    batches: Iterable[EvalBatch],
    mesh: Mesh,
    mean: Sequence[float],
    std: Sequence[float],
) -> FeatureTable:
    """Runs apply_fn(variables, images float32 [b, H, W, C], normalized) -> [b, D] over all batches.

    Each process runs its share of the images on its own devices, without communication; then the tables are gathered,
    and every process returns the complete one. The devices compute a batch while the host prepares the next.

    Args:
        apply_fn: `cls_features(model)` or a function with the same signature; the same object compiles once.
        variables: parameters and statistics, on the host or replicated.
        batches: this process's share. A batch smaller than the largest so far (the last one, or one with undecodable
            images) is padded on the devices, so that one compiled program serves all.
        mesh: all devices.
        mean: mean of each channel, for pixels in [0, 1].
        std: standard deviation of each channel, for pixels in [0, 1].

    Returns:
        The rows of all processes, sorted by record number.
    """
    local = mesh.local_mesh
    variables = replicate(jax.device_get(variables), local)
    mean, std = replicate((np.asarray(mean, np.float32), np.asarray(std, np.float32)), local)
    size, running, features, labels, index = local.size, [], [], [], []
    for batch in batches:
        n = len(batch.images)
        size = max(size, -(-n // local.size) * local.size)
        running.append((_forward(apply_fn, variables, shard_batch(_pad_rows(batch.images, size), local), mean, std), n))
        # Copies, because each array from grain's workers holds a file descriptor, and a process may open few.
        labels.append(np.array(batch.labels))
        index.append(np.array(batch.index))
        # Wait for the previous batch only: the devices stay busy while the host prepares the next one.
        if len(running) > 1:
            features.append(_fetch(*running.pop(0)))
    features += [_fetch(*last) for last in running]
    return gather(FeatureTable(np.concatenate(features), np.concatenate(labels), np.concatenate(index)))


def l2_normalize(features: np.ndarray) -> np.ndarray:
    """Divides vectors, on the last axis, by their length."""
    return features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)


def images_in(batch: EvalBatch) -> int:
    """Returns the number of images of a batch, for `progress`."""
    return len(batch.images)


@partial(jax.jit, static_argnums=0)
def _forward(
    apply_fn: Callable[..., Any], variables: Any, images: jax.Array, mean: jax.Array, std: jax.Array
) -> jax.Array:
    """Pixels [b, H, W, C], split over the devices -> float32 [b, D], split the same way."""
    return apply_fn(variables, (to_unit(images) - mean) / std).astype(jnp.float32)


def _fetch(output: jax.Array, n: int) -> np.ndarray:
    return np.asarray(output)[:n]


def gather(share: FeatureTable) -> FeatureTable:
    """Returns the rows of all processes, sorted by record number."""
    if jax.process_count() > 1:
        # The shares differ by a few records, but the exchange needs equal sizes: pad with rows of zeros, and count
        # records from 1 in the meantime to tell real rows from padding.
        rows = int(multihost_utils.process_allgather(np.array(len(share.records))).max())
        table = FeatureTable(*(_all_rows(_pad_rows(x, rows)) for x in share._replace(records=share.records + 1)))
        real = table.records > 0
        share = FeatureTable(*(x[real] for x in table._replace(records=table.records - 1)))
    order = np.argsort(share.records)
    return FeatureTable(*(x[order] for x in share))


def _pad_rows(x: np.ndarray, rows: int) -> np.ndarray:
    """[n, ...] -> [rows, ...], with zeros at the end."""
    return x if len(x) == rows else np.pad(x, ((0, rows - len(x)),) + ((0, 0),) * (x.ndim - 1))


def _all_rows(x: np.ndarray) -> np.ndarray:
    """Concatenates [n, ...] of each process to [processes * n, ...]."""
    pieces = [x[i : i + GATHER_ROWS] for i in range(0, len(x), GATHER_ROWS)]
    return np.concatenate([np.asarray(multihost_utils.process_allgather(piece, tiled=True)) for piece in pieces])
