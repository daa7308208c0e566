"""Training that starts from weights trained before: what is taken, what is fresh, and what is said of it."""

import json

import jax
import numpy as np
import pytest
from tiny import KNN, tiny_config

from dino_jax.commands import convert as convert
from dino_jax.distributed.sharding import make_mesh
from dino_jax.errors import UserError
from dino_jax.training import loop
from dino_jax.training.init_from import start_from
from dino_jax.training.setup import build_setup, init_state
from dino_jax.weights import load, official, tensor_files

pytestmark = pytest.mark.slow


def fresh(config):
    return init_state(build_setup(config, steps_per_epoch=5), make_mesh())


def begin(**changes):
    """(state, the sentence about it, what a random start would have been) of the tiny config with these changes."""
    config = tiny_config(**changes)
    random = fresh(config)
    return *start_from(random, config, make_mesh()), random


def assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of 10 steps, with k-NN."""
    workdir = tmp_path_factory.mktemp("source")
    return workdir, loop.train(tiny_config(**KNN), workdir)


@pytest.fixture(scope="module")
def sources(run, tmp_path_factory):
    """The run in other forms, by name."""
    folder, found = tmp_path_factory.mktemp("forms"), load.load_weights(run[0])
    convert.write_official_checkpoint(found, folder / "full.safetensors")
    convert.write_official(found, folder / "backbone.safetensors")
    convert.write_orbax(found, folder / "converted")
    teacher = {
        name: x for name, x in tensor_files.read(folder / "full.safetensors").items() if name.startswith("teacher.")
    }
    tensor_files.write(folder / "teacher.safetensors", teacher)
    return folder


def test_continued_training_begins_with_the_features_that_the_source_ended_with(run, sources, tmp_path, capsys):
    workdir, _ = run
    config = tiny_config(init_from=str(sources / "full.safetensors"), **KNN)
    loop.train(config, tmp_path)
    assert "starting from" in capsys.readouterr().out

    def knn(folder):
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return {line["step"]: line["knn_top1_teacher"] for line in lines if "knn_top1_teacher" in line}

    before, after = knn(workdir), knn(tmp_path)
    assert after[0] == before[10]
    assert json.loads((tmp_path / "export" / "card.json").read_text())["provenance"]["config"]["init_from"]
    loop.train(config, tmp_path)  # finished: the weights are not read again
    assert "starting from" not in capsys.readouterr().out


@pytest.mark.parametrize("form", ["a run", "full.safetensors", "converted"])
def test_student_teacher_heads_and_center_are_taken_where_there_are_any(run, sources, form):
    workdir, ended = run
    state, said, random = begin(init_from=str(workdir if form == "a run" else sources / form))
    for name in ("student", "teacher", "student_stats", "teacher_stats", "center"):
        assert_same(getattr(state, name), getattr(ended, name))
    assert_same((state.step, state.opt_state), (random.step, random.opt_state))
    assert "with heads and center" in said


def test_a_bare_backbone_serves_both_and_the_rest_is_fresh_and_said_to_be(run, sources):
    _, ended = run
    state, said, random = begin(init_from=str(sources / "backbone.safetensors"))
    for name in ("student", "teacher"):
        assert_same(getattr(state, name)["backbone"], ended.teacher["backbone"])
        assert_same(getattr(state, name)["head"], getattr(random, name)["head"])
    np.testing.assert_array_equal(state.center, 0)
    assert "no projection head: heads and center are fresh" in said
    assert "compare k-NN with that of step 0" in said


def test_heads_can_be_left_out_and_a_missing_center_is_said(run, sources):
    state, said, random = begin(init_from=str(sources / "full.safetensors"), init_heads=False, head__out_dim=96)
    assert_same(state.teacher["head"], random.teacher["head"])
    assert "init_heads is False" in said
    state, said, _ = begin(init_from=str(sources / "teacher.safetensors"))
    assert_same(state.student, run[1].teacher)
    assert "it has no center" in said


def test_a_fixed_gain_becomes_a_trainable_one_and_only_a_gain_of_1_goes_back(run, sources, tmp_path):
    assert tiny_config().head.norm_last_layer
    path = sources / "full.safetensors"
    state, _, _ = begin(init_from=str(path), head__norm_last_layer=False)
    np.testing.assert_array_equal(state.student["head"]["last_layer"]["weight_g"], 1)
    tensors = tensor_files.read(path)
    gains = {name: 2 * x for name, x in tensors.items() if name.endswith("weight_g")}
    tensor_files.write(tmp_path / "gains.safetensors", tensors | gains)
    with pytest.raises(UserError, match="--config.head.norm_last_layer=False"):
        begin(init_from=str(tmp_path / "gains.safetensors"))
    state, _, _ = begin(init_from=str(tmp_path / "gains.safetensors"), head__norm_last_layer=False)
    np.testing.assert_array_equal(state.teacher["head"]["last_layer"]["weight_g"], 2)


def test_what_does_not_fit_is_named_with_the_settings_that_would(sources):
    path = str(sources / "full.safetensors")
    with pytest.raises(
        UserError, match=r"head.out_dim is 96, must be 64; set --config.head.out_dim=64, or --config.init"
    ):
        begin(init_from=path, head__out_dim=96)
    with pytest.raises(UserError, match="--config.model.arch=vit_nano"):
        begin(init_from=path, model__arch="vit_tiny")
    with pytest.raises(UserError, match=r"in_channels is 3, must be 1.*--config.init_adapt=in_channels"):
        begin(init_from=path, model__in_channels=3)
    with pytest.raises(UserError, match="no such path"):
        begin(init_from="absent.pth")
    with pytest.raises(UserError, match="init_adapt 'size' is unknown"):
        loop.train(tiny_config(init_from=path, init_adapt="size"), "unused")


def test_other_sizes_and_channels_are_taken_when_asked_for(sources):
    size = tiny_config().crops.global_size * 2
    state, _, random = begin(
        init_from=str(sources / "full.safetensors"),
        init_adapt="image_size,in_channels",
        crops__global_size=size,
        model__in_channels=3,
    )
    assert jax.tree.map(np.shape, state) == jax.tree.map(np.shape, random)
    taken, of_chance = state.student["backbone"]["blocks"], random.student["backbone"]["blocks"]
    assert not np.allclose(taken["mlp"]["fc1"]["kernel"], of_chance["mlp"]["fc1"]["kernel"])


DINOV2 = {"model__registers": 2, "model__layer_scale": 1e-5, "model__ffn": "swiglu", "model__antialias": True}


def test_weights_of_dinov2_need_a_model_of_its_kind_and_their_mask_token_is_left_out(tmp_path):
    config = tiny_config(**DINOV2)
    backbone = official.to_official(fresh(config).teacher["backbone"])
    backbone["mask_token"] = np.ones((1, 64), np.float32)
    path = tmp_path / "dinov2.safetensors"
    tensor_files.write(path, backbone, {load.NUM_HEADS: "4"})
    state, _, _ = begin(init_from=str(path), **DINOV2)
    loaded = official.to_official(state.student["backbone"])
    assert loaded.keys() == backbone.keys() - {"mask_token"}
    np.testing.assert_array_equal(loaded["register_tokens"], backbone["register_tokens"])
    with pytest.raises(UserError, match="--config.model.registers=2 --config.model.layer_scale=1e-05 --config.model"):
        begin(init_from=str(path))


def test_a_run_of_dinov2_goes_on_from_its_checkpoint_in_the_official_form(tmp_path):
    settings = DINOV2 | {
        "method": "dinov2",
        "head__norm_last_layer": False,
        "dinov2__separate_head": True,
        "dinov2__patch_out_dim": 48,
        "dinov2__patch_bottleneck_dim": 8,
        "dinov2__group_images": 8,
    }
    loop.train(tiny_config(**settings), tmp_path / "run")
    ended = load.load_weights(tmp_path / "run")
    assert set(ended.teacher.params) == {"backbone", "head", "patch_head"}
    assert "mask_token" in ended.teacher.params["backbone"]
    path = tmp_path / "checkpoint.safetensors"
    convert.write_official_checkpoint(ended, path)
    state, line, _ = begin(init_from=str(path), **settings)
    assert_same(state.teacher, ended.teacher.params)
    assert_same(state.student, ended.student.params)
    np.testing.assert_array_equal(state.center, ended.center)
    assert "with heads and center" in line
    with pytest.raises(UserError, match="set --config.dinov2.patch_out_dim=48, or --config.init_heads=False"):
        begin(init_from=str(path), **settings | {"dinov2__patch_out_dim": 24})
    shared, _, _ = begin(init_from=str(path), **settings | {"dinov2__separate_head": False})
    assert set(shared.student) == {"backbone", "head"}
