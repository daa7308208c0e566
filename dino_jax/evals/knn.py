"""Weighted k-NN classification (Wu et al., CVPR 2018): the main measure of DINO features, without any training."""

import os
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh
from ml_collections.config_dict import placeholder

from dino_jax.data.sources import Source, open_source
from dino_jax.distributed.processes import on_every_process
from dino_jax.distributed.sharding import make_mesh
from dino_jax.errors import UserError
from dino_jax.evals.common.extraction import FeatureTable, cache_for, extract_with_backbone, image_size, l2_normalize
from dino_jax.evals.common.neighbors import nearest
from dino_jax.limits import COUNT, PIXELS, SEED, TEMPERATURE
from dino_jax.weights.backbone import Backbone

VOTES_CHUNK = 1024  # queries in a chunk of votes, float32 [queries, classes]
SPLITS = {"train", "training", "val", "valid", "validation", "test"}  # folders that are no classes


LIMITS = {
    "k": COUNT,
    "temperature": TEMPERATURE,
    "shots": COUNT,
    "draws": COUNT,
    "seed": SEED,
    "resize": PIXELS,
    "crop": PIXELS,
    "batch_size": COUNT,
    "workers": (0, 1_024),
}


def default_config() -> ml_collections.ConfigDict:
    """Every knob of `dino-jax evaluate knn`."""
    return ml_collections.ConfigDict(
        {
            "train": "",  # labeled source of neighbors (data/sources): folder:PATH, tfds:NAME, demo:train
            "test": "",  # labeled source of the images to classify
            "k": (10, 20, 100, 200),  # numbers of neighbors
            "temperature": 0.07,  # of the votes
            "shots": (1, 2, 5, 10),  # few-shot: numbers of images per class, drawn from the training images
            "draws": 5,  # random draws for each number of shots
            "seed": 0,  # of the draws
            "resize": placeholder(int),  # pixels of the shorter side; default: from the checkpoint's card
            "crop": placeholder(int),  # pixels of the center square; default: from the checkpoint's card
            "batch_size": 256,  # images, over all devices
            "workers": min(8, os.cpu_count() or 1),  # processes that read and decode images
        }
    )


class Bank(NamedTuple):
    """The images that vote: all training images (shots 0), or `shots` images per class."""

    shots: int
    k: int  # number of neighbors; 0: the nearest class mean instead of votes

    def __str__(self) -> str:
        name = f"k={self.k}" if self.k else "class_means"
        return f"{name} shots={self.shots}" if self.shots else name


def run(backbone: Backbone, config: ml_collections.ConfigDict, out: Path) -> dict[str, Any]:
    """Classifies the test images by their neighbors among the training images and prints a table.

    Besides the votes of the k nearest images, images are classified by the nearest class mean (of L2-normalized
    features). Few-shot figures are the mean and the sample standard deviation over draws. There, k is at most the size
    of the bank, and a class with fewer images contributes all it has. A number of shots that covers the largest class
    is skipped, because it equals the full bank. Features are cached in `out`/features, so that a second run with other
    settings of the votes takes seconds.

    Returns:
        The content of results.json: {"figures": {"k=10": {"top1", "top5"}, ..., "class_means", "k=5 shots=5": {"top1",
        "top5", "top1_std", "top5_std"}, ...}, "settings", "images", "undecodable", "seconds", "images_per_second" (of
        reading and extraction; None if all features were cached)}.

    Raises:
        UserError: a source is missing or has no labels, the classes of the two differ, or k exceeds the images.
    """
    train, test = (labeled_source(config[split], split) for split in ("train", "test"))
    check_classes(train, test)
    _check_votes(config.k, config.temperature, len(train))
    for key in ("batch_size", "draws"):
        if config[key] < 1:
            raise UserError(f"{key} {config[key]}: set --config.{key} to 1 or more")
    if not all(isinstance(shots, int) and shots > 0 for shots in config.shots):
        raise UserError(f"shots is {config.shots}: set --config.shots to numbers of images per class, like 1,5")
    start, mesh, cache = time.monotonic(), make_mesh(), cache_for(out, backbone, config)
    bank, queries = (
        extract_with_backbone(backbone, source, split, mesh, config, cache)
        for source, split in ((train, "train"), (test, "test"))
    )
    extracting = time.monotonic() - start
    figures = classify(bank, queries, config, train.num_classes, mesh)
    images = {"train": len(bank.labels), "test": len(queries.labels)}
    print(
        f"{images['train']:,} training and {images['test']:,} test images, {train.num_classes} classes, percent right"
        f" (few shots: mean and deviation of {config.draws} draws)\n" + table(figures)
    )
    return {
        "figures": {str(bank): figure for bank, figure in figures.items()},
        "settings": {**config.to_dict(), **image_size(backbone, config)},
        "images": images,
        "undecodable": {"train": len(train) - images["train"], "test": len(test) - images["test"]},
        "seconds": round(time.monotonic() - start, 1),
        "images_per_second": round(cache.computed / extracting, 1) if cache.computed else None,
    }


