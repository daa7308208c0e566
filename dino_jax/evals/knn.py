"""Weighted nearest neighbours (Wu et al., CVPR 2018), the measure that needs no training: DINO's first figure."""

import os
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections.config_dict import placeholder

from dino_jax.backbone import Backbone
from dino_jax.data.sources import Source, open_source
from dino_jax.errors import UserError
from dino_jax.evals.features import tabulate
from dino_jax.sharding import AXES, BATCH, REPLICATED, make_mesh, replicate

# Chunks bound the memory of a step: similarities are [QUERY_CHUNK, BANK_CHUNK] float32 on a device.
QUERY_CHUNK = 1024
BANK_CHUNK = 8192


def default_config() -> ml_collections.ConfigDict:
    """Every knob of `python evaluate.py knn`."""
    return ml_collections.ConfigDict(
        {
            "train": "",  # labelled source of the neighbours (data/sources.py): folder:PATH, tfds:NAME, demo:train
            "test": "",  # labelled source of the images to classify
            "k": (10, 20, 100, 200),  # numbers of neighbours
            "temperature": 0.07,  # of the votes
            "resize": placeholder(int),  # pixels of the shorter side; as in the checkpoint's card unless set
            "crop": placeholder(int),  # pixels of the centre square; as in the checkpoint's card unless set
            "batch_size": 256,  # images, over all devices
            "workers": min(8, os.cpu_count() or 1),  # processes that read and decode images
        }
    )


def run(backbone: Backbone, config: ml_collections.ConfigDict, out: Path) -> dict:
    """Classifies the test images by their neighbours among the training images and prints a table.

    Returns what belongs into results.json: {"figures": {"k=10": {"top1", "top5"}, ...}, "settings", "images",
    "seconds", "images_per_second"} (the rate is that of feature extraction). Nothing is written to `out`.

    Raises:
        UserError: a source is missing, has no labels or not the same classes as the other, or k exceeds its images.
    """
    train, test = (_labelled(config[split], split) for split in ("train", "test"))
    check_classes(train, test)
    _check_votes(config.k, config.temperature, len(train))
    if config.batch_size < 1:
        raise UserError(f"batch_size {config.batch_size}: set --config.batch_size to 1 or more")
    start, mesh, as_trained = time.monotonic(), make_mesh(), backbone.card["preprocessing"]
    bank, queries = (
        tabulate(
            backbone.model.apply,
            backbone.variables,
            source,
            split,
            mesh,
            batch_size=config.batch_size,
            channels=backbone.config["in_channels"],
            mean=as_trained["mean"],
            std=as_trained["std"],
            workers=config.workers,
            **_image_size(backbone, config),
        )
        for source, split in ((train, "train"), (test, "test"))
    )
    extracted = time.monotonic()
    rows = bank.features, bank.labels, queries.features, queries.labels
    accuracy = knn_accuracy(*rows, config.k, config.temperature, train.num_classes, mesh)
    images = {"train": len(bank.labels), "test": len(queries.labels)}
    print(
        f"{images['train']:,} training and {images['test']:,} test images, {train.num_classes} classes, percent right:"
    )
    print(f"{'k':>6} {'top-1':>7} {'top-5':>7}")
    for k, (top1, top5) in accuracy.items():
        print(f"{k:>6} {top1:7.2f} {top5:7.2f}")
    return {
        "figures": {f"k={k}": {"top1": top1, "top5": top5} for k, (top1, top5) in accuracy.items()},
        "settings": {**config.to_dict(), **_image_size(backbone, config)},
        "images": images,
        "undecodable": {"train": len(train) - images["train"], "test": len(test) - images["test"]},
        "seconds": round(time.monotonic() - start, 1),
        "images_per_second": round(sum(images.values()) / (extracted - start), 1),
    }


def _labelled(spec: str, split: str) -> Source:
    if not spec:
        raise UserError(f"--config.{split} is empty: set it to a labelled source such as folder:/data/{split}")
    source = open_source(spec)
    if not source.num_classes:
        raise UserError(f"--config.{split}={spec} has no labels, which k-NN needs: use class folders or a labelled set")
    return source


