import json
import os
import subprocess
import sys

import jax
import numpy as np
import processes
import pytest
from PIL import Image

from dino_jax.errors import UserError
from dino_jax.evals import segmentation
from dino_jax.evals.common.label_maps import write_labels
from dino_jax.models import Tokens, build_backbone
from dino_jax.weights import official, tensor_files
from dino_jax.weights.backbone import Backbone

COLORS = np.array([(40, 60, 90), (230, 30, 20), (250, 240, 60)])  # of the classes


def card(arch="vit_nano", **architecture):
    return {
        "architecture": {"arch": arch, "in_channels": 3, **architecture},
        "preprocessing": {"mean": [0.5] * 3, "std": [0.25] * 3, "resize": 16, "crop": 16},
    }


@pytest.fixture(scope="module")
def vit():
    model = build_backbone("vit_nano", patch_size=4, image_size=16)
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))
    return Backbone(model, variables, card())


class Cells:
    """In the place of a convnet's module: its map has the mean colors of cells of 4 x 4 pixels."""

    def apply(self, variables, images, n, method):
        rows, columns = images.shape[1] // 4, images.shape[2] // 4
        cells = images.reshape(len(images), rows, 4, columns, 4, 3).mean((2, 4))
        return [Tokens(cells.mean((1, 2)), None, cells.reshape(len(images), -1, 3), (rows, columns))]


@pytest.fixture(scope="module")
def colors():
    """A backbone without attention whose patches see the color."""
    return Backbone(Cells(), {}, card("resnet18"))


def scene(rng, shape=(44, 62)):
    """An image with two shapes on a background, whose colors decide the class, and its labels."""
    labels = np.zeros(shape, np.uint8)
    y, x = np.mgrid[: shape[0], : shape[1]]
    for label in (1, 2):
        center = rng.uniform(0.2, 0.8, 2) * shape
        reach = np.abs(y - center[0]), np.abs(x - center[1])
        labels[np.maximum(*reach) < 9 if label == 1 else np.hypot(*reach) < 11] = label
    noise = rng.integers(-15, 16, (*shape, 3))
    return np.clip(COLORS[labels] + noise, 0, 255).astype(np.uint8), labels


