"""`make demo`: pretrain on the bundled garments without a label, then show what was learnt, in minutes on a CPU.

    python -m dino_jax.demo --workdir=runs/demo

Self-supervision is for many images and few labels: all 12,000 images are trained on, 30 labels a class are the bank
for k-NN. Beside it stand the whole bank, raw pixels and the untrained network. Writes report.json and attention.png.
"""

import json
import os
import statistics
from functools import partial
from pathlib import Path

import jax
from absl import flags

from dino_jax import cli, train_loop
from dino_jax.backbone import Backbone, load_backbone
from dino_jax.checkpoints import versions
from dino_jax.data import demo_images
from dino_jax.data.sources import open_source
from dino_jax.evals.attention import evaluate_masks
from dino_jax.evals.features import raw_pixels
from dino_jax.evals.knn import knn_accuracy
from dino_jax.sharding import make_mesh

ATTENTION_IMAGES = 500  # of the test split
ATTENTION_UPSCALE = 2  # images are enlarged for it, so that the patches are finer than the garments

CONFIG = cli.config_file_flag("configs/demo.py")
WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "folder for the run, report.json and attention.png")


def main(argv: list[str]) -> None:
    """Train (or go on), evaluate, print the report."""
    cli.require_no_arguments(argv)
    config, workdir = CONFIG.value, Path(WORKDIR.value)
    if "XLA_FLAGS" not in os.environ:  # one device a core: a tiny net's operations are too small to share cores
        jax.config.update("jax_num_cpu_devices", _most_devices(config.batch_size))
    state = train_loop.train(config, workdir)
    if int(state.step) < config.epochs * train_loop.check_enough_images(open_source(config.data.source), config):
        return  # stopped by a signal: nothing to report yet

    trained = load_backbone(workdir)
    initial = untrained(config, trained)
    report = knn_report(config, trained, initial) | attention_report(trained, initial, workdir)
    report["images_per_second"] = training_rate(workdir / "metrics.jsonl")
    report["devices"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    report["versions"] = versions()
    (workdir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(table(report, config))
    print(f"written: {workdir / 'report.json'}, {workdir / 'attention.png'}")


def untrained(config, trained: Backbone) -> Backbone:
    """The same network as it was before the first step."""
    state = train_loop.init_state(train_loop.build_recipe(config, steps_per_epoch=1), make_mesh())
    variables = {"params": state.teacher["backbone"], "batch_stats": state.teacher_stats["backbone"]}
    return Backbone(trained.model, variables, trained.card)


def knn_report(config, trained: Backbone, initial: Backbone) -> dict:
    """k-NN top-1 in percent of pixels, untrained network and teacher, with the bank of few labels and the whole one."""
    mesh, k = make_mesh(), config.eval.k
    report: dict = {"k": k, "bank": config.eval.train, "bank_full": config.data.source, "test": config.eval.test}
    for suffix, bank in (("", config.eval.train), ("_full_bank", config.data.source)):
        sources = {"bank": open_source(bank), "queries": open_source(config.eval.test)}
        for name, backbone in (("knn_top1_pixels", None), ("knn_top1_init", initial), ("knn_top1", trained)):
            train, test = (_features(source, what, backbone, config, mesh) for what, source in sources.items())
            rows = train.features, train.labels, test.features, test.labels
            report[name + suffix] = knn_accuracy(*rows, (k,), num_classes=sources["bank"].num_classes, mesh=mesh)[k][0]
    return report


def attention_report(trained: Backbone, initial: Backbone, workdir: Path) -> dict:
    """Mean Jaccard index of the best head's mask with the exact garment, and the picture."""
    images = demo_images.demo_images("test")[:ATTENTION_IMAGES]
    masks = demo_images.demo_masks("test")[:ATTENTION_IMAGES]
    score = partial(evaluate_masks, images=images, objects=masks, upscale=ATTENTION_UPSCALE)
    return {
        "attention_jaccard": score(trained, sheet=workdir / "attention.png"),
        "attention_jaccard_init": score(initial),
        "attention_images": len(images),
    }


def training_rate(metrics: Path) -> float:
    """Median images per second over the run's progress lines; evaluations and compilation are not in them."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return statistics.median(line["images_per_second"] for line in lines if "images_per_second" in line)


def table(report: dict, config) -> str:
    """The report for people."""
    rows = [("raw pixels", "knn_top1_pixels"), ("untrained network", "knn_top1_init"), ("DINO teacher", "knn_top1")]
    lines = [f"{'k-NN top-1, %':<20}{'30 labels a class':>20}{'all labels':>14}"]
    lines += [f"{title:<20}{report[key]:>20.1f}{report[key + '_full_bank']:>14.1f}" for title, key in rows]
    return "\n".join(
        [
            *lines,
            f"attention covers the garment with a Jaccard index of {report['attention_jaccard']:.2f} "
            f"(untrained {report['attention_jaccard_init']:.2f})",
            f"trained at {report['images_per_second']:,.0f} images/s on {report['devices']}",
        ]
    )


def _features(source, what: str, backbone: Backbone | None, config, mesh):
    """Features of a source, of its raw pixels (0 to 1) without a backbone."""
    if backbone is None:
        channels = config.model.in_channels
        return train_loop.feature_table(
            raw_pixels, {}, source, what, config, mesh, mean=(0.0,) * channels, std=(1.0,) * channels
        )
    return train_loop.feature_table(
        backbone.model.apply, backbone.variables, source, what, config, mesh, config.data.mean, config.data.std
    )


def _most_devices(batch_size: int) -> int:
    """The most devices, at most one a core, that the batch divides over."""
    return max(n for n in range(1, (os.cpu_count() or 1) + 1) if batch_size % n == 0)


if __name__ == "__main__":
    cli.run(main)
