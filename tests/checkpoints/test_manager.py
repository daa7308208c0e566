import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from processes import Process, free_port

from dino_jax import checkpoints, provenance, recipes
from dino_jax.checkpoints import export
from dino_jax.errors import UserError
from dino_jax.training import optimizers


@flax.struct.dataclass
class State:
    step: Any
    teacher: Any
    teacher_stats: Any
    opt_state: Any
    recent: Any


def config(**changes):
    c = ConfigDict(
        {
            "model": {"arch": "vit_nano", "patch_size": 8, "in_channels": 3, "drop_path_rate": 0.1, "remat": False},
            "head": {"out_dim": 64, "norm_last_layer": True},
            "method": "dino",
            "optim": recipes.get_config("default").optim.to_dict(),
            "crops": {"global_size": 32, "global_scale": (0.4, 1.0)},
            "data": {"source": "demo", "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)},
            "eval": {"resize": 36, "crop": 32},
            "seed": 0,
            "init_from": "",
            "batch_size": 16,
            "checkpoint": {"keep_last": 2, "keep_every_steps": 0},
        }
    )
    c.update_from_flattened_dict(changes)
    return c


def make_state(optimizer="adamw", step=0):
    params = {
        "backbone": {"blocks": {"kernel": jnp.arange(24.0).reshape(2, 3, 4), "bias": jnp.ones((2, 4))}},
        "head": {"last_layer": {"kernel": jnp.full((4, 5), 0.1)}},
    }
    opt_state = optimizers.build(config(**{"optim.name": optimizer}).optim).init(params)
    return State(jnp.int32(step), params, {"backbone": {}, "head": {}}, opt_state, {"grad_norms": jnp.ones(3)})


def target_of(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def save_steps(workdir, steps, c=None):
    c = c or config()
    manager = checkpoints.open_manager(workdir, c.checkpoint)
    for step in steps:
        assert checkpoints.save(manager, step, make_state(step=step), c)
    manager.close()


def restore(workdir, c=None):
    c = c or config()
    manager = checkpoints.open_manager(workdir, c.checkpoint)
    try:
        return checkpoints.restore(manager, target_of(make_state()), c)
    finally:
        manager.close()


def flip_a_bit(step_folder):
    """In the largest file of the state, where the arrays are."""
    path = max((p for p in (step_folder / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("optimizer", optimizers.OPTIMIZERS)
def test_state_with_empty_dicts_and_empty_optax_states_round_trips(tmp_path, optimizer):
    state, c = make_state(optimizer, step=7), config(**{"optim.name": optimizer})
    with checkpoints.open_manager(tmp_path, c.checkpoint) as manager:
        assert checkpoints.restore(manager, target_of(state), c) is None
        assert checkpoints.save(manager, 7, state, c)
        assert not checkpoints.save(manager, 7, state, c)
        manager.wait_until_finished()
        restored, step = checkpoints.restore(manager, target_of(state), c)
    assert step == 7
    assert_same(restored, state)


def test_a_state_donated_right_after_save_is_saved_as_it_was(tmp_path):
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = make_state().replace(teacher={"w": jnp.zeros((512, 512))})
    c = config()
    with checkpoints.open_manager(tmp_path, c.checkpoint) as manager:
        target = target_of(state)
        checkpoints.save(manager, 1, state, c)
        for _ in range(3):
            state = advance(state)
        manager.wait_until_finished()
        restored, _ = checkpoints.restore(manager, target, c)
    assert not restored.teacher["w"].any()


def test_retention_keeps_the_newest_and_every_nth(tmp_path):
    save_steps(tmp_path, range(1, 8), config(**{"checkpoint.keep_every_steps": 3}))
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")) == ["3", "6", "7"]
    with pytest.raises(UserError, match=r"checkpoint\.keep_last"):
        checkpoints.open_manager(tmp_path, config(**{"checkpoint.keep_last": 0}).checkpoint)


def test_a_save_that_was_killed_is_cleaned_up_and_can_be_repeated(tmp_path):
    save_steps(tmp_path, [1, 2])
    folder = tmp_path / "checkpoints"
    (folder / "2").rename(folder / "2.orbax-checkpoint-tmp")
    c = config()
    with checkpoints.open_manager(tmp_path, c.checkpoint) as manager:
        assert checkpoints.restore(manager, target_of(make_state()), c)[1] == 1
        assert checkpoints.save(manager, 2, make_state(step=2), c)
    assert sorted(path.name for path in folder.glob("[0-9]*")) == ["1", "2"]


def test_another_model_is_refused_by_name_and_what_may_change_is_not(tmp_path):
    save_steps(tmp_path, [5])
    with pytest.raises(UserError) as error:
        restore(
            tmp_path, config(**{"model.arch": "vit_tiny", "head.out_dim": 128, "optim.name": "sgd", "method": "dinov2"})
        )
    message = str(error.value)
    assert "model.arch is 'vit_tiny', was 'vit_nano'" in message
    assert "head.out_dim is 128, was 64" in message
    assert "optim.name is 'sgd', was 'adamw'" in message
    assert "method is 'dinov2', was 'dino'" in message
    assert "--workdir" in message
    assert "\n" not in message
    assert restore(tmp_path, config(**{"optim.lr": 1.0, "model.remat": True, "model.drop_path_rate": 0.3}))[1] == 5


def test_arrays_of_another_version_of_the_code_are_refused_by_name(tmp_path):
    save_steps(tmp_path, [5])
    state = make_state()
    blocks = {"kernel": jnp.ones((3, 3, 4)), "gate": jnp.ones(4)}
    other = state.replace(teacher={**state.teacher, "backbone": {"blocks": blocks}})
    with checkpoints.open_manager(tmp_path, config().checkpoint) as manager, pytest.raises(UserError) as error:
        checkpoints.restore(manager, target_of(other), config())
    message = str(error.value)
    assert "teacher.backbone.blocks.bias is missing, was float32 [2, 4]" in message
    assert "teacher.backbone.blocks.gate is float32 [4], was missing" in message
    assert "teacher.backbone.blocks.kernel is float32 [3, 3, 4], was float32 [2, 3, 4]" in message
    assert f"jax {jax.__version__}" in message
    assert "opt_state" not in message
    assert "\n" not in message


def test_a_flipped_bit_falls_back_to_the_checkpoint_before(tmp_path, capsys):
    save_steps(tmp_path, [1, 2])
    flip_a_bit(tmp_path / "checkpoints" / "2")
    state, step = restore(tmp_path)
    assert (step, int(state.step)) == (1, 1)
    err = capsys.readouterr().err
    assert "checkpoints/2 is damaged (state/" in err
    assert err.count("\n") == 1
    save_steps(tmp_path, [2])  # the run goes on and saves that step again
    assert restore(tmp_path)[1] == 2
    assert not capsys.readouterr().err


def flip(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path, rng):
    os.truncate(path, rng.randrange(path.stat().st_size))


def delete(path, rng):
    path.unlink()


def test_100_random_damages_are_all_detected(tmp_path, capsys):
    """Any file of the state, its metadata or the manifest itself; any place in it."""
    save_steps(tmp_path, [1, 2])
    steps, rng = tmp_path / "checkpoints", random.Random(0)
    whole = shutil.copytree(steps / "2", tmp_path / "whole")
    names = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file() and path.parent != whole) + [
        Path(checkpoints.MANIFEST)
    ]
    for number in range(100):
        name, harm = rng.choice(names), (flip, truncate, delete)[number % 3]
        harm(steps / "2" / name, rng)
        assert checkpoints.newest_intact(steps) == 1, f"{number}: {harm.__name__} of {name} went unnoticed"
        (line,) = capsys.readouterr().err.splitlines()
        assert str(steps / "2") in line
        shutil.rmtree(steps / "2")
        shutil.copytree(whole, steps / "2")
    assert restore(tmp_path)[1] == 2


def halve(step_folder):
    path = max((p for p in (step_folder / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(path, path.stat().st_size // 2)


def lose_a_file(step_folder):
    max((p for p in (step_folder / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size).unlink()


@pytest.mark.parametrize("harm", [flip_a_bit, halve, lose_a_file])
@pytest.mark.parametrize("keep", [{"checkpoint.keep_last": 3}, {"checkpoint.keep_every_steps": 1}])
def test_a_damaged_checkpoint_without_manifest_stays_damaged_after_later_saves(tmp_path, harm, keep):
    save_steps(tmp_path, [1, 2], config(**keep))
    steps = tmp_path / "checkpoints"
    harm(steps / "1")
    (steps / "1" / checkpoints.MANIFEST).unlink()
    save_steps(tmp_path, [3], config(**keep))
    assert not (steps / "1" / checkpoints.MANIFEST).exists()
    for step in (2, 3):
        flip_a_bit(steps / str(step))
    with pytest.raises(UserError, match="every checkpoint"):
        restore(tmp_path, config(**keep))


def test_what_others_put_beside_the_steps_is_ignored_and_untouched(tmp_path):
    steps = tmp_path / "checkpoints"
    for folder in ("2.bak/state", "1_copy", "²", "007", "old_3", "2.tmp"):
        (steps / folder).mkdir(parents=True)
    (steps / "1note.txt").write_text("lr was 1e-3")
    (steps / "4").write_text("a file")
    others = sorted(path.name for path in steps.iterdir())
    save_steps(tmp_path, [1, 2, 3])
    assert restore(tmp_path)[1] == 3
    assert sorted(path.name for path in steps.iterdir() if path.name not in ("2", "3")) == others
    assert not [path for path in steps.rglob(checkpoints.MANIFEST) if path.parent.name not in ("2", "3")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", "[]\n"),
        ("manifest.json", "{}\n"),
        ("manifest.json", ""),
        ("state/array_metadatas/process_1", "x"),  # Orbax would read it
        ("metadata/metadata", ""),
    ],
)
def test_what_no_save_of_ours_writes_is_damage(tmp_path, capsys, name, content):
    save_steps(tmp_path, [1, 2])
    (tmp_path / "checkpoints" / "2" / name).write_text(content)
    assert restore(tmp_path)[1] == 1
    assert name in capsys.readouterr().err


def test_a_folder_that_was_left_empty_is_passed_over(tmp_path, capsys):
    save_steps(tmp_path, [1])
    (tmp_path / "checkpoints" / "2").mkdir()
    assert restore(tmp_path)[1] == 1
    assert "checkpoints/2 is damaged" in capsys.readouterr().err


def test_what_others_leave_beside_the_state_is_no_damage(tmp_path, capsys):
    """File managers and NFS leave hidden files, evaluate.py its results."""
    save_steps(tmp_path, [1])
    folder = tmp_path / "checkpoints" / "1"
    (folder / "state" / ".DS_Store").write_text("x")
    (folder / "eval" / "knn").mkdir(parents=True)
    (folder / "eval" / "knn" / "results.json").write_text("{}")
    assert restore(tmp_path)[1] == 1
    assert not capsys.readouterr().err


@pytest.mark.parametrize("harm", [flip_a_bit, lambda folder: shutil.rmtree(folder / "state")])
def test_only_damaged_checkpoints_is_an_error_and_nothing_is_moved(tmp_path, harm):
    save_steps(tmp_path, [3])
    harm(tmp_path / "checkpoints" / "3")
    with pytest.raises(UserError, match="every checkpoint"):
        restore(tmp_path)
    assert (tmp_path / "checkpoints" / "3").is_dir()


def test_checkpoint_tells_its_config_and_versions(tmp_path):
    save_steps(tmp_path, [1])
    metadata = checkpoints.read_metadata(tmp_path / "checkpoints" / "1")
    assert metadata["config"] == provenance.plain(config())
    assert metadata["versions"]["jax"] == jax.__version__
    assert {"python", "flax", "orbax-checkpoint", "dino_jax"} <= set(metadata["versions"])


def test_write_config(tmp_path):
    checkpoints.write_config(tmp_path / "run", config())
    assert json.loads((tmp_path / "run" / "config.json").read_text())["crops"]["global_scale"] == [0.4, 1.0]


def exported_weights(folder):
    return checkpoints.restore_arrays(folder / "variables", {"w": 0})["w"]


def test_an_interrupted_export_leaves_the_last_one(tmp_path, monkeypatch):
    card = checkpoints.model_card(config(), step=1)
    folder = checkpoints.write_export(tmp_path / "export", {"variables": {"w": jnp.ones(3)}}, card)
    assert folder == tmp_path / "export"
    with monkeypatch.context() as patch:
        patch.setattr(export, "write_manifest", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            checkpoints.write_export(tmp_path / "export", {"variables": {"w": jnp.zeros(3)}}, card)
    assert checkpoints.damage(folder) is None
    np.testing.assert_array_equal(exported_weights(folder), 1)
    checkpoints.write_export(tmp_path / "export", {"variables": {"w": jnp.zeros(3)}}, card)
    np.testing.assert_array_equal(exported_weights(folder), 0)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_card_describes_architecture_preprocessing_and_provenance():
    card = checkpoints.model_card(config(), step=42)
    assert card["architecture"] == {
        "arch": "vit_nano",
        "patch_size": 8,
        "in_channels": 3,
        "image_size": 32,
        "embed_dim": 64,
        "registers": 0,
        "layer_scale": 0.0,
        "ffn": "mlp",
        "antialias": False,
        "pos_offset": None,
        "mask_token": False,
    }
    assert card["preprocessing"]["resize"] == 36
    assert (card["provenance"]["step"], card["provenance"]["data_source"]) == (42, "demo")
    assert json.loads(json.dumps(card)) == card


SAVE_IN_ONE_OF_TWO_PROCESSES = """
import importlib.util, sys
import jax
workdir, tests, port, process = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
jax.distributed.initialize(f"localhost:{port}", 2, process)
from jax.sharding import NamedSharding, PartitionSpec
from dino_jax import checkpoints
spec = importlib.util.spec_from_file_location("t", tests)
t = importlib.util.module_from_spec(spec)
spec.loader.exec_module(t)
mesh = jax.make_mesh((4,), ("data",))

def spread(x):
    split = x.ndim == 2 and x.shape[0] == 4
    sharding = NamedSharding(mesh, PartitionSpec("data") if split else PartitionSpec())
    return jax.make_array_from_callback(x.shape, sharding, lambda i: jax.device_get(x)[i])

state = jax.tree.map(spread, t.make_state(step=9))
c = t.config()
manager = checkpoints.open_manager(workdir, c.checkpoint)
assert checkpoints.restore(manager, t.target_of(state), c) is None
assert checkpoints.save(manager, 9, state, c)
manager.wait_until_finished()
restored, step = checkpoints.restore(manager, t.target_of(state), c)
assert step == 9 and all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), state, restored)))
manager.close()
checkpoints.write_config(workdir, c)
checkpoints.write_export(f"{workdir}/export", {"variables": state.teacher}, checkpoints.model_card(c, 9))
"""


@pytest.mark.slow
def test_two_processes_save_shards_and_one_device_restores_them(tmp_path):
    port = str(free_port())
    arguments = ["-c", SAVE_IN_ONE_OF_TWO_PROCESSES, str(tmp_path / "run"), __file__, port]
    for process in [Process(tmp_path / f"log{i}", *arguments, str(i), devices=2) for i in range(2)]:
        process.finish()
    state, step = restore(tmp_path / "run")
    assert step == 9
    assert_same(state, make_state(step=9))
    assert checkpoints.damage(tmp_path / "run" / "export") is None
