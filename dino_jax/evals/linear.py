"""Linear probe: trains a grid of linear classifiers on frozen features in one pass over the data.

Each step takes one random crop of each image and runs the backbone once; all classifiers ("heads") share its output.
Heads on the same features differ in the learning rate, which matters most for the result. The official protocol (dino
`eval_linear.py`) is one head of the default grid and is reported beside the best one. DINOv2's grid differs in the
learning rates, the order of the channels and the decay by step: docs/evaluation.md has its settings.

Differences from the official code: training crops are resized with bicubic instead of bilinear interpolation and cut
from a square canvas (see `canvas_size`); batches may span two epochs, so no image is dropped and no batch is smaller.
"""

import os
import sys
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dino_jax.data.pipeline import Batch, eval_batches, train_batches
from dino_jax.data.sources import Source
from dino_jax.distributed.processes import on_first
from dino_jax.distributed.sharding import distribute, make_mesh, replicate, shard_batch
from dino_jax.errors import UserError
from dino_jax.evals.common import multi_label
from dino_jax.evals.common.extraction import images_in
from dino_jax.evals.common.linear_heads import (
    DECAYS,
    POOLINGS,
    EvalRows,
    Probe,
    ProbeState,
    TrainRows,
    eval_step,
    feature_kinds,
    init_heads,
    official_kind,
    scores_step,
    train_step,
)
from dino_jax.evals.common.linear_state import Record, fingerprint, load_state, save_state
from dino_jax.evals.knn import check_classes, labeled_source
from dino_jax.limits import COUNT, PIXELS, SEED, SHARE, Above
from dino_jax.progress import progress
from dino_jax.weights.backbone import Backbone

TITLES = {"top1": "top-1", "top5": "top-5", "mAP": "mAP"}  # of the measures
OFFICIAL_LR = 0.001  # per 256 images
STATE_FILE = "linear_state.npz"
AT_LEAST = {"epochs": 1, "batch_size": 1, "val_every": 1, "seed": 0, "workers": 0, "canvas_size": 1}
REPORT_EVERY = 10.0  # seconds


LIMITS = {
    "epochs": COUNT,
    "batch_size": COUNT,
    "lr": Above(0, 1e9),
    "blocks": COUNT,
    "scale": Above(0, 1),
    "flip": SHARE,
    "canvas_size": PIXELS,
    "resize": PIXELS,
    "crop": PIXELS,
    "val_every": COUNT,
    "seed": SEED,
    "workers": (0, 1_024),
}


