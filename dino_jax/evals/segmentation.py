"""Semantic segmentation: classifies each pixel by frozen patch features, with a linear layer and nearest neighbors.

    dino-jax evaluate segmentation --checkpoint=runs/a --config.data=VOCdevkit/VOC2012
    dino-jax evaluate segmentation --checkpoint=runs/a --config.data=ADEChallengeData2016
    dino-jax evaluate segmentation --checkpoint=runs/a --config.data=FOLDER  # with images/ and masks/

The linear layer is that of DINOv2 (section 7.4 of its paper): batch norm and a linear layer on the patch tokens of the
last block, logits upsampled to the image, cross-entropy, AdamW, 40,000 batches of 16 crops of 512 pixels, sliding
windows for validation. We chose the rest, see docs/evaluation.md.
"""

import dataclasses
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dino_jax.data.pixels import to_rgb
from dino_jax.distributed.sharding import distribute, make_mesh, replicate, shard_batch
from dino_jax.errors import UserError
from dino_jax.evals.common.feature_cache import FeatureCache, fingerprint
from dino_jax.evals.common.images import contact_sheet
from dino_jax.evals.common.label_maps import CLASS_COLORS, VOID_COLOR
from dino_jax.evals.common.segmentation_data import (
    VOID,
    Classes,
    Example,
    Pair,
    drawn,
    find_classes,
    find_pairs,
    random_crop,
    read_ahead,
    read_example,
    resize_classes,
)
from dino_jax.evals.common.segmentation_heads import (
    Bank,
    Head,
    Probe,
    ProbeState,
    Rows,
    confusion,
    features_of,
    init_state,
    intersection_over_union,
    knn_scores,
    linear_scores,
    make_probe,
    patch_classes,
    pixel_accuracy,
    train_step,
)
from dino_jax.evals.common.sliding_windows import Windows, classes_of_pixels, cut, map_windows
from dino_jax.limits import COUNT, COUNT_OR_NONE, FACTOR, PIXELS, SEED, SHARE, TEMPERATURE, Above
from dino_jax.progress import progress
from dino_jax.provenance import plain
from dino_jax.weights.backbone import Backbone

SAVE_EVERY = 1_000  # steps
# Settings on which the linear layer does not depend.
OF_VALIDATION = ("data", "overlap", "k", "temperature", "bank", "rows", "workers")
TILE = 240  # pixels of the longer side of an image in the picture

Scores = Callable[[jax.Array], jax.Array]  # features of patches [B, h, w, D] -> [B, h, w, C]


LIMITS = {
    "ignore": (-1, 255),
    "val_share": SHARE,
    "size": PIXELS,
    "blocks": COUNT,
    "steps": COUNT,
    "batch_size": COUNT,
    "lr": Above(0, 1e9),
    "warmup": SHARE,
    "weight_decay": FACTOR,
    "scale": Above(0, 100),
    "flip": SHARE,
    "overlap": (0, 0.9),
    "k": COUNT_OR_NONE,
    "temperature": TEMPERATURE,
    "bank": COUNT,
    "rows": COUNT_OR_NONE,
    "seed": SEED,
    "workers": (0, 1_024),
}


def default_config() -> ConfigDict:
    """Every knob of `dino-jax evaluate segmentation`."""
    return ConfigDict(
        {
            # Folder of VOC 2012 (with SegmentationClass), of ADE20K (with annotations), or with images/NAME.jpg and
            # masks/NAME.png, both of which may have folders train and val.
            "data": "",
            # Label of pixels that do not count, -1 for none. Default: 0 for ADE20K, else 255.
            "ignore": placeholder(int),
            "val_share": 0.2,  # share of the images for validation, in a folder without train and val
            "size": 512,  # pixels of crops and windows, rounded down to whole patches
            "blocks": 1,  # concatenate the patch tokens of this many last blocks, at most all
            "steps": 40_000,  # batches for the linear layer
            "batch_size": 16,  # crops, over all devices
            "lr": 1e-3,  # largest learning rate of the linear layer (AdamW)
            "warmup": 0.0375,  # share of the steps in which the rate rises; then it falls linearly to 0
            "weight_decay": 1e-4,  # of the linear layer
            "batch_norm": True,  # normalize the features before the linear layer
            "scale": (0.5, 2.0),  # of training crops: the image's shorter side is this times `size`
            "flip": 0.5,  # probability
            "overlap": 1 / 3,  # share of a window that the next one covers as well, at validation
            "k": 20,  # number of neighbors among training patches; 0 leaves k-NN out
            "temperature": 0.07,  # of their votes
            "bank": 100_000,  # number of training patches that vote
            "rows": 12,  # number of images in the picture
            "seed": 0,  # of initial weights, order, crops, the bank and the division into training and validation
            "workers": min(8, os.cpu_count() or 1),  # threads that read and decode images
        }
    )


