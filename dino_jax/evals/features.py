"""Writes the features of a set of images to files, for use in other programs.

    dino-jax evaluate features --checkpoint=runs/a --config.source=folder:/data/photos

writes to runs/a/eval/features

    features.npy   float32 [N, D], a row per image, in the order of the source: numpy.load(path, mmap_mode="r")
    images.csv     record (number in the source), name, label (-1: none), class; line i + 2 describes row i

--config.format=array_record writes features.array_record instead of the .npy: record i is row i, D float32 numbers,
little-endian. --config.pooling and --config.blocks choose the features. An undecodable image has no row; results.json
lists its name.

--beam extracts parts of the source on the workers of Apache Beam, into the cache of features that an interrupted run
resumes from, and writes the same files from them (docs/data.md).
"""

import csv
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from ml_collections.config_dict import placeholder

from dino_jax import atomic
from dino_jax.data import beam
from dino_jax.data.sources import Source, names_digest, open_source
from dino_jax.data.sources.array_record import as_os_error
from dino_jax.distributed.processes import on_every_process, set_cpu_device_count
from dino_jax.distributed.sharding import make_mesh
from dino_jax.errors import UserError
from dino_jax.evals.common import extraction
from dino_jax.evals.common.extraction import FeatureTable, cache_for, extract_with_backbone, image_size, undecodable
from dino_jax.evals.common.feature_cache import WAY_OUT, FeatureCache
from dino_jax.evals.common.linear_heads import Kind, probe_features
from dino_jax.limits import COUNT, PIXELS
from dino_jax.weights.backbone import Backbone, load_backbone

POOLINGS = ("cls", "mean", "cls_mean")
FORMATS = ("npy", "array_record")
_LOADING = threading.Lock()


class FeatureSet(NamedTuple):
    """Features with names and labels, a row per image."""

    features: np.ndarray  # float32 [N, D]
    records: np.ndarray  # int32 [N], record number in the source
    labels: np.ndarray  # int32 [N], -1 where unlabeled
    names: list[str]  # of the images
    classes: list[str]  # of the images, "" where unlabeled


def knobs() -> dict[str, Any]:
    """Returns the knobs shared by protocols that extract features of one source."""
    return {
        "source": "",  # the images (data/sources): folder:PATH, tfds:NAME, array_record:GLOB, demo:test
        "pooling": "cls",  # for a ViT: CLS token (cls), mean patch token (mean), or CLS and the last mean (cls_mean)
        "blocks": 1,  # for a ViT: number of last blocks whose features are concatenated
        "resize": placeholder(int),  # pixels of the shorter side; default: from the checkpoint's card
        "crop": placeholder(int),  # pixels of the center square; default: from the checkpoint's card
        "batch_size": 256,  # images, over all devices
        "workers": min(8, os.cpu_count() or 1),  # processes that read and decode images
    }


LIMITS = {"blocks": COUNT, "batch_size": COUNT, "workers": (0, 1_024), "resize": PIXELS, "crop": PIXELS}


def default_config() -> ml_collections.ConfigDict:
    """Every knob of `dino-jax evaluate features`."""
    return ml_collections.ConfigDict(knobs() | {"format": "npy"})  # or array_record


def run(backbone: Backbone, config: ml_collections.ConfigDict, out: Path) -> dict[str, Any]:
    """Writes features and a list of their images, see the module. An interrupted run continues where it stopped.

    Returns:
        The content of results.json: {"files": [paths], "settings", "images", "dim", "undecodable": [names], "seconds",
        "images_per_second" (None if all features were cached)}.

    Raises:
        UserError: no source is set, the backbone does not have the chosen features, or the disk is full.
    """
    if config.format not in FORMATS:
        raise UserError(f"format {config.format!r} is unknown: set --config.format to {' or '.join(FORMATS)}")
    start = time.monotonic()
    rows, left_out, rate = extract_set(backbone, config, out)
    write = write_npy if config.format == "npy" else write_array_record
    (out / "images.csv").unlink(missing_ok=True)  # never beside the features of another set
    files = [write(rows.features, out / f"features.{config.format}"), write_list(rows, out / "images.csv")]
    number, dim = rows.features.shape
    print(f"{number:,} images, {dim:,} numbers each, {len(left_out):,} undecodable")
    for path in files:
        print(f"{path.stat().st_size:>16,} bytes  {path}")
    return {
        "files": [str(path) for path in files],
        "settings": {**config.to_dict(), **image_size(backbone, config)},
        "images": number,
        "dim": dim,
        "undecodable": left_out,
        "seconds": round(time.monotonic() - start, 1),
        "images_per_second": rate,
    }


