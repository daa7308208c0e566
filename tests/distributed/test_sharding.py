"""Parameters in parts: the same training, and no more communication than the arithmetic asks for."""

import json
import sys
import tempfile

import jax
import numpy as np
import pytest
from processes import Process
from tiny import tiny_config

from dino_jax import checkpoints
from dino_jax.commands.plan import collectives
from dino_jax.distributed import fsdp, sharding
from dino_jax.errors import UserError
from dino_jax.training.setup import DeviceBatch, abstract_state, build_setup, init_state
from dino_jax.training.step import lower_step

pytestmark = pytest.mark.slow

DEVICES = 8
# 32 images, so that each of 8 devices computes a group of two at a time, even in two parts.
DINOV2 = {
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
# (fsdp, changes of the config): the first is what the others must agree with.
RUNS = {
    "replicated": (1, {}),
    "accumulated": (1, {"accum_steps": 2}),
    "more_crops": (1, {"crops__local_number": 6}),
    "fsdp": (4, {}),
    "fsdp_remat": (2, {"model__remat": True}),
    "fsdp_accum": (4, {"accum_steps": 2}),
    "fsdp_unrolled": (4, {"model__unroll": True}),
    "lars": (1, {"optim__name": "lars"}),
    "lars_fsdp": (8, {"optim__name": "lars"}),
}
DINOV2_RUNS = {
    "sinkhorn": (1, DINOV2),
    "sinkhorn_fsdp_accum": (4, DINOV2 | {"accum_steps": 2}),
    "center": (1, DINOV2 | {"dinov2__targets": "center"}),
    "center_accum": (1, DINOV2 | {"dinov2__targets": "center", "accum_steps": 2}),
}
MESHES = {"1x1": (1, 1), "4x1": (4, 1), "8x4": (8, 4), "8x8": (8, 8)}  # devices and groups of them
# Halves the time of a compilation. LLVM sees one device's program, in which nothing between devices is left to change.
FAST = {"xla_backend_optimization_level": 0}


def tiny_setup(groups=1, devices=None, **changes):
    """Setup and mesh of a tiny run; `groups`: config.fsdp."""
    # So many prototypes that the loss takes them in two parts.
    changes = {"head__out_dim": 2_048, "model__drop_path_rate": 0.2, "optim__clip_grad": 0.3} | changes
    config = tiny_config(fsdp=groups, optim__warmup_epochs=0, **changes)
    mesh = sharding.make_mesh(jax.devices()[:devices], groups)
    return build_setup(config, steps_per_epoch=2), mesh


def tiny_run(groups=1, **changes):
    """Setup, mesh and fresh state of a tiny run on all devices."""
    setup, mesh = tiny_setup(groups, **changes)
    return setup, mesh, init_state(setup, mesh)


def random_batch(setup, mesh):
    rng, B, side = np.random.default_rng(0), setup.config.batch_size, setup.config.data.canvas_size
    canvas = rng.integers(0, 256, (B, side, side, 1), np.uint8)
    rows = DeviceBatch(canvas, np.full((B, 2), (30, 50), np.float32), np.arange(B, dtype=np.int32))
    return sharding.shard_batch(rows, mesh)


def follow(groups, changes, steps=5):
    """What a short run gives, as plain numbers, and what its program says between devices."""
    setup, mesh, state = tiny_run(groups, **changes)
    batch = random_batch(setup, mesh)
    step = lower_step(setup, mesh, state).compile(FAST)
    kernel = state.student["backbone"]["blocks"]["attn"]["qkv"]["kernel"]
    moments = [x for path, x in jax.tree.leaves_with_path(state.opt_state) if "kernel" in jax.tree_util.keystr(path)]
    held = [kernel, state.teacher["head"]["last_layer"]["weight_v"], *moments]
    parts = [x.addressable_shards[0].data.size / x.size for x in held]
    losses = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        losses.append([float(metrics[name]) for name in ("loss", "grad_norm", "param_norm", "teacher_entropy")])
    learnt = named(jax.device_get((state.student, state.teacher)))
    sums = {name: float(np.abs(without_keys_bias(name, x)).sum()) for name, x in learnt}
    return {
        "losses": losses,
        "sums": sums,
        "parts": parts,
        "collectives": [(one.operation, one.size * one.times) for one in collectives(step.as_text(), DEVICES)],
    }


def without_keys_bias(name, x):
    """A softmax does not see the bias of its keys: its gradient is rounding alone, which Adam makes steps of."""
    return np.delete(x.reshape(len(x), 3, -1), 1, axis=1) if name.endswith("['qkv']['bias']") else x


def restored(saved, devices, groups, steps=10):
    """Whether the state saved by 8 devices in groups of 4 comes back bit for bit on others, and the losses after it."""
    setup, mesh = tiny_setup(groups, devices)
    with checkpoints.open_manager(saved["folder"], setup.config.checkpoint) as manager:
        state, _ = checkpoints.restore(manager, abstract_state(setup, mesh), setup.config)
    same = jax.tree.map(np.array_equal, jax.device_get(state), saved["state"])
    step, batch = lower_step(setup, mesh, state).compile(FAST), random_batch(setup, mesh)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return {"same": all(jax.tree.leaves(same)), "losses": losses}


def save_on_8(folder):
    """A state after two steps, saved in parts."""
    setup, mesh, state = tiny_run(4)
    step, batch = lower_step(setup, mesh, state).compile(FAST), random_batch(setup, mesh)
    for _ in range(2):
        state, _ = step(state, batch)
    with checkpoints.open_manager(folder, setup.config.checkpoint) as manager:
        checkpoints.save(manager, 2, state, setup.config)
    return {"folder": folder, "state": jax.device_get(state)}


def batch_means(setup):
    """Bytes of what is averaged over the batch beside the gradient."""
    head = setup.config.head
    # [K]: logits, targets, winners. [D]: features of student and teacher. Scalars: loss, entropy and squares.
    return 4 * (3 * head.out_dim + 2 * head.bottleneck_dim + 7)


def named(tree):
    return [(jax.tree_util.keystr(path), x) for path, x in jax.tree.leaves_with_path(tree)]


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """`follow` of each of RUNS and `restored` on each of MESHES, on devices that take a process of their own."""
    process = Process(tmp_path_factory.mktemp("followed") / "log", __file__, devices=DEVICES)
    return json.loads(process.finish().splitlines()[-1])


@pytest.mark.parametrize("name", [name for name in RUNS if "fsdp" in name])
def test_parameters_in_parts_train_alike(followed, name):
    ours, whole = followed[name], followed["lars" if "lars" in name else "replicated"]
    # Sums over devices in another order: float32's rounding, five steps long.
    np.testing.assert_allclose(ours["losses"], whole["losses"], rtol=1e-5)
    assert ours["sums"] == pytest.approx(whole["sums"], rel=1e-4)


def test_dinov2_trains_alike_in_parts(tmp_path):
    """Centers and Sinkhorn-Knopp are those of the whole batch, however it is divided over devices and in time."""
    process = Process(tmp_path / "log", __file__, "dinov2", devices=DEVICES)
    found = json.loads(process.finish().splitlines()[-1])
    for whole, part in (("sinkhorn", "sinkhorn_fsdp_accum"), ("center", "center_accum")):
        np.testing.assert_allclose(found[part]["losses"], found[whole]["losses"], rtol=1e-5)
        assert found[part]["sums"] == pytest.approx(found[whole]["sums"], rel=1e-4)


def test_each_device_holds_its_part(followed):
    assert len(followed["fsdp"]["parts"]) > 10  # with the optimizer's moments
    assert set(followed["fsdp"]["parts"]) == {1 / 4}
    assert set(followed["replicated"]["parts"]) == {1}


@pytest.mark.parametrize("mesh", MESHES)
def test_a_checkpoint_in_parts_restores_on_any_mesh(followed, mesh):
    found = followed["restored"][mesh]
    assert found["same"]
    # Sums over devices in another order: float32's rounding, in 10 steps.
    assert found["losses"] == pytest.approx(followed["restored"]["8x4"]["losses"], rel=1e-5)


@pytest.mark.parametrize("name", ["replicated", "accumulated", "more_crops"])
def test_gradients_cross_devices_once(followed, name):
    """4 bytes a parameter in few operations, and nothing of the size of batch x K; whatever the parts and the crops."""
    setup, mesh = tiny_setup()
    state = abstract_state(setup, mesh)
    gradient = 4 * sum(x.size for x in jax.tree.leaves(state.student))
    moved = followed[name]["collectives"]
    assert {operation for operation, _ in moved} == {"all-reduce"}
    assert gradient <= sum(size for _, size in moved) <= 1.02 * (gradient + batch_means(setup))
    assert len(moved) <= 8


@pytest.mark.parametrize(("name", "groups"), [("fsdp", 4), ("fsdp_remat", 2)])
def test_parts_are_gathered_and_gradients_scattered(followed, name, groups):
    """A block's parts: once for the teacher, and for each group of crops forward and backward; the others' once each.

    Gradients: summed by those that share, of which each keeps a part, and that part over the others.
    """
    setup, mesh = tiny_setup()
    state = abstract_state(setup, mesh)
    leaves = [
        (jax.tree_util.keystr(path), path[-1].key, 4 * x.size) for path, x in jax.tree.leaves_with_path(state.student)
    ]
    split = {text: size for text, key, size in leaves if key in fsdp.SPLIT_AXIS}
    blocks = sum(size for text, size in split.items() if "blocks" in text)
    others = sum(size for text, size in split.items() if "blocks" not in text)
    gradient = sum(split.values()) / groups + sum(size for text, _, size in leaves if text not in split)
    sizes = 2  # global and local crops
    wanted = {
        "all-gather": (1 + 2 * sizes) * blocks + 2 * others,
        "reduce-scatter": (sizes * blocks + others) / groups,
        "all-reduce": gradient + batch_means(setup),
    }
    moved = followed[name]["collectives"]
    for operation, size in wanted.items():
        total = sum(size for one, size in moved if one == operation)
        assert size <= total <= 1.1 * size, operation


def test_a_number_that_does_not_divide_is_named():
    setup, mesh = tiny_setup()
    shapes = abstract_state(setup, mesh)
    with pytest.raises(UserError, match=r"does not divide over fsdp=3 .*--config.fsdp"):
        fsdp.check_divides(shapes, 3)


def main():
    if sys.argv[1:] == ["dinov2"]:
        print(json.dumps({name: follow(*run) for name, run in DINOV2_RUNS.items()}))
        return
    found = {name: follow(*run) for name, run in RUNS.items()}
    with tempfile.TemporaryDirectory() as folder:
        saved = save_on_8(folder)
        found["restored"] = {name: restored(saved, *mesh) for name, mesh in MESHES.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
