import io
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from ml_collections import ConfigDict
from PIL import Image

from dino_jax import checkpoints
from dino_jax.errors import UserError
from dino_jax.models import build_backbone
from dino_jax.weights.backbone import load_backbone, normalize

ROOT = Path(__file__).parents[2]
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@flax.struct.dataclass
class State:
    student: dict
    teacher: dict
    teacher_stats: dict


def config(arch="vit_nano", channels=3):
    return ConfigDict(
        {
            "model": {"arch": arch, "patch_size": 8, "in_channels": channels},
            "head": {"out_dim": 64},
            "optim": {"name": "adamw"},
            "crops": {"global_size": 32},
            "data": {"source": "demo", "mean": MEAN[:channels], "std": STD[:channels]},
            "eval": {"resize": 36, "crop": 32},
            "seed": 0,
            "batch_size": 16,
            "checkpoint": {"keep_last": 2, "keep_every_steps": 0},
        }
    )


def images(channels=3):
    return jax.random.normal(jax.random.key(1), (2, 32, 32, channels))


def teacher(c, seed=0):
    """A module and random variables, which no initialization makes."""
    model = build_backbone(c.model.arch, patch_size=c.model.patch_size, image_size=c.crops.global_size)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images(c.model.in_channels))
    rng = np.random.default_rng(seed)
    # Of both signs, except variances: sums of positive numbers alone would magnify rounding.
    signs = jax.tree.map_with_path(lambda path, s: 1 if path[-1].key == "var" else rng.choice([-1, 1], s.shape), shapes)
    return model, jax.tree.map(lambda s, sign: (sign * rng.uniform(0.01, 0.1, s.shape)).astype(s.dtype), shapes, signs)


def export(folder, c, seed=0):
    _, variables = teacher(c, seed)
    card = checkpoints.model_card(c, step=3)
    variables = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
    return checkpoints.write_export(folder / "export", {"variables": variables}, card)


def checkpoint(workdir, c, step=3, seed=0):
    _, variables = teacher(c, seed)
    ours = {"backbone": variables["params"], "head": {"w": np.ones(2)}}
    stats = {"backbone": variables.get("batch_stats", {}), "head": {}}
    state = State(student=jax.tree.map(np.zeros_like, ours), teacher=ours, teacher_stats=stats)
    with checkpoints.open_manager(workdir, c.checkpoint) as manager:
        checkpoints.save(manager, step, state, c)


def assert_is_teacher(backbone, c, seed=0):
    model, variables = teacher(c, seed)
    x = images(c.model.in_channels)
    assert jax.tree.structure(backbone.variables["params"]) == jax.tree.structure(variables["params"])
    np.testing.assert_allclose(backbone(x).cls, jax.jit(model.apply)(variables, x).cls, rtol=1e-4)


@pytest.mark.parametrize("store", [export, checkpoint])
@pytest.mark.parametrize(("arch", "channels"), [("vit_nano", 3), ("vit_nano", 1), ("resnet18", 3)])
def test_exports_and_checkpoints_give_the_teacher(tmp_path, store, arch, channels):
    c = config(arch, channels)
    store(tmp_path, c)
    backbone = load_backbone(tmp_path)
    assert_is_teacher(backbone, c)
    assert backbone.config == checkpoints.model_card(c, 3)["architecture"]
    assert backbone.card["provenance"]["step"] == 3


def test_tokens_have_the_patches_of_a_vit_at_any_size_and_the_cells_of_a_convnet(tmp_path):
    export(tmp_path / "vit", config())
    backbone = load_backbone(tmp_path / "vit" / "export")
    features = backbone(jnp.zeros((2, 48, 32, 3)))
    assert features.cls.shape == (2, 64)
    assert features.patches.shape == (2, 6 * 4, 64)
    assert features.grid == (6, 4)
    assert features.registers.shape == (2, 0, 64)
    assert (backbone.patch_size, backbone.num_blocks) == (8, 3)
    tokens = jax.jit(partial(backbone.model.apply, method="last_blocks"))(backbone.variables, images())[-1]
    np.testing.assert_allclose(backbone(images()).patches, tokens.patches, rtol=1e-5, atol=1e-5)
    export(tmp_path / "resnet", config("resnet18"))
    backbone = load_backbone(tmp_path / "resnet")
    features = backbone(images())
    assert features.cls.shape == (2, 512)
    assert (features.patches.shape, features.grid) == ((2, 1, 512), (1, 1))
    np.testing.assert_allclose(features.patches.mean(1), features.cls, rtol=1e-5)
    assert (backbone.patch_size, backbone.num_blocks) == (None, 1)


