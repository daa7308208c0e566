"""The variants of DINO: their losses and targets by hand, what is a part of which network, and whole runs."""

import dataclasses
import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from processes import SEVERAL, Process
from tiny import tiny_config

from dino_jax import checkpoints, dino, dino_variants, load_backbone
from dino_jax.commands import convert
from dino_jax.distributed import sharding
from dino_jax.training import loop
from dino_jax.training.init_from import start_from
from dino_jax.training.setup import DeviceBatch, build_setup, init_state
from dino_jax.training.step import crops_of, gradients, train_step
from dino_jax.training.writers import read_metrics
from dino_jax.weights import load, tensor_files

VARIANTS = ("dino_mse", "dino_predictor", "dino_sinkhorn", "dino_sinkhorn_predictor")
WITH_PREDICTOR = ("dino_predictor", "dino_sinkhorn_predictor")


def ready(method, mesh=None, **changes):
    """(setup, state, batch) of the tiny config with a method, on random canvases."""
    config = tiny_config(method=method, **changes)
    mesh = mesh or sharding.make_mesh(jax.devices()[:1])
    setup = build_setup(config, steps_per_epoch=5)
    rng, side, rows = np.random.default_rng(0), config.data.canvas_size, config.batch_size
    canvas = rng.integers(0, 256, (rows, side, side, config.model.in_channels), np.uint8)
    batch = DeviceBatch(canvas, np.full((rows, 2), side, np.float32), np.arange(rows, dtype=np.int32))
    return setup, init_state(setup, mesh), sharding.shard_batch(batch, mesh)


def test_mse_by_hand():
    rng, (B, G, V, K), temp = np.random.default_rng(0), (3, 2, 5, 7), 0.1
    q = rng.dirichlet(np.ones(K), (B, G))
    logits = rng.normal(size=(B, V, K))
    p = np.exp(logits / temp)
    p /= p.sum(-1, keepdims=True)
    pairs = [((q[b, g] - p[b, v]) ** 2).sum() for b in range(B) for g in range(G) for v in range(V) if v != g]
    np.testing.assert_allclose(dino_variants.mse(q, logits, temp), np.mean(pairs), rtol=1e-5)


def test_mse_is_least_where_student_and_teacher_agree():
    logits = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (2, 1, 9)), (2, 4, 9))
    q = dino.targets(logits[:, :2], jnp.zeros(9), 0.1)
    value, gradient = jax.value_and_grad(dino_variants.mse, argnums=1)(q, logits, 0.1)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("method", VARIANTS)
def test_student_and_teacher_start_as_those_of_dino(method):
    _, plain, _ = ready("dino")
    _, state, _ = ready(method)
    for part in ("backbone", "head"):
        jax.tree.map(np.testing.assert_array_equal, state.student[part], plain.student[part])
    jax.tree.map(np.testing.assert_array_equal, state.teacher, plain.teacher)
    jax.tree.map(np.testing.assert_array_equal, state.student_stats, plain.student_stats)
    assert set(state.student) - set(plain.student) == ({"predictor"} if method in WITH_PREDICTOR else set())


@pytest.mark.slow
@pytest.mark.parametrize("method", VARIANTS)
def test_a_batch_is_learned_by_heart(method):
    setup, state, batch = ready(method, dino__teacher_update="ema", optim__lr=0.02, optim__warmup_epochs=0)
    mesh = sharding.make_mesh(jax.devices()[:1])
    before = state.student.get("predictor")
    step = jax.jit(partial(train_step, setup, mesh))
    losses = []
    for _ in range(8):
        state, metrics = step(state.replace(step=jnp.int32(6)), batch)  # the same crops each time
        losses.append(float(metrics["loss"]))
        assert all(np.isfinite(value) for value in metrics.values())
        assert metrics["kl"] > -1e-4
    assert losses[-1] < losses[0] - 0.01
    if method in WITH_PREDICTOR:
        assert set(state.teacher) == {"backbone", "head"}
        assert float(optax.tree.norm(optax.tree.sub(state.student["predictor"], before))) > 0


@pytest.mark.slow
def test_only_the_student_predicts():
    setup, state, batch = ready("dino_predictor")
    group = crops_of(setup, state.step, batch)[0].global_crops
    embed = partial(setup.method.embed, groups=[group], drop_paths=[None])
    plain, _ = embed(state.teacher, state.teacher_stats)
    predicted, _ = embed(state.student, state.student_stats)
    np.testing.assert_allclose(np.linalg.norm(predicted, axis=-1), 1, rtol=1e-5)
    by_hand = setup.method.predictor.apply({"params": state.student["predictor"]}, plain)
    np.testing.assert_allclose(predicted, by_hand, atol=1e-5)
    assert np.abs(predicted - plain).max() > 0.1