def make_voc(root, train=6, val=3):
    """VOC's layout, with images of several shapes; the outline of class 2 is void."""
    rng = np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        names = [f"{split}{i}" for i in range(count)]
        for i, name in enumerate(names):
            image, labels = scene(rng, [(44, 62), (62, 44), (40, 40)][i % 3])
            Image.fromarray(image).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
            inner = labels == 2
            inner[1:-1, 1:-1] &= (labels == 2)[2:, 1:-1] & (labels == 2)[:-2, 1:-1]
            write_labels(root / "SegmentationClass" / f"{name}.png", np.where((labels == 2) & ~inner, 255, labels))
        (root / "ImageSets/Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return root


def make_folders(root, splits, images="images", masks="masks", shift=0):
    """Two folders with the same stems, of the given splits below; labels are shifted."""
    rng = np.random.default_rng(1)
    for split, count in splits.items():
        for folder in (images, masks):
            (root / folder / split).mkdir(parents=True)
        for i in range(count):
            image, labels = scene(rng)
            Image.fromarray(image).save(root / images / split / f"{i}.jpg", quality=95)
            Image.fromarray(labels + np.uint8(shift)).save(root / masks / split / f"{i}.png")
    return root


def settings(root, **values):
    config = segmentation.default_config()
    small = {"size": 32, "steps": 60, "batch_size": 8, "lr": 0.1, "k": 5, "bank": 400, "workers": 2}
    config.update({"data": str(root), **small, **values})
    return config


def test_shapes_are_found_by_their_colors(vit, tmp_path, capsys):
    out = tmp_path / "out"
    results = segmentation.run(vit, settings(make_voc(tmp_path / "voc")), out)
    # Edges between patches of 4 pixels are blurred by a pixel or two.
    assert results["figures"]["linear"]["mIoU"] > 85
    assert results["figures"]["knn"]["mIoU"] > 75
    assert results["figures"]["linear"]["pixel_accuracy"] > 92
    assert list(results["classes"]) == ["0", "1", "2"]
    assert np.mean([one["knn"] for one in results["classes"].values()]) == pytest.approx(
        results["figures"]["knn"]["mIoU"]
    )
    assert results["images"] == {"train": 6, "val": 3}
    assert results["settings"]["ignore"] == 255
    assert f"{results['figures']['knn']['mIoU']:.2f}" in capsys.readouterr().out
    with Image.open(out / "segmentation.png") as sheet:
        assert sheet.width > 4 * segmentation.TILE
    json.dumps(results)


@pytest.mark.parametrize("arch", ["colors", "resnet18"])
def test_convnets_give_their_last_map(colors, tmp_path, arch):
    backbone = colors
    if arch == "resnet18":
        model = build_backbone("resnet18")
        backbone = Backbone(model, jax.jit(model.init)(jax.random.key(0), np.zeros((1, 32, 32, 3))), card("resnet18"))
    config = settings(make_voc(tmp_path / "voc"), steps=60 if arch == "colors" else 2, blocks=4)
    figures = segmentation.run(backbone, config, tmp_path / "out")["figures"]
    assert set(figures) == {"linear", "knn"}
    if arch == "colors":
        assert min(one["mIoU"] for one in figures.values()) > 80


def test_the_seed_decides(colors, tmp_path):
    root = make_folders(tmp_path / "own", {"": 8})
    config = settings(root, steps=5)
    first, again, other = (
        segmentation.run(colors, settings(root, steps=5, seed=seed, workers=workers), tmp_path / f"out{seed}{workers}")
        for seed, workers in ((0, 2), (0, 0), (1, 2))
    )
    assert config.val_share == 0.2
    assert first["images"] == {"train": 6, "val": 2}
    assert (first["loss"], first["figures"]) == (again["loss"], again["figures"])
    assert first["loss"] != other["loss"]


def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(colors, tmp_path, monkeypatch, capsys):
    config, (whole, cut) = settings(make_voc(tmp_path / "voc"), steps=7), (tmp_path / "whole", tmp_path / "cut")
    expected = segmentation.run(colors, config, whole)
    monkeypatch.setattr(segmentation, "SAVE_EVERY", 3)
    save = segmentation._save

    def save_once(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(segmentation, "_save", save_once)
    with pytest.raises(KeyboardInterrupt):
        segmentation.run(colors, config, cut)
    monkeypatch.setattr(segmentation, "_save", save)
    results = segmentation.run(colors, config, cut)
    assert "the linear layer after 3 steps" in capsys.readouterr().err
    assert (results["loss"], results["figures"]) == (expected["loss"], expected["figures"])
    # Other settings of validation train nothing.
    monkeypatch.setattr(segmentation, "random_crop", None)
    monkeypatch.setattr(segmentation, "collect_bank", None)
    config.update({"k": 1, "overlap": 0.5, "rows": 0})
    assert segmentation.run(colors, config, cut)["loss"] == expected["loss"]


def test_layouts(colors, tmp_path):
    ade = make_folders(tmp_path / "ade", {"training": 4, "validation": 2}, masks="annotations")
    with Image.open(ade / "annotations/training/0.png") as mask:
        background = (np.array(mask) == 0).mean()
    assert background > 0.5
    results = segmentation.run(colors, settings(ade, steps=1, k=0, rows=0), tmp_path / "a")
    assert results["settings"]["ignore"] == 0
    assert list(results["classes"]) == ["1", "2"]
    assert list(results["figures"]) == ["linear"]
    assert not list((tmp_path / "a").glob("*.png"))
    own = make_folders(tmp_path / "own", {"train": 4, "val": 2}, shift=253)  # labels 253, 254, 255
    for ignore, labels in ((None, ["253", "254"]), (-1, ["253", "254", "255"]), (253, ["254", "255"])):
        results = segmentation.run(colors, settings(own, steps=1, k=0, ignore=ignore), tmp_path / "b")
        assert list(results["classes"]) == labels
        assert results["images"] == {"train": 4, "val": 2}


def test_a_plain_linear_layer(colors, tmp_path):
    config = settings(make_voc(tmp_path / "voc"), batch_norm=False, k=0)
    assert segmentation.run(colors, config, tmp_path / "out")["figures"]["linear"]["mIoU"] > 75


def test_mistakes_in_the_data_are_named(colors, tmp_path):
    def fails(message, change, make=make_voc, **values):
        root = make(tmp_path / str(len(list(tmp_path.iterdir()))))
        change(root)
        with pytest.raises(UserError, match=message) as error:
            segmentation.run(colors, settings(root, **{"steps": 1, **values}), tmp_path / "out")
        assert "\n" not in str(error.value)

    def own(root):
        return make_folders(root, {"": 4})

    lists, masks = "ImageSets/Segmentation", "SegmentationClass"
    fails("none of the folders SegmentationClass", lambda root: (root / masks).rename(root / "labels"))
    fails("ImageSets/Segmentation/val.txt is missing", lambda root: (root / lists / "val.txt").unlink())
    fails("train.txt is empty", lambda root: (root / lists / "train.txt").write_text("\n"))
    fails("1 of 6 images have no mask, .*train3.png", lambda root: (root / masks / "train3.png").unlink())
    fails("1 of 4 images have no mask, .*2.png", lambda root: (root / "masks" / "2.png").unlink(), own)
    fails("masks/0.png can't be read", lambda root: (root / "masks/0.png").write_bytes(b"no picture"), own)
    fails("images/1.jpg can't be read", lambda root: (root / "images/1.jpg").write_bytes(b"no picture"), own)
    fails("no images", lambda root: [path.unlink() for path in (root / "images").iterdir()], own)
    fails("val_share 0.1 of 4", lambda root: None, own, val_share=0.1)
    small = np.zeros((44, 44), np.uint8)
    fails("44 x 44 and 62 x 44 pixels", lambda root: Image.fromarray(small).save(root / "masks/1.png"), own)
    deep = np.full((44, 62), 300, np.uint16)
    fails("at most 256 classes", lambda root: Image.fromarray(deep).save(root / "masks/1.png"), own)
    fails("has colors .* palette PNG", lambda root: Image.new("RGB", (62, 44)).save(root / "masks/1.png"), own)

    def fill(pattern, label):
        def change(root):
            for path in (root / masks).glob(pattern):
                write_labels(path, np.full_like(np.asarray(Image.open(path)), label))

        return change

    def one_gray(root):
        with Image.open(root / masks / "val0.png") as mask:
            gray = mask.convert("L")
        gray.save(root / masks / "val0.png")

    fails("no training mask has a label beside 255, which does not count: set --config.ignore", fill("*.png", 255))
    fails("no validation mask has a label beside 255", fill("val*.png", 255))
    fails("7 is the only label of the masks beside 255", fill("*.png", 7))
    fails("a conversion to gray changes labels", one_gray)


def test_mistakes_in_the_settings_are_named(vit, tmp_path):
    root = make_voc(tmp_path / "voc")
    for values, message in (
        ({"data": ""}, "config.data is empty"),
        ({"size": 3}, "set --config.size to 4"),
        ({"scale": (2.0, 0.5)}, "set --config.scale"),
        ({"k": 500}, "set --config.bank to 500"),
        ({"lr": 1e38, "steps": 4, "warmup": 0.0}, "set --config.lr below"),
        ({"size": 8, "k": 399, "steps": 1}, "patches with a class: set --config.k"),
    ):
        with pytest.raises(UserError, match=message) as error:
            segmentation.run(vit, settings(root, **values), tmp_path / "out")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="does not divide over 3 devices: set --config.batch_size to 9"):
        segmentation.check_settings(settings(root), devices=3)


@pytest.mark.slow
def test_the_command(tmp_path):
    architecture = {"arch": "vit_nano", "patch_size": 4, "in_channels": 3, "image_size": 16, "embed_dim": 64}
    rng, like = np.random.default_rng(0), official.backbone_like(architecture)["params"]
    weights = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), like)
    tensor_files.write(tmp_path / "weights.safetensors", official.to_official(weights))
    values = {"data": make_voc(tmp_path / "voc"), "size": 32, "steps": 3, "batch_size": 4, "bank": 100, "lr": 0.1}
    command = [sys.executable, str(processes.ROOT / "evaluate.py"), "segmentation", f"--out={tmp_path / 'out'}"]
    command += [f"--checkpoint={tmp_path / 'weights.safetensors'}"]
    command += [f"--config.{key}={value}" for key, value in values.items()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert 0 <= results["figures"]["linear"]["mIoU"] <= 100
    assert "mIoU" in done.stdout
    assert (tmp_path / "out" / "segmentation.png").is_file()


PROGRAM = """
import json, sys, jax
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from dino_jax.distributed import sharding
from dino_jax.evals import segmentation
from dino_jax.evals.common import images
import test_segmentation as tests
from dino_jax.weights.backbone import Backbone
assert jax.device_count() == 4
backbone = Backbone(tests.Cells(), {}, tests.card("resnet18"))
for devices in (1, 4):
    segmentation.make_mesh = images.make_mesh = lambda: sharding.make_mesh(jax.devices()[:devices])
    config = tests.settings(sys.argv[2], steps=5, rows=0)
    results = segmentation.run(backbone, config, Path(sys.argv[2]) / f"out{devices}")
    print(json.dumps([results["loss"], results["figures"]]))
"""


@pytest.mark.slow
def test_four_devices_equal_one(tmp_path):
    root = make_voc(tmp_path / "voc")
    flags = {"XLA_FLAGS": processes.xla_flags(4), "JAX_PLATFORMS": "cpu"}
    paths = os.pathsep.join(
        [os.path.dirname(__file__), str(processes.ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    )
    command = [sys.executable, "-c", PROGRAM, os.path.dirname(__file__), str(root)]
    env = {**os.environ, **flags, "PYTHONPATH": paths}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    one, four = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert one[0] == pytest.approx(four[0], rel=1e-5)
    for method in ("linear", "knn"):
        assert one[1][method] == pytest.approx(four[1][method], abs=0.1)  # pixels on the edge between two classes
