"""Settings small enough to train for a few steps in a test; every test takes them from here."""

from typing import Any

from ml_collections import ConfigDict

from configs import demo

# Runs with the same settings share compiled programs (conftest.py keeps them). The number of epochs is part of a
# program, since the schedules are.
TINY = {
    "batch_size": 16,
    "epochs": 2,
    "log_every": 1,
    "head.out_dim": 64,
    "head.hidden_dim": 32,
    "head.bottleneck_dim": 16,
    "crops.local_number": 2,
    "data.source": "demo:train:8",  # 80 images: 5 steps an epoch
    "evals.knn.every_epochs": 0,
    "evals.probe.every_epochs": 0,
    "evals.pictures.every_epochs": 0,
    "health.report": False,
    "evals.knn.train": "",
    "evals.knn.test": "",
    "checkpoint.every_steps": 4,
    "writers": "console,jsonl",  # TensorBoard's imports PyTorch where it is installed: 2 seconds of each process
}
KNN = {
    "evals__knn__every_epochs": 1,
    "evals__knn__train": "demo:train:4",
    "evals__knn__test": "demo:test:4",
    "evals__knn__k": 5,
}

# DINOv2 with all that it adds. 32 images: each of 8 devices computes a group of two at a time, even in two parts.
DINOV2: dict[str, Any] = {
    "method": "dinov2",
    "batch_size": 32,
    "dinov2__group_images": 2,
    "dinov2__targets": "sinkhorn",
    "dinov2__separate_head": True,
    "dinov2__patch_out_dim": 256,
    "dinov2__patch_bottleneck_dim": 16,
    "head__norm_last_layer": False,
    "model__layer_scale": 1.0,
    "model__registers": 2,
    "model__ffn": "swiglu",
    "optim__clip_by": "module",
    "optim__layer_decay": 0.9,
    "optim__freeze_by": "lr",
}
# The demo and the ablation as commands, a few steps long.
SHORT = [
    "--config.epochs=2",
    "--config.batch_size=16",
    "--config.log_every=1",
    "--config.data.source=demo:train:8",
    "--config.evals.knn.train=demo:train:3",
    "--config.evals.knn.test=demo:test:3",
    "--config.evals.knn.k=5",
    "--config.evals.probe.images=40",
]


def tiny_config(**changes: Any) -> ConfigDict:
    """The demo's config with the settings of TINY; changes by dotted name with `__` for the dot."""
    config = demo.get_config()
    config.update_from_flattened_dict(TINY | dotted(changes))
    return config


def tiny_flags(**changes: Any) -> list[str]:
    """`tiny_config` as flags of train.py."""
    return ["--config=configs/demo.py", *(f"--config.{key}={value}" for key, value in (TINY | dotted(changes)).items())]


def dotted(changes: dict[str, Any]) -> dict[str, Any]:
    """The changes with `.` for `__` in their names."""
    return {key.replace("__", "."): value for key, value in changes.items()}