class Setup(NamedTuple):
    """What training and validation share."""

    backbone: Backbone
    config: ConfigDict
    classes: Classes
    crop: int  # `size` in whole patches, pixels
    mesh: Mesh  # of this process
    probe: Probe

    def read(self, pair: Pair) -> Example:
        """Reads an image and its mask."""
        return read_example(pair, self.backbone.pixels, self.classes)

    def features(self, backbone: Backbone, images: jax.Array) -> jax.Array:
        """Normalized windows -> features of patches, [B, h, w, D]. `backbone` may be a copy on other devices."""
        return features_of(backbone.model, backbone.variables, images, self.probe.blocks)


def run(backbone: Backbone, config: ConfigDict, out: Path) -> dict[str, Any]:
    """Trains the linear layer, classifies the pixels of the validation images, prints a table and draws some of them.

    segmentation.png has a row for each of `rows` images: the image, the truth and each prediction. The confusion matrix
    is summed over all images at their full size. The linear layer is saved every thousand steps, and kept with the bank
    in `out`/features: an interrupted training goes on, and other settings of votes and windows only need validation.

    Returns:
        The content of results.json: {"figures": {"linear": {"mIoU", "pixel_accuracy"}, "knn": the same}, "classes":
        {label: {"linear": IoU, "knn": IoU}} (None: no pixel has the class, and none is predicted to have it), "loss"
        (mean of the last tenth of the steps), "settings", "images", "seconds", "images_per_second"}. Figures are in
        percent; the rate is of validation.

    Raises:
        UserError: the layout is unknown, a mask is missing, unreadable or of another size than its image; there are
            fewer than two classes; a setting is invalid; or training diverges.
    """
    start = time.monotonic()
    check_settings(config, (mesh := make_mesh().local_mesh).size)
    crop = crop_size(backbone, config.size)
    splits = find_pairs(config.data, config.val_share, config.seed)
    ignored = splits.ignored if config.ignore is None else config.ignore
    classes = find_classes(splits, ignored, backbone.pixels, config.workers)
    count = len(classes.labels)
    setup = Setup(backbone, config, classes, crop, mesh, make_probe(backbone, config, count))
    cache = cache_for(setup, splits.train, out)
    head, loss = fit(setup, splits.train, cache)
    methods: dict[str, Scores] = {"linear": partial(linear_scores, head)}
    if config.k:
        bank = replicate(kept_bank(setup, splits.train, cache), mesh)
        methods["knn"] = partial(knn_scores, bank, k=config.k, temperature=config.temperature, num_classes=count)
    validating = time.monotonic()
    counts, rows = validate(setup, splits.val, methods)
    seconds = time.monotonic() - validating
    if rows:
        contact_sheet(rows, out / "segmentation.png", tile=TILE)
    figures, by_class = summary(counts, classes)
    print(f"{len(splits.train):,} training and {len(splits.val):,} validation images, {count} classes")
    print(table(figures))
    return {
        "figures": figures,
        "classes": by_class,
        "loss": loss,
        "settings": {**config.to_dict(), "ignore": ignored, "size": setup.crop},
        "images": {"train": len(splits.train), "val": len(splits.val)},
        "seconds": round(time.monotonic() - start, 1),
        "images_per_second": round(len(splits.val) / seconds, 2),
    }


def crop_size(backbone: Backbone, size: int) -> int:
    """Rounds `size` down to whole patches. Raises UserError if it is smaller than one."""
    patch = backbone.patch_size or 1
    if size < patch:
        raise UserError(f"size {size} is smaller than a patch of {patch} pixels: set --config.size to {patch} or more")
    return size // patch * patch


