import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from backbones import Pooled, as_tokens
from PIL import Image
from tolerances import assert_close

from dino_jax.data.pipeline import train_batches
from dino_jax.data.pixels import Pixels
from dino_jax.data.sources import open_source
from dino_jax.distributed.sharding import distribute, make_mesh, replicate, shard_batch
from dino_jax.errors import UserError
from dino_jax.evals import knn, linear
from dino_jax.evals.common import linear_heads
from dino_jax.evals.common.linear_heads import Kind, probe_features
from dino_jax.models import build_backbone
from dino_jax.models.vit import ViT
from dino_jax.weights.backbone import Backbone

COLORS = np.array([(200, 60, 40), (60, 190, 80), (40, 70, 210)])


def card(channels, size, arch="resnet18"):
    return {
        "architecture": {"arch": arch, "in_channels": channels},
        "preprocessing": {"resize": size, "crop": size, "mean": [0.5] * channels, "std": [0.25] * channels},
    }


def mean_color(variables, images):
    return images.mean((1, 2))


@pytest.fixture(scope="module")
def colors():
    """A backbone that sees the mean color, at 8 pixels."""
    return Backbone(Pooled(mean_color), {}, card(3, 8))


@pytest.fixture(scope="module")
def vit():
    """A ViT for the demo's garments with weights large enough that its features differ from image to image."""
    model = ViT(48, 2, 4, patch_size=8, image_size=32)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 1)))
    return Backbone(model, jax.tree.map(lambda x: 5 * x, variables), card(1, 32, "vit"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """48 training and 12 test images of one color each, near the colors of three classes; folder of both."""
    root, rng = tmp_path_factory.mktemp("colors"), np.random.default_rng(0)
    for split, number in (("train", 16), ("test", 4)):
        for name, color in zip(("blue", "green", "red"), COLORS[::-1], strict=True):
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                pixel = np.clip(color + rng.integers(-40, 40, 3), 0, 255)
                Image.new("RGB", (9, 12), tuple(pixel.tolist())).save(root / split / name / f"{i}.png")
    return root


def settings(folders, **values):
    config = linear.default_config()
    config.update({"train": f"folder:{folders}/train", "test": f"folder:{folders}/test", "workers": 0})
    config.update({"epochs": 3, "batch_size": 24, "lr": (0.01, 0.1), **values})
    return config


def saved(out):
    with np.load(out / linear.STATE_FILE) as file:
        return dict(file)


def test_features_are_the_references(golden):
    arrays, meta = golden("vit")
    for height, width in meta["config"]["sizes"]:
        size = f"{height}x{width}"
        blocks = [as_tokens(jnp.asarray(arrays[f"inter2_{which}_{size}"])) for which in ("first", "last")]
        np.testing.assert_array_equal(probe_features(blocks, Kind(2, "cls")), arrays[f"linear_n2_{size}"])
        assert_close(probe_features(blocks, Kind(1, "cls_mean")), arrays, f"linear_n1_avgpool_{size}", meta)


def test_features_are_those_of_dinov2(golden2):
    arrays, meta = golden2("evals2")
    blocks = [
        as_tokens(np.concatenate([cls[:, None], patches], 1))
        for cls, patches in zip(arrays["in/tokens_cls"], arrays["in/tokens_patch"], strict=True)
    ]
    for n in (1, 4):
        for number, pooling in enumerate(("cls", "cls_then_mean")):
            features = probe_features(blocks, Kind(n, pooling))
            assert_close(features, arrays, f"linear_input_n{n}_avgpool{number}", meta)


def test_older_blocks_come_before_the_last_one_with_its_mean():
    older, last = (jax.random.normal(jax.random.key(i), (2, 5, 3)) for i in range(2))
    features = probe_features([as_tokens(older), as_tokens(last)], Kind(2, "cls_mean"))
    assert features.shape == (2, 9)
    np.testing.assert_array_equal(features[:, :3], older[:, 0])
    np.testing.assert_array_equal(features[:, 3::2], last[:, 0])
    np.testing.assert_allclose(features[:, 4::2], last[:, 1:].mean(1), rtol=1e-6)


@pytest.mark.parametrize(
    ("arch", "kind"),
    [
        ("vit_small", Kind(4, "cls")),
        ("vit_base", Kind(1, "cls_mean")),
        ("vit_nano", Kind(3, "cls")),
        ("resnet18", Kind(1, "cls")),
    ],
)
def test_official_head_is_in_the_default_grid(arch, kind):
    config, backbone = linear.default_config(), Backbone(build_backbone(arch), {}, {"architecture": {"arch": arch}})
    assert linear_heads.official_kind(backbone) == kind
    assert kind in linear_heads.feature_kinds(backbone, config.blocks, config.pooling.split(","))
    assert linear.OFFICIAL_LR in config.lr


def plain_training(features, labels, order, weights, config, steps_per_epoch):
    """SGD with momentum and torch's CosineAnnealingLR, as a page would state it, in float64: weights and biases."""
    weights, classes = weights.astype(np.float64), weights.shape[1]
    bias, velocity, losses = np.zeros(classes), [0, 0], []
    for step, rows in enumerate(order):
        epoch = step // steps_per_epoch if config["decay"] == "epoch" else step / steps_per_epoch
        lr = config["lr"] * config["batch_size"] / 256 * (1 + np.cos(np.pi * epoch / config["epochs"])) / 2
        x, truth = features[rows], np.eye(classes)[labels[rows]]
        z = x @ weights + bias
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        losses.append(-np.log((p * truth).sum(1)).mean())
        error = (p - truth) / len(rows)
        velocity = [0.9 * v + g for v, g in zip(velocity, (x.T @ error, error.sum(0)), strict=True)]
        weights, bias = weights - lr * velocity[0], bias - lr * velocity[1]
    return weights, bias, np.mean(losses[-steps_per_epoch:])


@pytest.mark.parametrize("decay", ["epoch", "step"])
def test_training_is_plain_sgd_with_momentum_and_a_cosine(colors, folders, tmp_path, decay):
    """Images of one color: whatever the crop, their features are the same."""
    config = settings(folders, lr=(0.5, 2.0), decay=decay)
    results = linear.run(colors, config, tmp_path)
    source = open_source(config.train)
    features = np.array([np.array(Image.open(f"{folders}/train/{path}"))[0, 0] for path in source.paths])
    features = (features / 255 - 0.5) / 0.25
    with train_batches(source, batch_size=24, canvas_size=8, pixels=Pixels(3), seed=0) as batches:
        order = [next(batches).index for _ in range(6)]
    probe = linear.design(colors, config, 3, 48, 1)
    start, end = linear_heads.init_heads(probe, {})["cls_1"]["kernel"], saved(tmp_path)
    for i, lr in enumerate(config.lr):
        one = {"lr": lr, "batch_size": 24, "epochs": 3, "decay": decay}
        weights, bias, loss = plain_training(features, source.labels, order, start[:, i], one, steps_per_epoch=2)
        # Crops of one color are that color to 1e-6 of 255; the rest is float32.
        np.testing.assert_allclose(end["heads/cls_1/kernel"][:, i], weights, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(end["heads/cls_1/bias"][i], bias, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(end["history/loss"][-1, 0, i], loss, rtol=1e-4)
    assert results["figures"]["best"]["last"]["top1"] == 100


def test_any_number_of_classes_an_image(colors, folders, tmp_path):
    """Images of one color; red or green is the one class, green or blue the other."""
    for split in ("train", "test"):
        source = open_source(f"folder:{folders}/{split}")
        rows = ["name,label"]
        for path in source.paths:
            strongest = np.array(Image.open(f"{folders}/{split}/{path}"))[0, 0].argmax()
            labels = ["warm"] * int(strongest < 2) + ["cool"] * int(strongest > 0)
            rows.append(f"{path},{';'.join(labels)}")
        (tmp_path / f"{split}.csv").write_text("\n".join(rows))
    spec = f"folder:{folders}/{{0}}?labels={tmp_path}/{{0}}.csv"
    config = settings(folders, train=spec.format("train"), test=spec.format("test"), lr=(5.0,), epochs=30)
    results = linear.run(colors, config, tmp_path)
    best = results["figures"]["best"]
    assert best["last"]["mAP"] > 99, "both can be told by a plane"
    assert "top1" not in best
    assert "mAP" in linear.table(results["figures"])
    with pytest.raises(UserError, match="several labels an image: use `dino-jax evaluate linear`"):
        knn.labeled_source(config.train, "train")


@pytest.fixture(scope="module")
def grid(vit, tmp_path_factory):
    """(results, state) of a grid on the demo's garments."""
    out = tmp_path_factory.mktemp("grid")
    return linear.run(vit, demo_settings(), out), saved(out)


def demo_settings(**values):
    config = linear.default_config()
    config.update({"train": "demo:train:32", "test": "demo:test:20", "workers": 0, "val_every": 4})
    config.update({"epochs": 6, "batch_size": 32, "lr": (0.001, 0.05, 0.5), "scale": (0.5, 1.0), **values})
    return config


@pytest.mark.slow
def test_learns_more_than_chance_and_reports_the_grid(grid):
    results, state = grid
    figures = results["figures"]
    # 200 test images of 10 classes: chance is 10, its standard deviation 2.1.
    assert figures["best"]["last"]["top1"] > 25
    assert set(figures["grid"]) == {"cls_1", "cls_2", "cls_mean_1", "cls_mean_2"}
    assert figures["official"] == figures["grid"]["cls_2"]["0.001"]
    heads = [head for column in figures["grid"].values() for head in column.values()]
    assert figures["best"]["top1"] == max(head["top1"] for head in heads)
    assert all(head["top1"] >= head["last"]["top1"] and head["top5"] >= head["top1"] for head in heads)
    assert {head["epoch"] for head in heads} <= {4, 6}
    assert all(head["last"]["epoch"] == 6 for head in heads)
    assert results["images"] == {"train": 320, "test": 200}
    json.dumps(results)
    assert (np.diff(state["history/loss"], axis=0) < 0).any()


def test_a_head_alone_is_that_head_in_the_grid(vit, grid, tmp_path):
    config = demo_settings(lr=(0.05,), blocks=(1,), pooling="cls_mean")
    results, (in_grid, state) = linear.run(vit, config, tmp_path), grid
    alone = saved(tmp_path)
    # The same sums in another order of rounding.
    for name in ("kernel", "bias"):
        ours, theirs = alone[f"heads/cls_mean_1/{name}"], state[f"heads/cls_mean_1/{name}"]
        theirs = theirs[:, 1:2] if name == "kernel" else theirs[1:2]
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
    assert results["figures"]["official"] is None
    one, same = results["figures"]["best"], in_grid["figures"]["grid"]["cls_mean_1"]["0.05"]
    assert abs(one["top1"] - same["top1"]) <= 0.5  # an image on the edge


def test_the_grid_of_dinov2(vit, tmp_path):
    """Its heads see the same features as DINO's, in another order, and its rates fall each step."""
    rates = 0.001, 0.05
    config = demo_settings(epochs=2, lr=rates, blocks=(1, 2), pooling="cls,cls_then_mean", decay="step")
    figures = linear.run(vit, config, tmp_path)["figures"]
    assert list(figures["grid"]) == ["cls_1", "cls_2", "cls_then_mean_1", "cls_then_mean_2"]
    assert figures["official"] is None
    heads = [head["top1"] for column in figures["grid"].values() for head in column.values()]
    assert len(heads) == 8
    assert figures["best"]["top1"] == max(heads)
    header = linear.table(figures).splitlines()[1]
    assert header.split() == ["lr", *figures["grid"]]


def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(colors, folders, tmp_path, monkeypatch):
    config = settings(folders, epochs=4)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    results = linear.run(colors, config, whole)

    save = linear.save_state

    def save_twice(file, settings, state, history):
        save(file, settings, state, history)
        if len(history) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(linear, "save_state", save_twice)
    with pytest.raises(KeyboardInterrupt):
        linear.run(colors, config, cut)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"unfinished run with another epochs, lr: .* --out"):
        linear.run(colors, settings(folders, epochs=3, lr=(0.1,)), cut)
    resumed = linear.run(colors, config, cut)
    assert resumed["figures"] == results["figures"]
    ours, theirs = saved(cut), saved(whole)
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    # Started once more, it only reports.
    monkeypatch.setattr(linear, "train_batches", None)
    again = linear.run(colors, config, cut)
    assert again["figures"] == results["figures"]
    json.dumps(again)


def test_a_finished_run_makes_room_for_another_and_damage_is_named(colors, folders, tmp_path):
    linear.run(colors, settings(folders, epochs=1), tmp_path)
    other = linear.run(colors, settings(folders, epochs=1, lr=(0.2,)), tmp_path)
    assert list(other["figures"]["grid"]["cls_1"]) == ["0.2"]
    file = tmp_path / linear.STATE_FILE
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"linear_state.npz is damaged .* delete it"):
        linear.run(colors, settings(folders, epochs=1, lr=(0.2,)), tmp_path)


def test_broken_heads_ties_and_padding_are_never_right(colors, folders):
    config = settings(folders, lr=(0.1, 0.2), batch_size=8)
    probe = linear.design(colors, config, 7, 8, 1)
    heads = {"cls_1": {"kernel": np.zeros((3, 2, 7), np.float32), "bias": np.zeros((2, 7), np.float32)}}
    heads["cls_1"]["bias"][1] = np.nan
    mesh = make_mesh()
    state = replicate(linear_heads.ProbeState(np.int32(0), {}, heads, heads), mesh)
    rows = linear_heads.EvalRows(np.zeros((8, 8, 8, 3), np.uint8), np.array([0, 1, 2, 3, 4, 5, 6, -1], np.int32))
    count = distribute(lambda state, rows: linear_heads.eval_step(probe, state, rows), mesh, donate=False)
    images, right = count(state, shard_batch(rows, mesh))
    assert images == 7
    # All classes equal: the lower ones come first, so only class 0 is right at once, and 0..4 in five.
    assert np.array_equal(right[:, 0], [[1, 0], [5, 0]])


def test_undecodable_images_are_left_out_and_counted(colors, folders, tmp_path, capsys):
    for split in ("train", "test"):
        for path in sorted((folders / split).glob("*/*.png")):
            copy = tmp_path / path.relative_to(folders)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(b"damaged" if path.name == "1.png" and path.parent.name == "red" else path.read_bytes())
    results = linear.run(colors, settings(tmp_path, epochs=2), tmp_path)
    assert results["undecodable"] == {"train": 1, "test": 1}
    assert results["images"]["test"] == 11
    assert capsys.readouterr().err.count(os.path.join("red", "1.png")) == 1


PROGRAM = """
import sys, jax
from pathlib import Path
from types import SimpleNamespace
from dino_jax.distributed import sharding
from dino_jax.models import Tokens
from dino_jax.weights.backbone import Backbone
from dino_jax.evals import knn, linear
assert jax.device_count() == 4
card = {"architecture": {"arch": "resnet18", "in_channels": 1}}
card |= {"preprocessing": {"resize": 8, "crop": 8, "mean": [0.5], "std": [0.25]}}
def pixels(variables, images, n, method):
    return [Tokens(cls=images.reshape(len(images), -1), registers=None, patches=None, grid=(1, 1))]
backbone = Backbone(SimpleNamespace(apply=pixels), {}, card)
config = linear.default_config()
config.update({"train": "demo:train:3", "test": "demo:test:2", "workers": 0})
config.update({"epochs": 3, "batch_size": 12, "lr": (0.5, 5.0)})
for devices in (1, 4):
    linear.make_mesh = lambda: sharding.make_mesh(jax.devices()[:devices])
    out = Path(sys.argv[1]) / str(devices)
    out.mkdir()
    linear.run(backbone, config, out)
"""


@pytest.mark.slow
def test_four_devices_equal_one(tmp_path):
    """With random crops, a test set that does not fill its last batch and epochs that run into one another."""
    flags = {"XLA_FLAGS": processes.xla_flags(4), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    subprocess.run(command, env={**os.environ, **flags}, check=True, timeout=120)
    one, four = saved(tmp_path / "1"), saved(tmp_path / "4")
    for key in ("heads/cls_1/kernel", "heads/cls_1/bias", "history/loss"):
        np.testing.assert_allclose(four[key], one[key], rtol=1e-4, atol=1e-5, err_msg=key)
    assert np.array_equal(four["history/images"], [20, 20, 20])


def test_mistakes_are_named(colors, folders, tmp_path):
    for values, message in (
        ({"train": ""}, "config.train is empty"),
        ({"test": f"folder:{folders}/test/red"}, "no labels"),
        ({"test": f"folder:{folders}"}, "different class folders"),
        ({"epochs": 0}, "epochs is 0: set --config.epochs"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 49}, "48 training images are fewer than a batch of 49: set --config.batch_size to 48"),
        ({"val_every": 0}, "val_every"),
        ({"workers": -1}, "workers"),
        ({"lr": ()}, "config.lr"),
        ({"lr": (0.1, -1.0)}, "config.lr"),
        ({"blocks": (0,)}, "config.blocks"),
        ({"decay": "batch"}, "decay 'batch' is unknown: set --config.decay to epoch or step"),
        ({"pooling": "cls,gem"}, "pooling 'cls,gem' is unknown: set --config.pooling to some of cls,cls_mean"),
        ({"scale": (0.5, 0.1)}, "config.scale"),
        ({"flip": 2.0}, "config.flip"),
        ({"crop": 9}, "config.resize to 9"),
    ):
        with pytest.raises(UserError, match=message) as error:
            linear.run(colors, settings(folders, **values), tmp_path)
        assert "\n" not in str(error.value)


def test_batches_that_do_not_divide_and_crops_without_a_patch_are_named(colors, vit, folders):
    with pytest.raises(UserError, match=r"25 does not divide over 8 devices: set --config.batch_size to 32"):
        linear.design(colors, settings(folders, batch_size=25), 3, 48, 8)
    with pytest.raises(UserError, match=r"crop 7 is smaller than a patch: set --config.crop to 8"):
        linear.design(vit, settings(folders, crop=7), 3, 48, 1)


@pytest.mark.parametrize("label", [-1, 3])
def test_images_without_a_class_are_named(label):
    source = SimpleNamespace(num_classes=3, name=lambda i: f"image {i}")
    with pytest.raises(UserError, match=r"config.test: image 17 has no label in 0..2"):
        linear.checked_labels(source, "test", [0, label, 2], np.array([16, 17, 18]))


def test_what_cannot_be_written_is_named(tmp_path):
    state = linear_heads.ProbeState(np.int32(0), {}, {}, {})
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"can't write .*--out"):
        linear.save_state(tmp_path / "file" / linear.STATE_FILE, {}, state, [])
