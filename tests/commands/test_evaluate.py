"""One evaluation over several processes."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from processes import ROOT, Process, free_port

from dino_jax.commands import evaluate
from dino_jax.distributed import processes
from dino_jax.evals import PROTOCOLS
from dino_jax.weights import official, tensor_files

pytestmark = pytest.mark.slow

CARD = {"arch": "vit_nano", "patch_size": 8, "in_channels": 3, "image_size": 40, "embed_dim": 64}
LABELED = {"train": "folder:{}/train", "test": "folder:{}/test", "batch_size": 8, "workers": 0}
SETTINGS = {  # of each protocol; {} stands for the folder of images
    "knn": {**LABELED, "k": (1, 5), "shots": (2,)},
    "linear": {**LABELED, "epochs": 1, "lr": (0.1,)},
    "features": {"source": "folder:{}/train", "batch_size": 8, "workers": 0},
    "copy_detection": {"data": "{}", "batch_size": 4, "sheet": 2},
    "segmentation": {"data": "{}/scenes", "size": 32, "steps": 2, "batch_size": 2, "bank": 40, "k": 3, "workers": 0},
    "patch_pca": {"images": "{}/test/0"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of three classes in train/ and test/, copies in original/ and strong/, scenes/, weights.safetensors."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 7), ("test", 3)):
        for label in range(3):
            (folder / split / str(label)).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (44, 52, 3), np.uint8) // (label + 1)
                Image.fromarray(pixels).save(folder / split / str(label) / f"{number}.png")
    for kind in ("original", "strong"):
        (folder / kind).mkdir()
        for number in range(5):
            pixels = rng.integers(0, 256, (44, 52, 3), np.uint8)
            Image.fromarray(pixels).save(folder / kind / f"{number:04d}.png")
    for kind in ("images", "masks"):
        (folder / "scenes" / kind).mkdir(parents=True)
    for number in range(5):
        labels = np.arange(44 * 52).reshape(44, 52).astype(np.uint8) // 128
        Image.fromarray(labels).save(folder / "scenes" / "masks" / f"{number}.png")
        Image.fromarray(rng.integers(0, 256, (44, 52, 3), np.uint8)).save(
            folder / "scenes" / "images" / f"{number}.png"
        )
    like = official.backbone_like(CARD)["params"]
    weights = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), like)
    tensor_files.write(folder / "weights.safetensors", official.to_official(weights))
    return folder


def run_all(folder, out):
    """Runs each protocol of SETTINGS in this process, or in the processes that it has joined."""
    for protocol, settings in SETTINGS.items():
        config = PROTOCOLS[protocol].default_config()
        config.update({key: x.format(folder) if isinstance(x, str) else x for key, x in settings.items()})
        evaluate.evaluate(protocol, str(folder / "weights.safetensors"), config, out / protocol)


def files_of(out):
    """Names of the files that a protocol leaves for its user."""
    return {path.name for path in out.rglob("*") if path.suffix in (".json", ".npy", ".csv", ".png")}


@pytest.fixture(scope="module")
def together(folder):
    """The results of two processes, and what process 1 printed."""
    joined = [__file__, str(folder), f"localhost:{free_port()}"]
    both = [Process(folder / f"{i}.log", *joined, str(i)) for i in range(2)]
    outputs = [process.finish() for process in both]
    return folder / "together", outputs


@pytest.fixture(scope="module")
def alone(folder):
    run_all(folder, folder / "alone")
    return folder / "alone"


@pytest.mark.parametrize("protocol", SETTINGS)
def test_two_processes_give_the_results_of_one(alone, together, protocol):
    # Batches have other sizes, so that sums are rounded otherwise.
    ours, theirs = (
        json.loads((out / protocol / "results.json").read_text(), parse_float=lambda text: round(float(text), 3))
        for out in (together[0], alone)
    )
    assert ours.get("figures") == theirs.get("figures")
    assert ours["settings"] == theirs["settings"]
    assert files_of(together[0] / protocol) == files_of(alone / protocol)


def test_features_are_in_the_order_of_the_source(alone, together):
    ours, theirs = (np.load(out / "features" / "features.npy") for out in (together[0], alone))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (together[0] / "features" / "images.csv").read_bytes() == (alone / "features" / "images.csv").read_bytes()


def test_only_process_0_prints_and_writes(together):
    out, (first, second) = together
    assert "written to" in first
    assert "written to" not in second
    assert not list(out.rglob(".*"))


def test_a_mistake_on_one_process_ends_both(folder, tmp_path):
    """Process 1 does not see the images."""
    port = free_port()
    both = [
        Process(
            tmp_path / f"{i}.log",
            str(ROOT / "evaluate.py"),
            "knn",
            f"--checkpoint={folder / 'weights.safetensors'}",
            f"--out={tmp_path / 'out'}",
            f"--config.train=folder:{folder / ('train' if i == 0 else 'absent')}",
            f"--config.test=folder:{folder / 'test'}",
            f"--config.distributed.coordinator=localhost:{port}",
            "--config.distributed.num_processes=2",
            f"--config.distributed.process_id={i}",
        )
        for i in range(2)
    ]
    outputs = [process.finish(code=2) for process in both]
    assert "absent" in outputs[1]
    assert "process 1 could not go on" in outputs[0]
    assert "absent" in outputs[0]


if __name__ == "__main__":
    images, coordinator, process = sys.argv[1:]
    joining = {"auto": False, "coordinator": coordinator, "num_processes": 2, "process_id": int(process)}
    processes.initialize(ConfigDict({**joining, "timeout": 300, "heartbeat": 60}))
    run_all(Path(images), Path(images) / "together")