def classify(
    bank: FeatureTable, queries: FeatureTable, config: ml_collections.ConfigDict, num_classes: int, mesh: Mesh
) -> dict[Bank, dict[str, float]]:
    """Computes the figures of `run` from features."""

    def accuracies(chosen: Any, shots: int) -> dict[Bank, np.ndarray]:
        rows, labels = bank.features[chosen], bank.labels[chosen]
        votes = dict.fromkeys(min(k, len(labels)) for k in config.k)
        arguments = queries.features, queries.labels, tuple(votes), config.temperature, num_classes, mesh
        found = {Bank(shots, k): np.array(x) for k, x in knn_accuracy(rows, labels, *arguments).items()}
        means, classes = class_means(rows, labels)
        places = nearest(means, queries.features, min(5, len(classes)), mesh)[1]
        return found | {Bank(shots, 0): np.array(_accuracy(classes[places], queries.labels))}

    figures = {
        which: {"top1": float(top1), "top5": float(top5)} for which, (top1, top5) in accuracies(slice(None), 0).items()
    }
    largest = np.bincount(bank.labels).max()
    for shots in (shots for shots in config.shots if shots < largest):
        rng = np.random.default_rng((config.seed, shots))
        draws = [accuracies(few_shots(bank.labels, shots, rng), shots) for _ in range(config.draws)]
        for which in draws[0]:
            each = np.stack([draw[which] for draw in draws])
            spread = each.std(0, ddof=1) if len(draws) > 1 else np.zeros(2)
            numbers = *each.mean(0), *spread
            figures[which] = dict(zip(("top1", "top5", "top1_std", "top5_std"), map(float, numbers), strict=True))
    return figures


def table(figures: dict[Bank, dict[str, float]]) -> str:
    """Formats the figures as a table."""
    lines = [f"{'bank':>12} {'k':>12} {'top-1':>16} {'top-5':>16}"]
    for which, figure in figures.items():
        cells = [f"{which.shots} a class" if which.shots else "all", str(which.k) if which.k else "class means"]
        line = "".join(f"{cell:>12} " for cell in cells)
        for key in ("top1", "top5"):
            deviation = f" +- {figure[f'{key}_std']:5.2f}" if which.shots else " " * 9
            line += f"{figure[key]:7.2f}{deviation} "
        lines.append(line.rstrip())
    return "\n".join(lines)


def few_shots(labels: np.ndarray, shots: int, rng: np.random.Generator) -> np.ndarray:
    """Draws `shots` rows of each class at random (all rows of a smaller class) and returns them in ascending order."""
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    ordered = labels[order]
    place = np.arange(len(order)) - np.searchsorted(ordered, ordered)  # within its class
    return np.sort(order[place < shots])


