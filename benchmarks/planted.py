"""Runs with planted faults: does each name its own, how early, and do healthy runs stay without findings?

    python -m benchmarks.planted [--steps=900] [--only=no_sharpening,copies] [--folder=runs/planted]

Each run is the demo with one change, stopped after `--steps` of its 18,000 steps: a minute or two on two cores.
Prints a row per run as it ends, and exits with 1 if a fault was missed or a healthy run raised an alarm.
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags
from PIL import Image

from dino_jax import recipes
from dino_jax.data.sources import open_source, read_example
from dino_jax.errors import NotFiniteError, Stopped
from dino_jax.json_files import read_object
from dino_jax.training import loop, writers

STEPS = flags.DEFINE_integer("steps", 900, "steps of each run")
ONLY = flags.DEFINE_list("only", [], "names of the runs, all by default")
FOLDER = flags.DEFINE_string("folder", "runs/planted", "where the runs go; what is there is removed")
TOTAL = 18_000  # steps of the demo, which the schedules refer to
SHORT = {
    "log_every": 50,
    "writers": "jsonl,stop",
    "checkpoint.every_steps": 100_000,
    "evals.knn.every_epochs": 0,
    "evals.pictures.every_epochs": 0,
}


class Planted(NamedTuple):
    """A run: its changes of the demo, the findings of which one has to come, and the setting that has to be named."""

    changes: dict[str, Any]
    names: tuple[str, ...] = ()  # none: the run is healthy
    knob: str = ""
    images: Callable[[np.ndarray, int], np.ndarray] | None = None  # (demo images, i) -> image i of a folder of 320
    recipe: str = "demo"


COLLAPSE = ("uniform_collapse", "single_prototype", "partial_collapse", "constant_features")
RUNS = {
    "healthy": Planted({}),
    "healthy_seed_1": Planted({"seed": 1}),
    "healthy_seed_2": Planted({"seed": 2}),
    "healthy_accumulated": Planted({"accum_steps": 2}),
    "healthy_bfloat16": Planted({"dtype": "bfloat16"}),
    "healthy_resnet18": Planted({"model.arch": "resnet18", "optim.lr": 1e-3, "crops.local_number": 0}),
    "healthy_200_steps": Planted(
        {"epochs": 200 / 375, "optim.warmup_epochs": 0.1, "optim.freeze_last_layer_epochs": 0.0, "log_every": 5}
    ),
    "healthy_continued": Planted({"init_from": "healthy"}),  # the run of this name
    "healthy_dinov2": Planted({}, recipe="demo_dinov2"),
    "healthy_dinov2_sinkhorn": Planted({"dinov2.targets": "sinkhorn"}, recipe="demo_dinov2"),
    "no_sharpening": Planted({"dino.sharpening": False}, COLLAPSE, "dino.sharpening"),
    "dinov2_no_sharpening": Planted({"dino.sharpening": False}, COLLAPSE, "dino.sharpening", recipe="demo_dinov2"),
    "warm_teacher": Planted({"dino.teacher_temp": 0.2, "dino.warmup_teacher_temp": 0.2}, COLLAPSE, "dino.teacher_temp"),
    "no_centering": Planted({"dino.centering": False}, COLLAPSE, "dino.centering"),
    "slow_center": Planted({"dino.center_momentum": 0.9999}, COLLAPSE, "dino.center_momentum"),
    "high_rate": Planted({"optim.lr": 2.0, "optim.warmup_epochs": 0}, (*COLLAPSE, "diverging"), "optim.lr"),
    "low_rate": Planted({"optim.lr": 1e-8, "optim.min_lr": 0.0}, ("not_moving",), "optim.lr"),
    "fixed_teacher": Planted({"dino.teacher_momentum": 1.0}, ("not_moving",), "dino.teacher_momentum"),
    "teacher_is_student": Planted({"dino.teacher_update": "copy"}, COLLAPSE, "dino.teacher_update"),
    "black_images": Planted({}, ("constant_input",), "data.source", lambda demo, i: 0 * demo[0]),
    "wrong_normalization": Planted({"data.std": (1_000.0,)}, ("constant_input",), "data.std"),
    "copies": Planted({}, ("overfitting_few_images",), "data.source", lambda demo, i: demo[i % 12]),
    "few_images": Planted({"data.source": "demo:train:5", "epochs": TOTAL}, ("overfitting_few_images",), "data.source"),
    "prototypes": Planted({"head.out_dim": 65_536}, ("too_many_prototypes",), "head.out_dim"),
    "weight_decay": Planted(
        {"optim.weight_decay": 20.0, "optim.weight_decay_end": 20.0},
        ("shrinking_weights", *COLLAPSE),
        "optim.weight_decay",
    ),
    "same_crops": Planted(
        {"crops.global_scale": (1.0, 1.0), "crops.flip": 0.0, "crops.jitter": 0.0},
        ("crops_too_alike",),
        "crops.global_scale",
    ),
}


class StopWriter:
    """Stops the run after --steps."""

    def __init__(self, run: writers.RunInfo):
        pass

    def write(self, step: int, scalars: writers.Scalars) -> None:
        """Sends the process the signal that a scheduler would send."""
        if "loss" in scalars and step >= STEPS.value:
            os.kill(os.getpid(), signal.SIGTERM)

    def note(self, step: int, text: str) -> None:
        """Nothing to do."""

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to release."""