def check_classes(train: Source, test: Source) -> None:
    """Raises UserError unless both have the same classes.

    Labels are numbers: with other folders on one side the same number would mean another class.
    """
    names = [set(getattr(source, "class_names", ())) for source in (train, test)]
    if all(names) and names[0] != names[1]:
        odd = sorted(names[0] ^ names[1])
        raise UserError(
            f"the training and the test source have different class folders ({len(odd)} are only in one, such as "
            f"{odd[0]!r}): give both the same"
        )
    if train.num_classes != test.num_classes:
        raise UserError(
            f"training source with {train.num_classes} classes, test source with {test.num_classes}: give both the same"
        )


def _image_size(backbone: Backbone, config: ml_collections.ConfigDict) -> dict[str, int]:
    return {key: config[key] or backbone.card["preprocessing"][key] for key in ("resize", "crop")}


def knn_accuracy(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    ks: tuple[int, ...] = (10, 20, 100, 200),
    temperature: float = 0.07,
    num_classes: int | None = None,
    mesh: Mesh | None = None,
) -> dict[int, tuple[float, float]]:
    """Percent of the test rows whose class is voted first, and among the first five (or all, if there are fewer).

    Arguments and errors as in `knn_predict`; test_labels int [T]. Returns {k: (top1, top5)}.
    """
    predicted = knn_predict(train_features, train_labels, test_features, ks, temperature, num_classes, mesh)
    hits = {k: classes == np.asarray(test_labels)[:, None] for k, classes in predicted.items()}
    return {k: (100 * float(hit[:, 0].mean()), 100 * float(hit.any(1).mean())) for k, hit in hits.items()}


