"""Pretrains on the bundled images without labels and shows the result, in minutes on a CPU.

    dino-jax demo --workdir=runs/demo

Self-supervised learning helps if there are many images but few labels: training uses all 12,000 images, and k-NN uses
30 labels per class. The report compares the teacher with raw pixels and with the untrained network, and also lists the
accuracy with all labels. The command writes report.json and attention.png to the workdir.
"""

import os
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dino_jax import atomic
from dino_jax.checkpoints import model_card
from dino_jax.commands import cli
from dino_jax.commands.report import after_training
from dino_jax.data import demo_images
from dino_jax.data.sources import Source, open_source
from dino_jax.distributed.processes import set_cpu_device_count
from dino_jax.distributed.sharding import make_mesh
from dino_jax.evals.attention import evaluate_masks
from dino_jax.evals.common.extraction import FeatureTable, cls_features, raw_pixels
from dino_jax.evals.knn import knn_accuracy
from dino_jax.models import from_card
from dino_jax.provenance import versions
from dino_jax.training import loop
from dino_jax.training.evaluators import feature_table
from dino_jax.training.setup import backbone_variables, build_setup, init_state, share_unit
from dino_jax.training.writers import read_metrics
from dino_jax.weights.backbone import Backbone, load_backbone

USAGE = "[--workdir=FOLDER] [--config=RECIPE] [--config.KEY=VALUE ...]"
ATTENTION_IMAGES = 500  # images of the test split
ATTENTION_UPSCALE = 2  # enlarges the images for attention maps, so that patches are finer than the garments


def define_flags(arguments: Sequence[str]) -> cli.Settings:
    """Defines the flag for the workdir, and returns the settings of the recipe `demo`."""
    flags.DEFINE_string("workdir", "runs/demo", "folder for the run, report.json and attention.png")
    return cli.recipe(arguments, default="demo")


def main(arguments: Sequence[str]) -> None:
    """Trains or resumes, evaluates, and prints the report."""
    cli.require_no_arguments(arguments)
    config, workdir = flags.FLAGS.config, Path(flags.FLAGS.workdir)
    set_cpu_device_count(config.batch_size, share_unit(config))
    loop.train(config, workdir)
    trained = load_backbone(workdir)
    initial = untrained(config)
    report = knn_report(config, trained, initial) | attention_report(trained, initial, workdir)
    report["images_per_second"] = training_rate(workdir / "metrics.jsonl")
    report["devices"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    report["versions"] = versions()
    atomic.write_json(workdir / "report.json", report)
    print(table(report, config))
    print(f"written: {workdir / 'report.json'}, {workdir / 'attention.png'}")
    after_training(config, flags.FLAGS.workdir)


def untrained(config: ConfigDict) -> Backbone:
    """Returns the network of a config before the first step."""
    state = init_state(build_setup(config, steps_per_epoch=1), make_mesh())
    variables = backbone_variables(state, "teacher")
    card = model_card(config, 0)
    return Backbone(from_card(card["architecture"]), variables, card)


def knn_report(config: ConfigDict, trained: Backbone, initial: Backbone) -> dict[str, Any]:
    """Returns k-NN top-1 in percent of raw pixels, untrained network and teacher, with few and with all labels."""
    report: dict[str, Any] = {"k": config.evals.knn.k, "bank": config.evals.knn.train}
    report |= {"bank_full": config.data.source, "test": config.evals.knn.test}
    for suffix, backbone in (("_pixels", None), ("_init", initial), ("", trained)):
        accuracy = knn_top1(config, backbone)
        report |= {f"knn_top1{suffix}": accuracy.few, f"knn_top1{suffix}_full_bank": accuracy.full}
    return report


class Accuracy(NamedTuple):
    """k-NN top-1 in percent."""

    few: float  # with config.evals.knn.train as the bank
    full: float  # with all training images as the bank


def knn_top1(config: ConfigDict, backbone: Backbone | None) -> Accuracy:
    """Computes k-NN top-1 with both banks. Without a backbone, the features are raw pixels.

    Raises UserError if a source has no labels.
    """
    mesh, k, queries = make_mesh(), config.evals.knn.k, open_source(config.evals.knn.test)
    test = _features(queries, "queries", backbone, config, mesh)
    top1 = []
    for spec in (config.evals.knn.train, config.data.source):
        bank = open_source(spec)
        train = _features(bank, "bank", backbone, config, mesh)
        rows = train.features, train.labels, test.features, test.labels
        top1.append(knn_accuracy(*rows, (k,), num_classes=bank.num_classes, mesh=mesh)[k][0])
    return Accuracy(*top1)


def attention_report(trained: Backbone, initial: Backbone, workdir: Path) -> dict[str, Any]:
    """Computes the mean Jaccard index between the best head's mask and the garment, and writes attention.png."""
    images = demo_images.demo_images("test")[:ATTENTION_IMAGES]
    masks = demo_images.demo_masks("test")[:ATTENTION_IMAGES]
    score = partial(evaluate_masks, images=images, objects=masks, upscale=ATTENTION_UPSCALE)
    return {
        "attention_jaccard": score(trained, sheet=workdir / "attention.png"),
        "attention_jaccard_init": score(initial),
        "attention_images": len(images),
    }


def training_rate(metrics: Path) -> float:
    """Returns the median images per second of the run's progress lines, which exclude evaluation and compilation."""
    rows = read_metrics(metrics)
    return statistics.median(row["images_per_second"] for row in rows if "images_per_second" in row)


def table(report: dict[str, Any], config: ConfigDict) -> str:
    """Formats the report as a table."""
    rows = [("raw pixels", "knn_top1_pixels"), ("untrained network", "knn_top1_init"), ("DINO teacher", "knn_top1")]
    lines = [f"{'k-NN top-1, %':<20}{'30 labels per class':>20}{'all labels':>14}"]
    lines += [f"{title:<20}{report[key]:>20.1f}{report[key + '_full_bank']:>14.1f}" for title, key in rows]
    return "\n".join(
        [
            *lines,
            f"attention covers the garment with a Jaccard index of {report['attention_jaccard']:.2f} "
            f"(untrained {report['attention_jaccard_init']:.2f})",
            f"trained at {report['images_per_second']:,.0f} images/s on {report['devices']}",
        ]
    )


def _features(source: Source, what: str, backbone: Backbone | None, config: ConfigDict, mesh: Mesh) -> FeatureTable:
    """Extracts features of a source: raw pixels (0 to 1) without a backbone."""
    if backbone is None:
        channels = config.model.in_channels
        return feature_table(raw_pixels, {}, source, what, config, mesh, mean=(0.0,) * channels, std=(1.0,) * channels)
    return feature_table(
        cls_features(backbone.model), backbone.variables, source, what, config, mesh, config.data.mean, config.data.std
    )