def train(planted: Planted, workdir: Path) -> dict[str, Any]:
    """Runs one, and returns its health.json."""
    changes = dict(planted.changes)
    if planted.images:
        changes |= {"data.source": f"folder:{image_folder(workdir / 'images', planted.images)}", "epochs": TOTAL // 10}
        changes["evals.probe.every_epochs"] = 0
    if "init_from" in changes:
        changes["init_from"] = str(workdir.parent / changes["init_from"])
    config = recipes.get_config(planted.recipe)
    config.update_from_flattened_dict(SHORT | changes)
    with suppress(Stopped, NotFiniteError):
        loop.train(config, workdir)
    return read_object(workdir / "health.json", {})


def image_folder(folder: Path, image: Callable[[np.ndarray, int], np.ndarray]) -> Path:
    """Writes 320 images made of those of the demo."""
    folder.mkdir(parents=True)
    source = open_source("demo:train:10")
    demo = np.stack([np.asarray(read_example(source, i).image).reshape(40, 40) for i in range(len(source))])
    for i in range(320):
        Image.fromarray(image(demo, i)).save(folder / f"{i:03d}.png")
    return folder


def judged(planted: Planted, report: dict[str, Any]) -> tuple[str, bool]:
    """Returns what a run said, and whether that is right."""
    found = [one for one in report["findings"] if one["name"] in planted.names or not planted.names]
    if not planted.names:
        said = ", ".join(f"{one['name']} at step {one['since_step']}" for one in found) or "no finding"
        return said, not found
    right = [one for one in found if one["knob"] == planted.knob]
    if not found:
        return "missed", False
    first = (right or found)[0]
    return f"{first['name']} after {first['since_step'] / TOTAL:.1%}, {first['knob']}", bool(right)


def main(arguments: list[str]) -> None:
    """Runs them one after another."""
    del arguments
    writers.WRITERS["stop"] = StopWriter
    wrong = 0
    print("| run | said | verdict | right | seconds |\n|---|---|---|---|---|", flush=True)
    for name in ONLY.value or RUNS:
        workdir, start = Path(FOLDER.value) / name, time.monotonic()
        shutil.rmtree(workdir, ignore_errors=True)
        report = train(RUNS[name], workdir)
        said, right = judged(RUNS[name], report)
        wrong += not right
        seconds = time.monotonic() - start
        print(f"| {name} | {said} | {report['verdict']} | {'yes' if right else 'NO'} | {seconds:.0f} |", flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    app.run(main)