def extract_set(
    backbone: Backbone, config: ml_collections.ConfigDict, out: Path
) -> tuple[FeatureSet, list[str], float | None]:
    """Returns the features of config.source, the names of undecodable images, and the images per second.

    Features are cached in `out`/features; the rate is None if all were.
    """
    source = on_every_process(lambda: _opened(config), size=len)
    kind = _check_kind(backbone, config.pooling, config.blocks)
    feature_cache, start = cache_for(out, backbone, config, *kind), time.monotonic()
    apply_fn = reader(backbone.model, kind)
    table = extract_with_backbone(backbone, source, "images", make_mesh(), config, feature_cache, apply_fn)
    computed = feature_cache.computed
    rate = round(computed / (time.monotonic() - start), 1) if computed else None
    return describe(source, table), undecodable(source, table), rate


def _opened(config: ml_collections.ConfigDict) -> Source:
    if not config.source:
        raise UserError("--config.source is empty: set it to the images, such as folder:/data/photos")
    if config.batch_size < 1:
        raise UserError(f"batch_size {config.batch_size}: set --config.batch_size to 1 or more")
    return open_source(config.source)


def describe(source: Source, table: FeatureTable) -> FeatureSet:
    """Adds the names of images and classes to a table."""
    names = [source.name(i) for i in table.records.tolist()]
    known = source.class_names
    classes = ["" if label < 0 else known[label] if known else str(label) for label in table.labels.tolist()]
    return FeatureSet(table.features, table.records, table.labels, names, classes)


@cache  # the same object for the same model, so that a second call compiles nothing
def reader(model: Any, kind: Kind) -> Callable[..., Any]:
    """Returns an apply_fn (variables, normalized images [B, H, W, C]) -> float32 [B, D'] for this kind of features.

    For a convnet these are the pooled features. For a ViT, D' is `blocks` times the model's D, oldest block first, and
    "cls_mean" adds D (see `linear_heads.probe_features`).
    """

    def read(variables: Any, images: jax.Array) -> jax.Array:
        blocks: Any = model.apply(variables, images, kind.blocks, method="last_blocks")
        if kind.pooling == "mean":
            return jnp.concatenate([tokens.patches.mean(1, dtype=jnp.float32) for tokens in blocks], axis=1)
        return probe_features(blocks, kind)

    return read


def _check_kind(backbone: Backbone, pooling: str, blocks: int) -> Kind:
    depth = backbone.num_blocks
    if pooling not in POOLINGS:
        raise UserError(f"pooling {pooling!r} is unknown: set --config.pooling to {', '.join(POOLINGS)}")
    if not backbone.family.block_tokens and (pooling, blocks) != ("cls", 1):
        raise UserError(f"{backbone.config['arch']} pools one vector: leave --config.pooling=cls and --config.blocks=1")
    if not 1 <= blocks <= depth:
        raise UserError(f"blocks {blocks}: {backbone.config['arch']} has {depth}, set --config.blocks to 1..{depth}")
    return Kind(blocks, pooling)


# --- on Apache Beam --------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """What workers need to extract parts of a source. Paths must be the same on all machines."""

    checkpoint: str
    num_heads: int | None
    settings: str  # of the protocol, as JSON
    names: str  # `names_digest` of the source
    part: int  # images of a part, see `extraction.parts_of`
    out: Path


class Extractor(NamedTuple):
    """What a job makes of each part."""

    backbone: Backbone
    config: ml_collections.ConfigDict
    kind: Kind
    cache: FeatureCache


