"""A ViT of sizes that have no name: trained, exported, converted to every form, and read back as the same network."""

import json

import jax
import numpy as np
import pytest
from tiny import tiny_config

import dino_jax
from dino_jax import checkpoints
from dino_jax.checkpoints import model_card
from dino_jax.commands import convert
from dino_jax.distributed.sharding import make_mesh
from dino_jax.errors import UserError
from dino_jax.models.registry import CONFIGURED, VARIANT
from dino_jax.training import loop
from dino_jax.training.config_checks import check_config
from dino_jax.training.init_from import start_from
from dino_jax.training.setup import build_setup, init_state
from dino_jax.weights import load, official, tensor_files

pytestmark = pytest.mark.slow

SIZES = {"embed_dim": 48, "depth": 4, "num_heads": 3}
SHORT = {
    "data__source": "demo:train:4",
    "batch_size": 20,
    "epochs": 1,
    "optim__warmup_epochs": 0,
    "optim__freeze_last_layer_epochs": 0,
}
OURS = {"model__arch": "vit", **{f"model__{name}": value for name, value in SIZES.items()}}


def config(**changes):
    return tiny_config(**OURS | SHORT | changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of two steps."""
    workdir = tmp_path_factory.mktemp("run")
    loop.train(config(checkpoint__every_steps=1), workdir)
    return workdir


@pytest.fixture(scope="module")
def expected(run):
    """(backbone, images, their tokens) of the run's export."""
    backbone = dino_jax.load_backbone(run)
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 1)).astype(np.float32)
    return backbone, images, backbone(images)


def test_a_run_exports_it_and_its_card_says_its_sizes(run, expected):
    backbone, _, _ = expected
    assert checkpoints.newest_intact(run / "checkpoints") == 2
    assert backbone.config["arch"] == "vit"
    assert {name: backbone.config[name] for name in SIZES} == SIZES
    assert (backbone.model.depth, backbone.model.num_heads, backbone.num_blocks) == (4, 3, 4)


def test_the_same_command_resumes_it_and_other_sizes_are_another_run(run, capsys):
    loop.train(config(checkpoint__every_steps=1), run)
    assert "resuming after step 2" in capsys.readouterr().out
    with pytest.raises(UserError, match="model.num_heads is 4, was 3"):
        loop.train(config(model__num_heads=4), run)


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("official", "official.safetensors"),
        ("timm", "timm.safetensors"),
        ("hf", "hf"),
        ("orbax", "orbax"),
        ("official_checkpoint", "full.safetensors"),
    ],
)
def test_every_form_reads_back_as_the_same_network(run, expected, tmp_path, form, name, capsys):
    backbone, images, tokens = expected
    convert.FORMS[form](load.load_weights(run), tmp_path / name)
    found = dino_jax.load_backbone(tmp_path / name)
    assert found.config == backbone.config
    assert "heads" not in capsys.readouterr().err  # nothing is assumed
    again = found(images)
    np.testing.assert_array_equal(again.cls, tokens.cls)
    np.testing.assert_array_equal(again.patches, tokens.patches)
    with pytest.raises(UserError, match="states that it has 3 attention heads, but num_heads is 4: omit num_heads"):
        dino_jax.load_backbone(tmp_path / name, num_heads=4)
    assert dino_jax.load_backbone(tmp_path / name, num_heads=3).config == backbone.config


def test_stablehlo_runs_it(run, expected, tmp_path):
    backbone, images, tokens = expected
    convert.write_stablehlo(load.load_weights(run), tmp_path / "model")
    side = backbone.card["preprocessing"]["crop"]
    assert images.shape[1:3] == (side, side)
    found = jax.export.deserialize(bytearray((tmp_path / "model").read_bytes())).call(images)
    np.testing.assert_allclose(found["cls"], tokens.cls, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["patches"], tokens.patches, rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "model.json").read_text())["architecture"] == backbone.config


def test_a_file_that_does_not_state_its_heads_needs_them(run, expected, tmp_path):
    backbone, images, tokens = expected
    tensors = official.to_official(backbone.variables["params"])
    path = tmp_path / "bare.safetensors"
    tensor_files.write(path, tensors)
    with pytest.raises(UserError, match=r"bare.safetensors is a ViT of width 48 and depth 4.*give num_heads") as error:
        dino_jax.load_backbone(path)
    assert "\n" not in str(error.value)
    found = dino_jax.load_backbone(path, num_heads=3)
    assert {name: found.config[name] for name in SIZES} == SIZES
    np.testing.assert_array_equal(found(images).cls, tokens.cls)
    assert not np.allclose(dino_jax.load_backbone(path, num_heads=4)(images).cls, tokens.cls)
    for wrong in (0, 5, -3):
        with pytest.raises(UserError, match=f"{wrong} attention heads do not divide its width 48: correct num_heads"):
            dino_jax.load_backbone(path, num_heads=wrong)