def test_a_run_gives_its_export_else_its_newest_intact_checkpoint(tmp_path, capsys):
    c = config()
    checkpoint(tmp_path, c, step=1, seed=1)
    checkpoint(tmp_path, c, step=2, seed=2)
    assert_is_teacher(load_backbone(tmp_path), c, seed=2)
    (tmp_path / "checkpoints" / "2" / "metadata" / "metadata").write_text("{}")
    assert_is_teacher(load_backbone(str(tmp_path)), c, seed=1)
    assert "checkpoints/2 is damaged" in capsys.readouterr().err
    assert (tmp_path / "checkpoints" / "2").is_dir()  # reading changes nothing
    folder = export(tmp_path, c, seed=3)
    assert_is_teacher(load_backbone(tmp_path), c, seed=3)
    folder.rename(tmp_path / "export.previous")  # the next export was cut off between its two renames
    assert_is_teacher(load_backbone(tmp_path), c, seed=3)


def test_what_is_no_backbone_is_named_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"it holds config\.json\): give a run's workdir") as error:
        load_backbone(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no weights"):
        load_backbone(tmp_path)
    with pytest.raises(UserError, match="no such path"):
        load_backbone(tmp_path / "absent")
    with pytest.raises(UserError, match="not a weights file"):
        load_backbone(tmp_path / "config.json")


def test_a_damaged_export_is_refused(tmp_path):
    folder = export(tmp_path, config())
    largest = max((p for p in (folder / "variables").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(bytes(data))
    with pytest.raises(UserError, match="has changed"):
        load_backbone(folder)


@pytest.fixture(scope="module")
def rgb_backbone(tmp_path_factory):
    return load_backbone(export(tmp_path_factory.mktemp("rgb"), config()))


def test_preprocess_resizes_crops_and_normalizes(rgb_backbone):
    colors = np.zeros((72, 144, 3), np.uint8)
    colors[:, 40:104] = (255, 51, 0)  # the center, 32 of the 72 columns after the resize
    out = rgb_backbone.preprocess([colors, Image.fromarray(colors)])
    assert out.shape == (2, 32, 32, 3)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out[0, 16, 16], (np.array([1, 0.2, 0]) - MEAN) / STD, rtol=1e-5)
    np.testing.assert_array_equal(out[0], out[1])
    assert rgb_backbone(out).cls.shape == (2, 64)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "CMYK", "I;16", "F"])
def test_preprocess_reads_a_pil_image_as_the_pipeline_reads_its_file(rgb_backbone, mode):
    ramp = np.linspace(0, 255, 40 * 40).reshape(40, 40)
    if mode == "I;16":
        picture = Image.fromarray((ramp * 257).astype(np.uint16))
    else:
        picture = Image.fromarray(ramp.astype(np.uint8)).convert("RGB" if mode == "CMYK" else "L").convert(mode)
    if mode == "F":
        picture = Image.fromarray((ramp / 255).astype(np.float32))
    assert picture.mode == mode
    file = io.BytesIO()
    picture.save(file, "TIFF")
    from_image, from_file = rgb_backbone.preprocess([picture, file.getvalue()])
    np.testing.assert_array_equal(from_image, from_file)
    assert from_image.std() > 0.5  # neither all black nor all white


def test_preprocess_turns_an_image_as_its_exif_says(rgb_backbone):
    picture = Image.fromarray(np.repeat(np.arange(0, 240, 5, dtype=np.uint8)[:, None], 48, axis=1))
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 3
    picture.save(file, "PNG", exif=exif)
    turned = rgb_backbone.preprocess([Image.open(io.BytesIO(file.getvalue()))])[0]
    assert turned[0].mean() > turned[-1].mean()