def extract_on_beam(
    checkpoint: str, num_heads: int | None, config: ml_collections.ConfigDict, out: Path, options: str
) -> None:
    """Extracts the features that are not in the cache of `out` on the workers of Beam, into that cache.

    `run` with the same settings then finds all of them. Raises UserError like `run` and `beam.pipeline`.
    """
    source = _opened(config)
    settings, names = json.dumps(config.to_dict()), names_digest(source)
    job = Job(checkpoint, num_heads, settings, names, extraction.PART, out.absolute())
    parts, feature_cache = extraction.parts_of(source, config.batch_size, job.part), _extractor(job).cache

    def missing() -> list[int]:
        return [number for number, records in enumerate(parts) if not _is_cached(source, records, feature_cache)]

    if wanted := missing():
        beam.for_each(partial(_extract_part, job=job), wanted, options)
        beam.require_results(len(wanted) - len(missing()), len(wanted), str(feature_cache.folder))


def _is_cached(source: Source, records: np.ndarray, feature_cache: FeatureCache) -> bool:
    return feature_cache.path(extraction.identities(source, records)).is_file()


def _extract_part(number: int, job: Job) -> None:
    """Extracts the features of a part on a worker, unless they are in the cache."""
    backbone, config, kind, feature_cache = _extractor(job)
    source = beam.reopened(config.source, job.names)
    records = extraction.parts_of(source, config.batch_size, job.part)[number]
    if _is_cached(source, records, feature_cache):
        return
    apply_fn, reading = reader(backbone.model, kind), extraction.reading_of(backbone, config)
    tables = extraction.extract_parts(
        apply_fn, backbone.variables, source, [records], f"part {number}", make_mesh(), cache=feature_cache, **reading
    )
    deque(tables, maxlen=0)


def _extractor(job: Job) -> Extractor:
    """Loads the backbone, once per process."""
    with _LOADING:  # some runners use several threads
        return _loaded(job)


@lru_cache(maxsize=1)
def _loaded(job: Job) -> Extractor:
    config = ml_collections.ConfigDict(json.loads(job.settings) | {"workers": 0})  # the worker is one of many itself
    with suppress(RuntimeError):  # JAX is in use: this is the process that started the pipeline
        set_cpu_device_count(config.batch_size)
    backbone = load_backbone(job.checkpoint, num_heads=job.num_heads)
    kind = _check_kind(backbone, config.pooling, config.blocks)
    return Extractor(backbone, config, kind, cache_for(job.out, backbone, config, *kind))


# --- files -----------------------------------------------------------------------------------------------------------


def write_npy(features: np.ndarray, path: Path) -> Path:
    """Writes float32 [N, D] atomically."""
    with atomic.file(path, WAY_OUT) as unfinished, unfinished.open("wb") as file:
        np.save(file, features)
    return path


def write_array_record(features: np.ndarray, path: Path) -> Path:
    """Writes a record per row: D float32 numbers, little-endian."""
    from array_record.python.array_record_module import ArrayRecordWriter

    with atomic.file(path, WAY_OUT) as unfinished, as_os_error():
        writer = ArrayRecordWriter(str(unfinished), "group_size:1")  # random access costs no more
        for row in features.astype("<f4"):
            writer.write(row.tobytes())
        writer.close()
    return path


def write_list(rows: FeatureSet, path: Path) -> Path:
    """Writes the list of images beside the features."""
    with (
        atomic.file(path, WAY_OUT) as unfinished,
        unfinished.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(("record", "name", "label", "class"))
        writer.writerows(zip(rows.records.tolist(), rows.names, rows.labels.tolist(), rows.classes, strict=True))
    return path


def read_set(path: Path) -> FeatureSet:
    """Opens a features.npy (memory-mapped) and the images.csv beside it. Raises UserError if either is damaged."""
    listed = path.with_name("images.csv")
    try:
        features = np.load(path, mmap_mode="r")
        with listed.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file))
        records, labels = (np.array([row[key] for row in rows], np.int32) for key in ("record", "label"))
        names, classes = ([row[key] for row in rows] for key in ("name", "class"))
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise UserError(
            f"{path} and {listed.name} beside it can't be read ({error}): write them with `dino-jax evaluate features`"
        ) from error
    if features.ndim != 2 or len(features) != len(rows):
        raise UserError(f"{path} is {features.shape}, but {listed.name} lists {len(rows)} images: write both again")
    return FeatureSet(features, records, labels, names, classes)