def class_means(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean L2-normalized features of each class, float32 [c, D], and the classes that occur, int [c]."""
    classes, inverse = np.unique(labels, return_inverse=True)
    sums = np.zeros((len(classes), features.shape[1]))
    for start in range(0, len(features), 65536):
        rows = slice(start, start + 65536)
        np.add.at(sums, inverse[rows], l2_normalize(features[rows]))
    return (sums / np.bincount(inverse)[:, None]).astype(np.float32), classes


def labeled_source(spec: str, split: str, several: bool = False) -> Source:
    """Opens the source of --config.SPLIT. Raises UserError if it is missing or has no labels.

    several: whether images may have any number of classes.
    """
    if not spec:
        raise UserError(f"--config.{split} is empty: set it to a labeled source such as folder:/data/{split}")
    source = on_every_process(lambda: open_source(spec), size=len)
    if source.label_sets is not None and not several:
        raise UserError(f"--config.{split}={spec} has several labels an image: use `dino-jax evaluate linear` for them")
    if not source.num_classes and source.label_sets is None:
        raise UserError(f"--config.{split}={spec} has no labels to compare with: use class folders or a labeled set")
    return source


def check_classes(train: Source, test: Source) -> None:
    """Raises UserError unless both sources have the same classes, at least two, that are not the splits of a data set.

    Labels are indices of classes. If the class folders differed, an index would mean different classes.
    """
    if train.class_names and SPLITS.issuperset(train.class_names):
        splits = ", ".join(train.class_names)
        raise UserError(f"the class folders are {splits}, the splits of a data set: give one of them as the source")
    if train.num_classes == 1:
        raise UserError("the training source has a single class, so every answer would be right: give a folder a class")
    names = [set(source.class_names) for source in (train, test)]
    if all(names) and names[0] != names[1]:
        odd = sorted(names[0] ^ names[1])
        raise UserError(
            f"the training and the test source have different class folders ({len(odd)} are only in one, such as "
            f"{odd[0]!r}): give both the same"
        )
    several = train.label_sets is not None or test.label_sets is not None
    if train.num_classes != test.num_classes and not several:
        raise UserError(
            f"training source with {train.num_classes} classes, test source with {test.num_classes}: give both the same"
        )


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
    """Returns {k: (top1, top5)}, the accuracies in percent. top5 counts hits among the first min(5, k, num_classes).

    Arguments and errors as in `knn_predict`; test_labels int [T].
    """
    predicted = knn_predict(train_features, train_labels, test_features, ks, temperature, num_classes, mesh)
    return {k: _accuracy(classes, test_labels) for k, classes in predicted.items()}


def _accuracy(ranked: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Returns the percentage of rows of classes, [T, c], that start with the label, and that contain it."""
    hits = ranked == np.asarray(labels)[:, None]
    return 100 * float(hits[:, 0].mean()), 100 * float(hits.any(1).mean())


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

    A neighbor votes for its class with weight exp(cosine similarity / temperature), see `class_votes`. Ties go to the
    lower row and the lower class. Memory does not grow with T * N: see `nearest`.

    Args:
        train_features: float [N, D], not necessarily normalized, the same on every process.
        train_labels: int [N], each in 0..num_classes-1.
        test_features: float [T, D], not necessarily normalized, the same on every process.
        ks: numbers of neighbors.
        temperature: small values give the nearest neighbors more weight.
        num_classes: number of classes; the largest training label + 1 by default.
        mesh: devices to use; all by default.

    Returns:
        {k: int32 [T, min(5, k, num_classes)], the best class first}. The official code counts hits among the same.

    Raises:
        UserError: a k is not a whole number in 1..N, the temperature not above 0, or a training row without a class.
    """
    train_labels = np.asarray(train_labels, np.int32)
    num_classes = num_classes or int(train_labels.max()) + 1
    if train_labels.min() < 0 or train_labels.max() >= num_classes:
        raise UserError(f"k-NN needs a class in 0..{num_classes - 1} for every training image: give a labeled source")
    _check_votes(ks, temperature, len(train_labels))
    similarity, row = nearest(train_features, test_features, max(ks), mesh)
    classes, chunk = train_labels[row], min(VOTES_CHUNK, len(row))
    ranked: dict[int, list[np.ndarray]] = {k: [] for k in ks}
    for start in range(0, len(row), chunk):
        # The last chunk overlaps the previous one, so that one compiled program serves all.
        part = slice(min(start, len(row) - chunk), None)
        for k in ks:
            votes = class_votes(similarity[part][:chunk], classes[part][:chunk], k, temperature, num_classes)
            ranked[k].append(np.asarray(_best(votes, min(5, k)))[start - part.start :])
    return {k: np.concatenate(parts) for k, parts in ranked.items()}


def _check_votes(ks: tuple[int, ...], temperature: float, rows: int) -> None:
    if temperature <= 0:
        raise UserError(f"k-NN temperature {temperature}: set --config.temperature above 0")
    for k in ks:
        if not isinstance(k, int) or not 1 <= k <= rows:
            raise UserError(
                f"k={k} neighbors of {rows} training images: set --config.k (in training: --config.evals.knn.k) to "
                f"whole numbers from 1 to {rows}"
            )


@partial(jax.jit, static_argnames=("k", "num_classes"))
def class_votes(similarity: jax.Array, classes: jax.Array, k: int, temperature: Any, num_classes: int) -> jax.Array:
    """Returns the share of each class in the votes of the first k neighbors, float32 [t, num_classes].

    Weights are the softmax of cosine similarity / temperature over all n given neighbors, as in DINOv2's code, so that
    a row sums to 1 only for k = n. DINO's weights, exp(similarity / temperature), differ by a factor for each query.

    similarity, classes: [t, n], best first.
    """
    weight = jax.nn.softmax(similarity / temperature, axis=1)[:, :k]
    rows = jnp.arange(len(similarity))[:, None]
    return jnp.zeros((len(similarity), num_classes)).at[rows, classes[:, :k]].add(weight)


@partial(jax.jit, static_argnames="most")
def _best(votes: jax.Array, most: int) -> jax.Array:
    """Returns the classes with most votes, int32 [t, min(most, classes)], the best first."""
    return jax.lax.top_k(votes, min(most, votes.shape[1]))[1]