def test_sinkhorn_by_hand():
    setup, state, batch = ready("dino_sinkhorn")
    method, temp = dataclasses.replace(setup.method, axes=None), 0.04  # outside of a mesh
    taught = method.teach(state, crops_of(setup, state.step, batch)[0])
    logits = method.prototypes(state.teacher["head"]["last_layer"], taught)
    rows = np.asarray(logits, np.float64).reshape(-1, logits.shape[-1])
    by_hand = np.exp(rows / temp)
    for _ in range(3):
        by_hand /= by_hand.sum(0)
        by_hand /= by_hand.sum(1, keepdims=True)
    centered = np.asarray(dino.targets(logits, method.center_on(state, taught, temp).center, temp)).reshape(rows.shape)
    np.testing.assert_allclose(centered, by_hand, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(centered.sum(1), 1, rtol=1e-5)
    # Three rounds give all prototypes nearly the same share, which a fresh teacher is far from.
    plain = np.asarray(dino.targets(logits, state.center, temp)).reshape(rows.shape)
    uneven, plainly_uneven = (np.abs(q.mean(0) * q.shape[1] - 1).mean() for q in (centered, plain))
    assert uneven < 0.1 < 0.5 < plainly_uneven


@pytest.mark.slow
@pytest.mark.parametrize("method", VARIANTS)
def test_parts_of_a_batch_make_no_difference(method):
    mesh, found = sharding.make_mesh(jax.devices()[:1]), []
    for accum_steps in (1, 2):
        setup, state, batch = ready(method, accum_steps=accum_steps)
        grads, losses, means, _ = jax.jit(partial(gradients, setup, mesh))(state, batch)
        found.append(((losses, means.get("center", 0.0)), grads))
    (expected, expected_grads), (ours, grads) = found
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * np.abs(other).max() + 1e-7)


# One run has all that is new but the loss of the other.
RUNS = ("dino_sinkhorn_predictor", "dino_mse")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Workdirs and last states of finished runs of 10 steps, by method."""
    folder = tmp_path_factory.mktemp("variants")
    return {name: (folder / name, loop.train(tiny_config(method=name), folder / name)) for name in RUNS}


def names_in(folder):
    """Dotted names of the arrays in a folder."""
    paths = jax.tree.leaves_with_path(checkpoints.tree_of(folder))
    return {jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths}


def losses_of(workdir):
    return [row["loss"] for row in read_metrics(workdir / "metrics.jsonl") if "loss" in row]


@pytest.mark.slow
def test_same_losses_on_2_devices_that_share_parameters(trained, tmp_path):
    runs = [(str(tmp_path / name), {"method": name, "fsdp": 2}) for name in RUNS]
    output = Process(tmp_path / "log", str(SEVERAL), json.dumps(runs), devices=2).finish()
    for name in RUNS:
        assert f"{name}: trained" in output
        np.testing.assert_allclose(losses_of(tmp_path / name), losses_of(trained[name][0]), rtol=1e-5)


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(trained):
    workdir, ended = trained["dino_sinkhorn_predictor"]
    ended, losses = jax.device_get(ended), losses_of(workdir)
    shutil.rmtree(workdir / "checkpoints" / "10")
    resumed = loop.train(tiny_config(method="dino_sinkhorn_predictor"), workdir)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), ended)
    assert losses_of(workdir) == losses


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dino", "dino_predictor"])
def test_the_predictor_stays_in_its_run(trained, tmp_path, method):
    workdir, ended = trained["dino_sinkhorn_predictor"]
    assert np.isfinite(load_backbone(workdir)(np.zeros((2, 32, 32, 1), np.uint8)).cls).all()
    saved, exported = (names_in(workdir / path) for path in ("checkpoints/10/state", "export/variables"))
    assert {name for name in saved if "predictor" in name and name.startswith("student")}
    assert not {name for name in saved if "predictor" in name and name.startswith("teacher")}
    assert not {name for name in exported if "predictor" in name}
    convert.write_official_checkpoint(load.load_weights(workdir), tmp_path / "full.safetensors")
    assert not [name for name in tensor_files.read(tmp_path / "full.safetensors") if "predictor" in name]

    config = tiny_config(method=method, init_from=str(workdir))
    fresh = init_state(build_setup(config, steps_per_epoch=5), sharding.make_mesh())
    state, _ = start_from(fresh, config, sharding.make_mesh())
    assert set(state.student) == {"backbone", "head"} | ({"predictor"} if method == "dino_predictor" else set())
    for part in ("backbone", "head"):
        jax.tree.map(np.testing.assert_array_equal, state.student[part], ended.student[part])
    for part in set(state.student) - {"backbone", "head"}:
        jax.tree.map(np.testing.assert_array_equal, state.student[part], fresh.student[part])