def check_settings(config: ConfigDict, devices: int) -> None:
    """Raises UserError for settings that do not fit together or the number of devices."""
    if config.batch_size % devices:
        raise UserError(
            f"batch_size {config.batch_size} does not divide over {devices} devices: "
            f"set --config.batch_size to {-(-config.batch_size // devices) * devices}"
        )
    if len(config.scale) != 2 or not 0 < config.scale[0] <= config.scale[1]:
        raise UserError(f"scale is {config.scale}: set --config.scale to a smaller and a larger factor, like 0.5,2.0")
    if config.k > config.bank:
        raise UserError(f"k {config.k} is more than bank {config.bank}: set --config.bank to {config.k} or more")


# --- training --------------------------------------------------------------------------------------------------------


def cache_for(setup: Setup, pairs: list[Pair], out: Path) -> FeatureCache:
    """Returns the cache of what is computed from the training images: the linear layer and the bank."""
    settings = {key: value for key, value in plain(setup.config).items() if key not in OF_VALIDATION}
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for pair in pairs for path in pair]
    key = fingerprint(setup.backbone, settings, setup.crop, setup.classes.labels.tolist(), files)
    return FeatureCache(out / "features", key)


def fit(setup: Setup, pairs: list[Pair], cache: FeatureCache) -> tuple[Head, float]:
    """Trains the linear layer; returns it, replicated, and the mean loss of the last tenth of the steps.

    Raises UserError if the loss is not finite.
    """
    config, probe = setup.config, setup.probe
    state = init_state(probe, jax.device_get(setup.backbone.variables), setup.crop, config.seed)
    state, losses = _load(jax.device_get(state), cache)
    state = replicate(state, setup.mesh)
    step = distribute(partial(train_step, probe), setup.mesh)
    start = len(losses)
    for rows in progress(_batches(setup, pairs, start), config.steps - start, "training", "steps"):
        state, loss = step(state, shard_batch(rows, setup.mesh))
        losses.append(loss)
        jax.block_until_ready(losses[-2:-1])  # at most one batch ahead of the devices: batches are large
        if len(losses) % SAVE_EVERY == 0 or len(losses) == config.steps:
            losses = jax.device_get(losses)
            _save(state, losses, cache)
    last = float(np.mean(losses[-max(1, config.steps // 10) :]))
    if not math.isfinite(last):
        raise UserError(f"the loss of the linear layer is {last}: set --config.lr below {config.lr}")
    return state.head, last


def _save(state: ProbeState, losses: list[Any], cache: FeatureCache) -> None:
    leaves = jax.tree.leaves(jax.device_get(dataclasses.replace(state, variables={})))
    cache.save(["linear"], losses=np.array(losses, np.float32), **{str(i): leaf for i, leaf in enumerate(leaves)})


def _load(state: ProbeState, cache: FeatureCache) -> tuple[ProbeState, list[Any]]:
    """Returns the saved state and the losses of its steps; `state` and none if there is nothing to go on from."""
    saved = cache.read(["linear"])
    if saved is None:
        return state, []
    losses = list(saved.pop("losses"))
    leaves = [saved[str(i)] for i in range(len(saved))]
    found = jax.tree.unflatten(jax.tree.structure(dataclasses.replace(state, variables={})), leaves)
    print(
        f"the linear layer after {len(losses):,} steps is from {cache.folder}: remove it to start over", file=sys.stderr
    )
    return dataclasses.replace(found, variables=state.variables), losses


def _batches(setup: Setup, pairs: list[Pair], start: int) -> Iterator[Rows]:
    """Yields the batches from step `start` on. A crop depends on the seed and its position in the order only."""
    config = setup.config

    def crop(position: int) -> Example:
        record, rng = drawn(position, len(pairs), config.seed)
        return random_crop(setup.read(pairs[record]), setup.crop, config.scale, config.flip, rng)

    crops = read_ahead(crop, range(start * config.batch_size, config.steps * config.batch_size), config.workers)
    for _ in range(start, config.steps):
        batch = list(itertools.islice(crops, config.batch_size))
        yield Rows(*(np.stack(x) for x in zip(*batch, strict=True)))


def kept_bank(setup: Setup, pairs: list[Pair], cache: FeatureCache) -> Bank:
    """Returns the patches of `collect_bank`, from the cache if they are there. UserError if there are fewer than k."""
    saved = cache.read(name := ["bank", str(setup.config.bank)])
    bank = Bank(**saved) if saved is not None else collect_bank(setup, pairs)
    if saved is None:
        cache.save(name, **bank._asdict())
    if len(bank.classes) < setup.config.k:
        raise UserError(
            f"the training images have {len(bank.classes)} patches with a class: set --config.k to that or less"
        )
    return bank


def collect_bank(setup: Setup, pairs: list[Pair]) -> Bank:
    """Draws patches of the training images, as many of each, with their most frequent class.

    Patches without a class do not vote.
    """
    config, share = setup.config, -(-setup.config.bank // len(pairs))
    found: list[Bank] = []
    images = progress(read_ahead(setup.read, pairs, config.workers), len(pairs), "bank")
    mapped = map_windows(images, setup.crop, 0.0, setup.features, setup.backbone)
    for number, (example, windows, features) in enumerate(mapped):
        scaled = resize_classes(example.classes, *windows.size)
        classes = np.stack(
            [patch_classes(one, features.shape[1:3], setup.probe.num_classes) for one in cut(scaled, windows)]
        ).ravel()
        rows = np.flatnonzero(classes != VOID)
        rng = np.random.default_rng((config.seed, 2, number))
        rows = np.sort(rng.permutation(rows)[:share])
        found.append(Bank(features.reshape(len(classes), -1)[rows], classes[rows].astype(np.int32)))
    bank = Bank(*(np.concatenate(x) for x in zip(*found, strict=True)))
    chosen = np.sort(np.random.default_rng((config.seed, 3)).permutation(len(bank.classes))[: config.bank])
    return Bank(bank.features[chosen], bank.classes[chosen])


# --- validation ------------------------------------------------------------------------------------------------------


def validate(
    setup: Setup, pairs: list[Pair], methods: dict[str, Scores]
) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """Returns the confusion matrix of each method over all images, and the rows of the picture."""
    count, shown = setup.probe.num_classes, set(np.linspace(0, len(pairs) - 1, setup.config.rows).round().astype(int))
    totals, rows = {name: np.zeros((count, count), np.int64) for name in methods}, []

    def together(backbone: Backbone, images: jax.Array) -> jax.Array:
        features = setup.features(backbone, images)
        return jnp.stack([scores(features) for scores in methods.values()], axis=1)

    def predict(one: tuple[Example, Windows, np.ndarray]) -> tuple[Example, dict[str, np.ndarray]]:
        example, windows, scores = one
        each = np.moveaxis(scores, 1, 0)
        return example, {
            name: classes_of_pixels(x, example.classes.shape, windows) for name, x in zip(methods, each, strict=True)
        }

    workers = setup.config.workers
    images = progress(read_ahead(setup.read, pairs, workers), len(pairs), "validation")
    mapped = map_windows(images, setup.crop, setup.config.overlap, together, setup.backbone)
    for number, (example, found) in enumerate(read_ahead(predict, mapped, workers)):
        for name, predicted in found.items():
            totals[name] += confusion(example.classes, predicted, count)
        if number in shown:
            found = {"truth": example.classes} | found
            image = {"image": to_rgb(example.image, setup.backbone.pixels.shown)}
            rows.append(image | {name: draw_classes(classes, setup.classes) for name, classes in found.items()})
    return totals, rows


def draw_classes(classes: np.ndarray, known: Classes) -> np.ndarray:
    """Draws classes, int16 [H, W], in VOC's colors of their labels, uint8 [H, W, 3]."""
    return np.where((classes == VOID)[..., None], VOID_COLOR, CLASS_COLORS[known.labels[classes]])


# --- report ----------------------------------------------------------------------------------------------------------


def summary(
    counts: dict[str, np.ndarray], classes: Classes
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float | None]]]:
    """Returns "figures" and "classes" for `run`. The mean is over the classes that have an IoU."""
    each = {name: intersection_over_union(matrix) for name, matrix in counts.items()}
    figures = {
        name: {"mIoU": float(np.nanmean(each[name])), "pixel_accuracy": pixel_accuracy(matrix)}
        for name, matrix in counts.items()
    }
    by_class = {
        str(label): {name: None if np.isnan(iou[i]) else float(iou[i]) for name, iou in each.items()}
        for i, label in enumerate(classes.labels)
    }
    return figures, by_class


def table(figures: dict[str, dict[str, float]]) -> str:
    """Formats the figures as a table."""
    lines = [f"{'percent':>10} {'mIoU':>8} {'pixels right':>14}"]
    lines += [f"{name:>10} {one['mIoU']:8.2f} {one['pixel_accuracy']:14.2f}" for name, one in figures.items()]
    return "\n".join(lines)
