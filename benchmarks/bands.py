"""Twelve channels of 16 bits: two minutes of training on made images, k-NN against raw pixels and no training.

    python -m benchmarks.bands [--minutes=2] [--folder=runs/bands]

Each of ten classes has a spectrum of 12 values; an image is a mosaic of fields, most of them of its class, under one of
many skies: a gain and an offset for each channel, and noise. The classes cannot be told by the mean of any channel
alone. Images are 12-band TIFFs of 48 x 48 pixels, values 0 to about 10,000 like reflectances, of 16 bits; 3,000 for
training, 1,000 for testing. Range, mean and standard deviation are those that `dino-jax check` prints. The crops are in
FOLDER/crops.png.
"""

import shutil
from pathlib import Path

import numpy as np
import tifffile
from absl import app, flags
from ml_collections import ConfigDict

from benchmarks import environment
from dino_jax import atomic, recipes
from dino_jax.commands.demo import knn_top1, untrained
from dino_jax.data.examination import check
from dino_jax.data.pixels import Pixels
from dino_jax.data.sources import open_source
from dino_jax.data.summary import summarize
from dino_jax.distributed.processes import set_cpu_device_count
from dino_jax.report.crops import load_crops, picture
from dino_jax.suggest import measure
from dino_jax.suggest.choices import passes
from dino_jax.training import loop
from dino_jax.weights.backbone import load_backbone

MINUTES = flags.DEFINE_float("minutes", 2.0, "time for the training")
FOLDER = flags.DEFINE_string("folder", "runs/bands", "where images and run go; what is there is removed")
CHANNELS, CLASSES = 12, 10
SETTINGS = {
    "model.arch": "vit_nano",
    "model.patch_size": 8,
    "model.in_channels": CHANNELS,
    "crops.global_size": 32,
    "crops.local_size": 16,
    "crops.local_number": 4,
    "data.canvas_size": 48,
    "data.dtype": "uint16",
    "data.shown": (3, 2, 1),
    "batch_size": 64,
    "head.out_dim": 256,
    "head.hidden_dim": 256,
    "head.bottleneck_dim": 64,
    "dino.teacher_momentum": 0.99,
    "optim.freeze_last_layer_epochs": 0.0,
    "eval.resize": 48,
    "eval.crop": 48,
    "writers": "jsonl",
    "checkpoint.every_steps": 1_000_000,
    "evals.probe.every_epochs": 0,
}


def images(split: str, count: int, rng: np.random.Generator, spectra: np.ndarray) -> str:
    """Writes TIFFs in class folders and returns the source."""
    folder = Path(FOLDER.value) / split
    for i in range(count):
        label = i % CLASSES
        fields = rng.integers(0, CLASSES, (6, 6))
        fields[rng.uniform(size=(6, 6)) < 0.6] = label
        reflectance = spectra[np.kron(fields, np.ones((8, 8), int))]
        sky = rng.uniform(0.6, 1.4, CHANNELS), rng.uniform(0, 1_500, CHANNELS)
        values = reflectance * sky[0] + sky[1] + rng.normal(0, 150, reflectance.shape)
        target = folder / f"class{label}" / f"{i:05}.tif"
        target.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(
            target, np.clip(values, 0, 65_535).astype(np.uint16), photometric="minisblack", planarconfig="contig"
        )
    return f"folder:{folder}"


def configured(train: str, test: str) -> ConfigDict:
    """Returns the config for these images, with the epochs that fit the time."""
    config = recipes.get_config("default")
    config.update_from_flattened_dict(SETTINGS | {"data.source": train, "evals.knn.train": f"{train}:30"})
    source, pixels = open_source(train), Pixels(CHANNELS, "uint16")
    found = summarize(source, check(source, canvas_size=48, pixels=pixels, workers=0))
    config.data.range = tuple(found["values"]["percentiles"])
    pixels = pixels._replace(range=config.data.range)
    statistics = summarize(source, check(source, canvas_size=48, pixels=pixels, workers=0))["statistics"]
    config.data.mean, config.data.std = tuple(statistics["mean"]), tuple(statistics["std"])
    per_epoch = loop.steps_in_epoch(source, config) * config.batch_size
    config.epochs = passes(measure.measure(config).images_per_second, MINUTES.value / 60) / per_epoch
    config.optim.warmup_epochs = 0.1 * config.epochs
    config.evals.knn.test = test
    return config


def main(arguments: list[str]) -> None:
    """Makes the images, trains, and prints a table."""
    del arguments
    set_cpu_device_count(32)
    folder, rng = Path(FOLDER.value), np.random.default_rng(0)
    shutil.rmtree(folder, ignore_errors=True)
    spectra = rng.uniform(1_000, 6_000, (CLASSES, CHANNELS))
    config = configured(images("train", 3_000, rng, spectra), images("test", 1_000, rng, spectra))
    batch, crops = load_crops(config, 4)
    atomic.write_picture(folder / "crops.png", picture(batch, crops, config.data))
    print(environment.describe())
    print(f"{config.epochs:.1f} epochs of 3,000 images, data.range={config.data.range}")
    print("| k-NN, k = 20 | 30 labels a class | all labels |\n|---|---|---|")
    loop.train(config, folder / "run")
    rows = {"raw pixels": None, "untrained network": untrained(config), "DINO": load_backbone(folder / "run")}
    for name, backbone in rows.items():
        few, full = knn_top1(config, backbone)
        print(f"| {name} | {few:.1f} | {full:.1f} |", flush=True)


if __name__ == "__main__":
    app.run(main)
