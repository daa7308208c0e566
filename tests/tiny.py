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