def test_preprocess_of_one_picture_in_any_type_is_the_same(rgb_backbone):
    picture = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    expected = rgb_backbone.preprocess([picture])
    for dtype in (np.int32, np.int64, np.uint16, np.float32):
        same = rgb_backbone.preprocess([picture.astype(dtype)], range=(0, 255))
        np.testing.assert_array_equal(same, expected)
    np.testing.assert_array_equal(rgb_backbone.preprocess([picture / np.float32(255)]), expected)
    with pytest.raises(UserError, match=r"image 0 .*int32 pixels have no range"):
        rgb_backbone.preprocess([picture.astype(np.int32)])


def test_preprocess_names_the_image_that_cannot_be_decoded(rgb_backbone):
    with pytest.raises(UserError, match="image 1 "):
        rgb_backbone.preprocess([np.zeros((40, 40, 3), np.uint8), b"not an image"])


def test_normalize_is_the_same_on_host_and_device():
    values = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    host, device = normalize(values, MEAN, STD), normalize(jnp.asarray(values), MEAN, STD)
    assert host.dtype == device.dtype == np.float32
    np.testing.assert_allclose(host, device, rtol=1e-6)


def test_card_is_readable_without_dino_jax(tmp_path):
    card = json.loads((export(tmp_path, config()) / "card.json").read_text())
    assert card["preprocessing"]["mean"] == list(MEAN)


def test_last_blocks_and_attention_are_the_models_own(tmp_path):
    backbone = load_backbone(export(tmp_path, config()))
    x = jax.random.normal(jax.random.key(2), (2, 48, 32, 3))
    tokens = jax.jit(partial(backbone.model.apply, n=3, method="last_blocks"))(backbone.variables, x)
    blocks = backbone.last_blocks(x, 3)
    assert [features.grid for features in blocks] == [(6, 4)] * 3
    for features, expected in zip(blocks, tokens, strict=True):
        np.testing.assert_allclose(features.cls, expected.cls, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(features.patches, expected.patches, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(backbone(x).patches, blocks[-1].patches, rtol=1e-5, atol=1e-5)
    attention = backbone.attention(x)
    assert attention.shape == (2, 4, 25, 25)
    np.testing.assert_allclose(attention.sum(-1), 1, rtol=1e-5)
    with pytest.raises(UserError, match="1 to 3 blocks"):
        backbone.last_blocks(x, 4)


def test_a_convnet_has_neither_attention_nor_blocks(tmp_path):
    backbone = load_backbone(export(tmp_path, config("resnet18")))
    with pytest.raises(UserError, match="no attention"):
        backbone.attention(images())
    with pytest.raises(UserError, match="1 to 1 blocks"):
        backbone.last_blocks(images(), 2)


def test_a_backbone_works_inside_jit_and_vmap(rgb_backbone):
    x = jax.random.normal(jax.random.key(3), (4, 32, 32, 3))
    expected = rgb_backbone(x)
    inside = jax.jit(rgb_backbone)(x)
    mapped = jax.vmap(lambda image: rgb_backbone(image[None]).patches[0])(x)
    np.testing.assert_allclose(inside.cls, expected.cls, rtol=1e-5, atol=1e-5)
    assert inside.grid == (4, 4)
    np.testing.assert_allclose(mapped, expected.patches, rtol=1e-5, atol=1e-5)


SHARDED = """
import sys, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
import dino_jax
backbone, x = dino_jax.load_backbone(sys.argv[1]), np.load(sys.argv[2])
sharding = NamedSharding(jax.make_mesh((4,), ("data",)), PartitionSpec("data"))
features = backbone(jax.device_put(x, sharding)).cls
assert features.sharding.is_equivalent_to(sharding, 2), features.sharding
np.save(sys.argv[3], features)
"""


def test_a_backbone_runs_on_a_batch_split_over_devices(tmp_path):
    folder = export(tmp_path, config())
    x = np.asarray(jax.random.normal(jax.random.key(3), (8, 32, 32, 3)))
    np.save(tmp_path / "x.npy", x)
    command = [sys.executable, "-c", SHARDED, str(folder), str(tmp_path / "x.npy"), str(tmp_path / "features.npy")]
    flags = {"XLA_FLAGS": processes.xla_flags(4), "JAX_PLATFORMS": "cpu"}
    subprocess.run(command, cwd=ROOT, env=os.environ | flags, check=True, timeout=120)
    expected = load_backbone(folder)(x).cls
    np.testing.assert_allclose(np.load(tmp_path / "features.npy"), expected, rtol=1e-5, atol=1e-5)