def default_config() -> ConfigDict:
    """Every knob of `dino-jax evaluate linear`."""
    return ConfigDict(
        {
            "train": "",  # labeled source (data/sources) for training: folder:PATH, tfds:NAME, demo:train
            "test": "",  # labeled source of the images to classify
            "epochs": 100,  # passes over the training images
            "batch_size": 1024,  # images, over all devices
            # Initial rates per 256 images, scaled by batch_size / 256; cosine to 0.
            "lr": (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
            "decay": "epoch",  # the rates fall once an epoch, as in DINO, or each step, as in DINOv2
            # Inputs of the heads of a ViT: all combinations of these two. Heads of a convnet read its pooled features.
            "blocks": (1, 4),  # concatenate CLS of this many last blocks, at most all
            # CLS alone, or with the mean patch token of the last block: interleaved as in DINO (cls_mean), or appended
            # as in DINOv2 (cls_then_mean).
            "pooling": "cls,cls_mean",
            "scale": (0.08, 1.0),  # of training crops: share of the image's area
            "flip": 0.5,  # probability
            # Sides of training images that are longer than this, in pixels, are squeezed to it before crops are taken,
            # which makes them softer. Default: 2 x resize.
            "canvas_size": placeholder(int),
            "resize": placeholder(int),  # pixels of a test image's shorter side; default: from the checkpoint's card
            "crop": placeholder(int),  # pixels of all crops; default: from the checkpoint's card
            "val_every": 1,  # epochs between tests; the last epoch is always tested
            "seed": 0,  # of initial weights, order and crops
            "workers": min(8, os.cpu_count() or 1),  # processes that read and decode images
        }
    )


def run(backbone: Backbone, config: ConfigDict, out: Path) -> dict[str, Any]:
    """Trains all heads, tests them every `val_every` epochs and prints the grid, the best head and the official one.

    The same command resumes an interrupted run after its last complete epoch, from `out`/linear_state.npz. The best
    epoch and the best head are selected on the test images, as the reference selects its epoch; the results of the last
    epoch are reported beside them.

    Returns:
        The content of results.json: {"figures": {"best", "official" (DINO's, or None if absent), "grid"} (accuracy
        in percent), "settings", "images", "undecodable", "seconds", "images_per_second"}. The last two are of this
        session; the rate is training images over total time.

    Raises:
        UserError: a setting is invalid; a source is missing or has no labels; the classes of the two differ; there are
            fewer training images than a batch; or `out` has the state of an unfinished run with other settings.
    """
    train, test = (labeled_source(config[split], split, several=True) for split in ("train", "test"))
    check_classes(train, test)
    start, mesh = time.monotonic(), make_mesh()
    several = train.label_sets is not None or test.label_sets is not None
    classes = len(train.class_names) if several else train.num_classes
    probe = design(backbone, config, classes, len(train), mesh.size, several)
    history, watch = fit(probe, jax.device_get(backbone.variables), train, test, mesh, out / STATE_FILE)
    seconds, tested = time.monotonic() - start, history[-1].images
    figures = summary(probe, history)
    print(f"{len(train):,} training and {tested:,} test images, {classes} classes")
    print(table(figures))
    return {
        "figures": figures,
        "settings": probe.config.to_dict(),
        "images": {"train": len(train), "test": tested},
        "undecodable": {"train": len(watch.bad), "test": len(test) - tested},
        "seconds": round(seconds, 1),
        "images_per_second": round(watch.seen / seconds, 1),
    }


# --- settings --------------------------------------------------------------------------------------------------------


def design(
    backbone: Backbone, config: ConfigDict, num_classes: int, images: int, devices: int, several: bool = False
) -> Probe:
    """Returns the probe for a number of training images and devices. Raises UserError for an invalid setting."""
    card = backbone.card["preprocessing"]
    config = config.copy_and_resolve_references()
    for key in ("resize", "crop"):
        config[key] = config[key] or card[key]
    config.canvas_size = config.canvas_size or config.resize * 2
    _check_values(config)
    if config.crop > config.resize:
        raise UserError(
            f"crop {config.crop} is larger than resize {config.resize}: set --config.resize to {config.crop}"
        )
    if config.crop < (patch := backbone.patch_size or 1):
        raise UserError(f"crop {config.crop} is smaller than a patch: set --config.crop to {patch} or more")
    if config.batch_size % devices:
        raise UserError(
            f"batch_size {config.batch_size} does not divide over {devices} devices: "
            f"set --config.batch_size to {-(-config.batch_size // devices) * devices}"
        )
    if images < config.batch_size:
        raise UserError(
            f"{images} training images are fewer than a batch of {config.batch_size}: "
            f"set --config.batch_size to {max(images // devices, 1) * devices} or less"
        )
    return Probe(
        model=backbone.model,
        kinds=feature_kinds(backbone, config.blocks, config.pooling.split(",")),
        official=official_kind(backbone),
        config=config,
        pixels=backbone.pixels,
        mean=card["mean"],
        std=card["std"],
        num_classes=num_classes,
        several=several,
        steps_per_epoch=images // config.batch_size,
    )


def _check_values(config: ConfigDict) -> None:
    for key, least in AT_LEAST.items():
        if config[key] < least:
            raise UserError(f"{key} is {config[key]}: set --config.{key} to {least} or more")
    if not config.lr or not all(isinstance(lr, int | float) and 0 < lr < float("inf") for lr in config.lr):
        raise UserError(f"lr is {config.lr}: set --config.lr to rates above 0, like 0.001,0.01")
    if not config.blocks or not all(isinstance(n, int) and n > 0 for n in config.blocks):
        raise UserError(f"blocks is {config.blocks}: set --config.blocks to numbers of last blocks, like 1,4")
    if not set(config.pooling.split(",")) <= set(POOLINGS):
        raise UserError(f"pooling {config.pooling!r} is unknown: set --config.pooling to some of {','.join(POOLINGS)}")
    if config.decay not in DECAYS:
        raise UserError(f"decay {config.decay!r} is unknown: set --config.decay to {' or '.join(DECAYS)}")
    if len(config.scale) != 2 or not 0 < config.scale[0] <= config.scale[1]:
        raise UserError(f"scale is {config.scale}: set --config.scale to a smaller and a larger share, like 0.08,1.0")
    if not 0 <= config.flip <= 1:
        raise UserError(f"flip is {config.flip}: set --config.flip to a probability, 0 to 1")


# --- training and testing --------------------------------------------------------------------------------------------


class Watch:
    """Counts the images of this session; prints progress and remaining time to stderr every `REPORT_EVERY` seconds."""

    def __init__(self, probe: Probe, train: Source, epochs_done: int):
        self.seen = 0  # training images
        self.bad: set[int] = set()  # records of training images that could not be decoded
        self._train, self._size = train, probe.config.batch_size
        self._before = epochs_done * probe.steps_per_epoch
        self._total = probe.config.epochs * probe.steps_per_epoch
        self._start = self._last_report = time.monotonic()

    def note(self, batch: Batch) -> None:
        """Counts a training batch. Call it before the step."""
        for record in set(batch.bad[batch.bad >= 0].tolist()) - self.bad:
            self.bad.add(record)
            say(f"train: cannot decode {self._train.name(record)}: using another image instead")
        now = time.monotonic()
        if now - self._last_report >= REPORT_EVERY and self.seen:
            self._last_report, rate = now, self.seen / (now - self._start)
            done = self._before + self.seen // self._size
            left = (self._total - done) * self._size / rate
            say(f"train: step {done:,} of {self._total:,}, {rate:,.0f} images/s, {left:,.0f} s left")
        self.seen += self._size


def say(text: str) -> None:
    """Prints a line to stderr."""
    print(text, file=sys.stderr, flush=True)


def fit(
    probe: Probe, variables: dict[str, Any], train: Source, test: Source, mesh: Mesh, file: Path
) -> tuple[list[Record], Watch]:
    """Trains from the state in `file`, or from the start, to the last epoch; saves the state after each epoch.

    `variables` are those of the backbone, on the host. All processes must call it.
    """
    config, steps = probe.config, probe.steps_per_epoch
    settings = fingerprint(probe, variables, train, test)
    saved, history = on_first(lambda: load_state(file, settings))
    if not saved:
        heads = init_heads(probe, variables)
        saved = {"step": np.int32(0), "heads": heads, "momentum": jax.tree.map(np.zeros_like, heads)}
    done = int(saved["step"]) // steps
    watch = Watch(probe, train, done)
    if done == config.epochs:
        return history, watch
    state = replicate(ProbeState(variables=variables, **saved), mesh)
    step = distribute(partial(train_step, probe), mesh)
    test_step = scores_step if probe.several else eval_step
    count = distribute(partial(test_step, probe), mesh, donate=False)
    order = {"canvas_size": config.canvas_size, "seed": config.seed, "start_step": done * steps}
    with train_batches(train, **order, **_reading(probe)) as batches:
        for epoch in range(done + 1, config.epochs + 1):
            losses: list[jax.Array] = []
            for batch in islice(batches, steps):
                watch.note(batch)
                label = labels_of(probe, train, "train", batch.label, batch.index)
                rows = TrainRows(batch.canvas, batch.size, batch.position, label)
                state, loss = step(state, shard_batch(rows, mesh))
                losses.append(loss)
                jax.block_until_ready(losses[-2:-1])  # at most one batch ahead of the devices: batches are large
            if epoch % config.val_every == 0 or epoch == config.epochs:
                images, figures = evaluate(probe, count, state, test, mesh)
                history.append(Record(epoch, images, np.mean(jax.device_get(losses), axis=0), figures))
                best = f"{TITLES[probe.measures[0]]} {figures[0].max():.2f}% with the best head"
                say(f"epoch {epoch:,} of {config.epochs:,}: {best}")
            save_state(file, settings, state, history)
    return history, watch


def evaluate(probe: Probe, count: Any, state: ProbeState, test: Source, mesh: Mesh) -> tuple[int, np.ndarray]:
    """Tests all heads in one pass; returns the number of images, and `probe.measures` in percent [M, K, L].

    `count` is `eval_step` on the mesh, `scores_step` if images have any number of classes. Raises UserError if no image
    can be decoded.
    """
    config = probe.config
    rows, answers = config.batch_size // jax.process_count(), []
    with eval_batches(test, resize=config.resize, crop=config.crop, **_reading(probe)) as batches:
        for batch in progress(batches, len(test), "test", size=images_in):
            label = labels_of(probe, test, "test", batch.labels, batch.index)
            fill = rows - len(label)
            images = np.pad(batch.images, ((0, fill), (0, 0), (0, 0), (0, 0)))
            label = np.pad(label, ((0, fill), (0, 0))[: label.ndim], constant_values=-1)
            answers.append(count(state, shard_batch(EvalRows(images, label), mesh)))
            jax.block_until_ready(answers[-2:-1])
    first, second = zip(*jax.device_get(answers), strict=True)
    if probe.several:
        present, scores = np.concatenate(first), np.concatenate(second, axis=1)
        used = present[:, 0] != multi_label.PADDING
        present, scores, total = present[used], scores[:, used], int(used.sum())
        heads = np.swapaxes(scores, 1, 2).reshape(-1, *present.shape)
        each = [multi_label.mean_average_precision(head, present) for head in heads]
        figures = np.reshape(each, (1, len(scores), len(config.lr)))
    else:
        total, figures = int(np.sum(first)), 100 * np.sum(second, axis=0) / max(np.sum(first), 1)
    if not total:
        raise UserError(f"--config.test: none of its {len(test):,} images can be decoded")
    return total, figures


def labels_of(probe: Probe, source: Source, split: str, values: Any, records: np.ndarray) -> np.ndarray:
    """Returns the targets of some records: `checked_labels`, or float32 [b, C] if they have any number of classes."""
    if probe.several:
        return multi_label.targets(source, records)
    return checked_labels(source, split, values, records)


def checked_labels(source: Source, split: str, values: Any, records: np.ndarray) -> np.ndarray:
    """Returns the labels of some records as int32 [b]. Raises UserError if one is not a class of the source."""
    label = np.array(values, np.int32)
    wrong = records[(label < 0) | (label >= source.num_classes)]
    if len(wrong):
        name = source.name(int(wrong[0]))
        raise UserError(
            f"--config.{split}: {name} has no label in 0..{source.num_classes - 1}: label it or leave it out"
        )
    return label


def _reading(probe: Probe) -> dict[str, Any]:
    """Returns the settings of batches that training and testing share."""
    return {
        "batch_size": probe.config.batch_size,
        "pixels": probe.pixels,
        "workers": probe.config.workers,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }


# --- report ---------------------------------------------------------------------------------------------------------


def summary(probe: Probe, history: list[Record]) -> dict[str, Any]:
    """Returns {"best", "official", "grid"} for `run`, with the best and the last epoch of each head."""
    heads = {
        (str(kind), lr): _head(
            probe.measures, str(kind), lr, [(int(r.epoch), *r.figures[:, k, i].tolist()) for r in history]
        )
        for k, kind in enumerate(probe.kinds)
        for i, lr in enumerate(probe.config.lr)
    }
    grid: dict[str, Any] = {str(kind): {} for kind in probe.kinds}
    for (kind, lr), head in heads.items():
        grid[kind][str(lr)] = head
    best = max(heads.values(), key=lambda head: head[probe.measures[0]])
    official = heads.get((str(probe.official), OFFICIAL_LR)) if probe.config.decay == "epoch" else None
    return {"best": best, "official": official, "grid": grid}


def _head(measures: tuple[str, ...], kind: str, lr: float, measured: list[tuple[float, ...]]) -> dict[str, Any]:
    best, last = (
        dict(zip(("epoch", *measures), row, strict=True))
        for row in (max(measured, key=lambda row: row[1]), measured[-1])
    )
    return {"features": kind, "lr": lr, **best, "last": last}


def table(figures: dict[str, Any]) -> str:
    """Formats the figures: the grid, then the best and the official head."""
    grid, best, official = figures["grid"], figures["best"], figures["official"]
    measures = [name for name in TITLES if name in best]
    lines = [
        f"{TITLES[measures[0]]} after each head's best epoch, percent:",
        f"{'lr':>10}" + "".join(f"{kind:>17}" for kind in grid),
    ]
    for lr in grid[best["features"]]:
        lines.append(f"{lr:>10}" + "".join(f"{column[lr][measures[0]]:17.2f}" for column in grid.values()))
    titles = "".join(f"{TITLES[name]:>8}" for name in measures)
    lines.append(f"{'head':>10}{'features':>17}{'lr':>8}{'epoch':>7}{titles}  last:{titles}")
    for name, head in (("best", best), ("official", official)):
        if head is not None:
            best_epoch, last = ("".join(f"{one[name]:8.2f}" for name in measures) for one in (head, head["last"]))
            lines.append(f"{name:>10}{head['features']:>17}{head['lr']:>8}{head['epoch']:>7}{best_epoch}{'':7}{last}")
    rates = [float(lr) for lr in grid[best["features"]]]
    if len(rates) > 1 and best["lr"] in (min(rates), max(rates)):
        lines.append(f"the best learning rate is at the end of the grid: extend --config.lr beyond {best['lr']}")
    return "\n".join(lines)
