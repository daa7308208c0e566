"""Continued training from a backbone without heads: with and without a warmup of the new heads.

    python -m benchmarks.continued [--pretrain=24] [--epochs=8] [--seeds=0,1,2] [--folder=runs/continued]

A small ViT is pretrained with DINOv2's losses on nine of the ten classes of the bundled garments. Its backbone is
exported, without heads, and training continues from it on all ten classes. k-NN of the teacher, top-1 with k = 20 on
2,000 test images, 30 labels per class in the bank, at the start and after each epoch.
"""

import shutil
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict
from PIL import Image

from benchmarks import environment
from dino_jax import recipes
from dino_jax.data import demo_images
from dino_jax.distributed.processes import set_cpu_device_count
from dino_jax.training import loop
from dino_jax.training.writers import read_metrics

PRETRAIN = flags.DEFINE_float("pretrain", 24, "epochs of pretraining on nine classes")
EPOCHS = flags.DEFINE_float("epochs", 8, "epochs of continued training")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "seeds of each continued run")
FOLDER = flags.DEFINE_string("folder", "runs/continued", "where images and runs go; what is there is removed")

LEFT_OUT = 8  # the class that pretraining does not see: bags
RUN = {
    "writers": "jsonl",
    "checkpoint.every_steps": 1_000_000,
    "evals.probe.every_epochs": 0,
    "evals.pictures.every_epochs": 0,
    "health.report": False,
    "evals.knn.every_epochs": 1,
}
# (name, changes of the demo's recipe): what destroys features, and what keeps them.
WAYS = {
    "no warmup, the demo's learning rate": {},
    "no warmup, a tenth of the rate": {"optim.lr": 8e-4},
    "heads first for 2 epochs": {"optim.freeze_backbone_epochs": 2.0},
    "heads first, a tenth of the rate, momentum 0.999, layer decay 0.8": {
        "optim.freeze_backbone_epochs": 2.0,
        "optim.lr": 8e-4,
        "optim.layer_decay": 0.8,
        "dino.teacher_momentum": 0.999,
    },
}


def write_nine_classes(folder: Path) -> None:
    """Writes the training images of all classes but one as a folder of PNGs, without labels."""
    folder.mkdir(parents=True)
    images, labels = demo_images.demo_images("train"), demo_images.demo_labels("train")
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        if label != LEFT_OUT:
            Image.fromarray(image[..., 0]).save(folder / f"{i:05}.png")


def train(changes: dict[str, Any], workdir: Path) -> list[float]:
    """Trains, and returns k-NN at the start and after each epoch."""
    config: ConfigDict = recipes.get_config("demo_dinov2")
    config.update_from_flattened_dict(RUN | {"optim.warmup_epochs": 1.0} | changes)
    loop.train(config, workdir)
    return [row["knn_top1_teacher"] for row in read_metrics(workdir / "metrics.jsonl") if "knn_top1_teacher" in row]


def main(arguments: list[str]) -> None:
    """Pretrains, continues in each way, and prints a row per run."""
    del arguments
    set_cpu_device_count(32, recipes.get_config("demo_dinov2").dinov2.group_images)
    folder = Path(FOLDER.value)
    shutil.rmtree(folder, ignore_errors=True)
    write_nine_classes(folder / "nine")
    source = {"data.source": f"folder:{folder / 'nine'}", "epochs": PRETRAIN.value, "evals.knn.every_epochs": 8}
    before = train(source, folder / "pretrained")
    print(
        f"{environment.describe()}; pretrained for {PRETRAIN.value:g} epochs on nine classes: k-NN {before[-1]:.1f}\n"
    )
    print("| continued training | seed | k-NN at the start | after each epoch |\n|---|---|---|---|")
    for name, changes in WAYS.items():
        for seed in map(int, SEEDS.value):
            start = {"init_from": str(folder / "pretrained" / "export"), "init_heads": False, "seed": seed}
            workdir = folder / f"{list(WAYS).index(name)}_{seed}"
            found = train(start | {"epochs": EPOCHS.value} | changes, workdir)
            print(f"| {name} | {seed} | {found[0]:.1f} | {' '.join(f'{top1:.1f}' for top1 in found[1:])} |", flush=True)


if __name__ == "__main__":
    app.run(main)