def test_heads_of_64_channels_are_assumed_with_one_line(tmp_path, capsys):
    sizes = {"embed_dim": 128, "depth": 1, "num_heads": 2}
    architecture = {"arch": "vit", "patch_size": 8, "in_channels": 3, "image_size": 16} | sizes
    like = official.backbone_like(architecture)
    tensors = jax.tree.map(lambda s: np.ones(s.shape, np.float32), like)
    tensor_files.write(tmp_path / "a.safetensors", official.to_official(tensors["params"]))
    found = load.load_weights(tmp_path / "a.safetensors")
    assert found.card["architecture"] == architecture | VARIANT
    (line,) = capsys.readouterr().err.splitlines()
    assert "2 are assumed" in line
    assert load.load_weights(tmp_path / "a.safetensors", num_heads=8).card["architecture"]["num_heads"] == 8
    assert not capsys.readouterr().err


def test_num_heads_of_a_convnet_are_refused(tmp_path):
    architecture = {"arch": "resnet18", "patch_size": None, "in_channels": 3, "image_size": 224, "embed_dim": 512}
    like = official.backbone_like(architecture)
    tree = jax.tree.map(lambda s: np.ones(s.shape, np.float32), like)
    tensors = official.to_official(tree["params"]) | official.to_official(tree["batch_stats"])
    tensor_files.write(tmp_path / "r.safetensors", tensors)
    with pytest.raises(UserError, match="has no attention, but num_heads is 8: omit num_heads"):
        load.load_weights(tmp_path / "r.safetensors", num_heads=8)


LATER = {*SIZES, *CONFIGURED}  # settings that earlier versions do not have


def earlier(tree):
    """A config or card as an earlier version wrote it."""
    return {key: earlier(x) for key, x in tree.items() if key not in LATER} if isinstance(tree, dict) else tree


def test_cards_and_checkpoints_of_earlier_versions_load_and_resume(tmp_path, monkeypatch, capsys):
    now = tiny_config(**SHORT)
    before = earlier(now.to_dict())
    assert set(now.model) - set(before["model"]) == LATER
    assert model_card(before, 3)["architecture"] == model_card(now, 3)["architecture"]
    plain = checkpoints.manager.plain
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.manager, "plain", lambda config: earlier(plain(config)))
        loop.train(now, tmp_path)
    assert not set(json.loads((tmp_path / "config.json").read_text())["model"]) & LATER
    loop.train(now, tmp_path)
    assert "resuming after step 2" in capsys.readouterr().out
    exported = dino_jax.load_backbone(tmp_path)
    (tmp_path / "export").rename(tmp_path / "elsewhere")
    assert dino_jax.load_backbone(tmp_path).config == exported.config  # of the checkpoint's config
    assert exported.config["arch"] == "vit_nano"


def test_init_from_takes_it_and_names_the_settings_that_fit(run, tmp_path):
    path = tmp_path / "full.safetensors"
    convert.write_official_checkpoint(load.load_weights(run), path)

    def begin(c):
        return start_from(init_state(build_setup(c, steps_per_epoch=2), make_mesh()), c, make_mesh())[0]

    state, ended = begin(config(init_from=str(path))), load.load_weights(run)
    jax.tree.map(np.testing.assert_array_equal, state.teacher, ended.teacher.params)
    with pytest.raises(UserError, match="--config.model.arch=vit --config.model.embed_dim=48 --config.model.depth=4"):
        begin(tiny_config(init_from=str(path)))


def test_init_from_compares_sizes_not_names(tmp_path):
    nano = tiny_config()
    backbone = official.to_official(init_state(build_setup(nano, steps_per_epoch=2), make_mesh()).teacher["backbone"])
    tensor_files.write(tmp_path / "nano.safetensors", backbone)
    same = {"model__arch": "vit", "model__embed_dim": 64, "model__depth": 3, "model__num_heads": 4}
    c = tiny_config(init_from=str(tmp_path / "nano.safetensors"), **same)
    state, _ = start_from(init_state(build_setup(c, steps_per_epoch=2), make_mesh()), c, make_mesh())
    np.testing.assert_array_equal(state.teacher["backbone"]["cls_token"], backbone["cls_token"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__depth": 0}, "set --config.model.depth=N"),
        ({"model__arch": "vit_nano"}, "model.arch=vit_nano has fixed sizes"),
        ({"model__num_heads": 5}, "not a multiple of model.num_heads 5"),
        ({"model__depth": -1}, "model.depth is -1: set --config.model.depth to 0 or more"),
    ],
)
def test_the_config_check_names_sizes_that_do_not_fit(changes, message):
    with pytest.raises(UserError, match=message):
        check_config(config(**changes), devices=1)