def knn_predict(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    ks: tuple[int, ...] = (10, 20, 100, 200),
    temperature: float = 0.07,
    num_classes: int | None = None,
    mesh: Mesh | None = None,
) -> dict[int, np.ndarray]:
    """Ranks the classes of each test row by the votes of its k nearest training rows.

    A neighbour votes exp(cosine similarity / temperature) for its class. Equal similarities and equal votes go to the
    lower row and class. The bank is split over the devices of the mesh; memory does not grow with test x train.

    Args:
        train_features: float [N, D], any length (they are L2-normalised here), the same on every process.
        train_labels: int [N], each in 0..num_classes-1.
        test_features: float [T, D], any length, the same on every process.
        ks: numbers of neighbours.
        temperature: the smaller, the more the nearest decide.
        num_classes: number of classes; the largest training label + 1 by default.
        mesh: devices to use; all by default.

    Returns:
        {k: int32 [T, min(5, num_classes)], the best class first}.

    Raises:
        UserError: a k is not a whole number in 1..N, the temperature not above 0, or a training row without a class.
    """
    train_labels = np.asarray(train_labels, np.int32)
    num_classes = num_classes or int(train_labels.max()) + 1
    if train_labels.min() < 0 or train_labels.max() >= num_classes:
        raise UserError(f"k-NN needs a class in 0..{num_classes - 1} for every training image: give a labelled source")
    _check_votes(ks, temperature, len(train_labels))
    mesh = make_mesh() if mesh is None else mesh
    bank = _normalise(_place_bank(np.asarray(train_features, np.float32), mesh))
    labels = replicate(train_labels, mesh)
    chunk = min(QUERY_CHUNK, -(-len(test_features) // mesh.size) * mesh.size)
    chunk = -(-chunk // mesh.size) * mesh.size
    ranked = []
    for start in range(0, len(test_features), chunk):
        queries = np.asarray(test_features[start : start + chunk], np.float32)
        queries = replicate(np.pad(queries, ((0, chunk - len(queries)), (0, 0))), mesh)
        ranked.append(_rank(bank, labels, queries, temperature, tuple(ks), num_classes, mesh))
    classes = np.concatenate([np.asarray(x) for x in ranked], axis=1)[:, : len(test_features)]
    return dict(zip(ks, classes, strict=True))


def _check_votes(ks: tuple[int, ...], temperature: float, rows: int) -> None:
    if temperature <= 0:
        raise UserError(f"k-NN temperature {temperature}: set --config.temperature above 0")
    for k in ks:
        if not isinstance(k, int) or not 1 <= k <= rows:
            raise UserError(
                f"k={k} neighbours of {rows} training images: set --config.k (in training: --config.eval.k) to whole "
                f"numbers from 1 to {rows}"
            )


def _place_bank(features: np.ndarray, mesh: Mesh) -> jax.Array:
    """[N, D] -> [devices * chunks, chunk, D] split over the devices in order, zero rows at the end."""
    chunk = min(BANK_CHUNK, -(-len(features) // mesh.size))
    chunks = -(-len(features) // (chunk * mesh.size)) * mesh.size

    def block(index):
        first, last, _ = index[0].indices(chunks)
        rows = features[first * chunk : last * chunk]
        padding = (last - first) * chunk - len(rows)
        return np.pad(rows, ((0, padding), (0, 0))).reshape(last - first, chunk, -1)

    return jax.make_array_from_callback((chunks, chunk, features.shape[1]), NamedSharding(mesh, BATCH), block)


@jax.jit
def _normalise(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


@partial(jax.jit, static_argnames=("ks", "num_classes", "mesh"))
def _rank(bank, labels, queries, temperature, ks, num_classes, mesh):
    """bank [chunks, chunk, D] split over devices, queries [t, D] on each -> int32 [len(ks), t, min(5, num_classes)]."""

    def on_device(bank, labels, queries, temperature):
        similarity, row = _nearest(bank, _normalise(queries), max(ks), len(labels))
        # Each device gets all candidates of its share of the queries: [t, k] -> [t / devices, devices * k].
        exchange = partial(jax.lax.all_to_all, axis_name=AXES, split_axis=0, concat_axis=1, tiled=True)
        similarity, row = _top(exchange(similarity), exchange(row), max(ks))
        return jnp.stack([_vote(similarity[:, :k], labels[row[:, :k]], temperature, num_classes) for k in ks])

    ranked = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(BATCH, REPLICATED, REPLICATED, REPLICATED),
        out_specs=jax.P(None, AXES),
        check_vma=False,
    )(bank, labels, queries, temperature)
    # A few numbers a query: whole on every device, so that every process can read them.
    return jax.lax.with_sharding_constraint(ranked, NamedSharding(mesh, REPLICATED))


def _nearest(bank: jax.Array, queries: jax.Array, k: int, rows: int) -> tuple[jax.Array, jax.Array]:
    """This device's chunks of the bank -> similarity [t, k] and row in the bank [t, k] of the nearest, best first."""
    chunks, chunk, _ = bank.shape
    starts = (jax.lax.axis_index(AXES) * chunks + jnp.arange(chunks)) * chunk

    def merge(best, block):
        vectors, start = block
        row = start + jnp.arange(chunk)
        similarity = jnp.matmul(queries, vectors.T, precision=jax.lax.Precision.HIGHEST)
        similarity = jnp.where(row < rows, similarity, -jnp.inf)
        joined = jnp.concatenate([best[0], similarity], 1)
        joined_rows = jnp.concatenate([best[1], jnp.broadcast_to(row, similarity.shape)], 1)
        return _top(joined, joined_rows, k), None

    none = jnp.full((len(queries), k), -jnp.inf), jnp.zeros((len(queries), k), jnp.int32)
    return jax.lax.scan(merge, none, (bank, starts))[0]


def _top(similarity: jax.Array, row: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    similarity, place = jax.lax.top_k(similarity, k)
    return similarity, jnp.take_along_axis(row, place, axis=1)


def _vote(similarity: jax.Array, classes: jax.Array, temperature: jax.Array, num_classes: int) -> jax.Array:
    """similarity and classes [t, k], best first -> the classes with most votes, int32 [t, min(5, num_classes)]."""
    # Relative to the best: the same order as exp(similarity / temperature), without overflow at any temperature.
    weight = jnp.exp((similarity - similarity[:, :1]) / temperature)
    votes = jnp.zeros((len(similarity), num_classes)).at[jnp.arange(len(similarity))[:, None], classes].add(weight)
    return jax.lax.top_k(votes, min(5, num_classes))[1]
