"""Suggested settings against the defaults scaled down by hand: k-NN after equal time, on few and on many images.

    python -m benchmarks.suggested [--hours=0.015] [--images=500,2000,12000] [--seeds=0,1,2] [--folder=runs/suggested]

`dino-jax suggest` chooses the settings once for each number of images. The other runs have the defaults with a network,
crops and a head that fit small gray images (`BY_HAND`), and the epochs that their own speed allows in that time,
a tenth of them, or ten, as warmup. All speeds are measured before the first training, so that other work on the machine
makes a later training longer, but does not change its result.
k-NN of the teacher, top-1 with k = 20 on 2,000 test images; the bank has 30 labels per class, or all 12,000.
"""

import shutil
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict

from benchmarks import environment
from dino_jax import recipes
from dino_jax.commands.demo import knn_top1
from dino_jax.data.sources import open_source
from dino_jax.distributed.processes import set_cpu_device_count
from dino_jax.suggest import facts, measure
from dino_jax.suggest.choices import config_of, passes, suggest
from dino_jax.training import loop
from dino_jax.weights.backbone import load_backbone

HOURS = flags.DEFINE_float("hours", 0.015, "time for each training")
IMAGES = flags.DEFINE_list("images", ["500", "2000", "12000"], "numbers of bundled images")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "seeds of each run")
FOLDER = flags.DEFINE_string("folder", "runs/suggested", "where the runs go; what is there is removed")

BY_HAND = {
    "model.arch": "vit_nano",
    "model.patch_size": 8,
    "model.in_channels": 1,
    "crops.global_size": 32,
    "crops.local_size": 16,
    "data.canvas_size": 40,
    "data.mean": (0.5,),
    "data.std": (0.25,),
    "data.workers": 0,
    "batch_size": 64,
    "head.out_dim": 1_024,
    "head.hidden_dim": 256,
    "head.bottleneck_dim": 64,
    "crops.local_number": 4,
}
RUN = {
    "writers": "jsonl",
    "checkpoint.every_steps": 1_000_000,
    "evals.knn.every_epochs": 0,
    "evals.probe.every_epochs": 0,
    "evals.pictures.every_epochs": 0,
    "health.report": False,
}
KNN = {"data.source": "demo", "evals.knn.train": "demo:train:30", "evals.knn.test": "demo:test"}
KNN |= {"eval.resize": 32, "eval.crop": 32}


def suggested(source: str) -> ConfigDict:
    """Returns what `dino-jax suggest` chooses."""
    images = facts.of_images(source, open_source(source), workers=0)
    return config_of(
        suggest(
            images,
            facts.of_machine(),
            HOURS.value,
            "",
            measure.flops_rate(),
            measure.flops_of,
            measure.measure,
        )
    )


def by_hand(source: str) -> ConfigDict:
    """Returns the defaults scaled down, with the epochs that fit the time."""
    config = recipes.get_config("default")
    config.update_from_flattened_dict(BY_HAND | {"data.source": source})
    per_epoch = loop.steps_in_epoch(open_source(source), config) * config.batch_size
    config.epochs = passes(measure.measure(config).images_per_second, HOURS.value) / per_epoch
    config.optim.warmup_epochs = min(10.0, 0.1 * config.epochs)
    return config


def trained(config: ConfigDict, changes: dict[str, Any], workdir: Path) -> tuple[float, float]:
    """Trains and returns k-NN top-1 in percent with few and with all labels."""
    shutil.rmtree(workdir, ignore_errors=True)
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(RUN | changes)
    loop.train(config, workdir)
    config.update_from_flattened_dict(KNN)
    few, full = knn_top1(config, load_backbone(workdir))
    return few, full


def main(arguments: list[str]) -> None:
    """Trains one after another, and prints a row per run."""
    del arguments
    set_cpu_device_count(32)
    print(f"{environment.describe()}; {HOURS.value:g} h each\n")
    print("| images | settings | seed | passes | k-NN, 30 labels a class | all labels |\n|---|---|---|---|---|---|")
    sources = {number: f"demo:train:{number // 10}" for number in map(int, IMAGES.value)}
    settings = {
        (number, name): choose(source)
        for number, source in sources.items()
        for name, choose in (("by hand", by_hand), ("suggested", suggested))
    }
    for (number, name), config in settings.items():
        for seed in map(int, SEEDS.value):
            workdir = Path(FOLDER.value) / f"{number}_{name}_{seed}".replace(" ", "_")
            few, full = trained(config, {"seed": seed}, workdir)
            seen = config.epochs * number
            print(f"| {number:,} | {name} | {seed} | {seen:,.0f} | {few:.1f} | {full:.1f} |", flush=True)


if __name__ == "__main__":
    app.run(main)
