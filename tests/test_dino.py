"""The method against the reference: loss and center, then whole training runs, number by number."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from dino_jax import dino
from dino_jax.data.multicrop import Crops
from dino_jax.distributed import sharding
from dino_jax.models import DINOHead
from dino_jax.models.vit import ViT
from dino_jax.training import chunked_loss, optimizers, recent, schedules
from dino_jax.training import step as training_step
from dino_jax.training.setup import Setup, build_dino
from dino_jax.training.step import gradients, train_step
from dino_jax.weights.official import from_official, to_official

TRAJECTORIES = ["adamw", "adamw_clip", "adamw_g", "adamw_bn", "sgd", "lars"]


class CropBatch(NamedTuple):
    """A batch whose crops are given."""

    position: np.ndarray
    crops: Crops


def by_image(crop_major, crops):
    """Rows crop by crop [crops * B, K] -> [B, crops, K]."""
    return jnp.asarray(crop_major.reshape(crops, -1, crop_major.shape[-1]).swapaxes(0, 1))


def test_loss_gradient_and_center(golden):
    arrays, meta = golden("loss")
    c = meta["config"]
    temp = schedules.temperature(c["wt"], c["tt"], c["wte"], steps_per_epoch=1)
    center = jnp.zeros(c["out_dim"])
    for i, epoch in enumerate(c["epochs"]):
        student, teacher = by_image(arrays[f"in/student{i}"], c["ncrops"]), by_image(arrays[f"in/teacher{i}"], 2)
        np.testing.assert_allclose(center, arrays[f"center_before{i}"][0], atol=1e-6)

        def loss_fn(student, teacher=teacher, center=center, epoch=epoch):
            q = dino.targets(teacher, center, temp(epoch))
            return dino.loss(q, student, meta["student_temp"])

        loss, grad = jax.value_and_grad(loss_fn)(student)
        np.testing.assert_allclose(loss, arrays[f"loss{i}"], rtol=1e-5)
        np.testing.assert_allclose(grad, by_image(arrays[f"grad_student{i}"], c["ncrops"]), rtol=1e-4, atol=1e-5)
        center = dino.update_center(center, teacher.mean((0, 1)), meta["center_momentum"])
        np.testing.assert_allclose(center, arrays[f"center_after{i}"][0], rtol=1e-5, atol=1e-6)


def test_loss_without_local_crops(golden):
    arrays, meta = golden("loss")
    c = meta["config"]
    student, teacher = by_image(arrays["in/student_2crops"], 2), by_image(arrays["in/teacher_2crops"], 2)
    temp = schedules.temperature(c["wt"], c["tt"], c["wte"], steps_per_epoch=1)(0)
    q = dino.targets(teacher, jnp.zeros(c["out_dim"]), temp)  # the reference computed it first: epoch 0, no center
    np.testing.assert_allclose(dino.loss(q, student, meta["student_temp"]), arrays["loss_2crops"], rtol=1e-5)


def test_targets_pass_no_gradient():
    logits = jnp.arange(6.0).reshape(1, 2, 3)
    grad = jax.grad(lambda t: dino.loss(dino.targets(t, jnp.zeros(3), 0.1), logits, 0.1))(logits)
    np.testing.assert_array_equal(grad, 0)


class Run(NamedTuple):
    """A golden trajectory, ready to be run."""

    arrays: dict
    meta: dict
    setup: Setup
    state: dino.TrainState


def load_run(golden, rule_weights, kind, **changes):
    """The golden's config, initial weights and crops as a setup and a state."""
    arrays, meta = golden(f"traj_{kind}")
    inputs, _ = golden("traj_inputs")
    c = meta["config"]
    v = c["vit"]
    backbone = ViT(v["embed_dim"], v["depth"], v["num_heads"], v["patch_size"], v["img_size"], v["mlp_ratio"])
    head = DINOHead(
        c["out_dim"],
        c["head"]["hidden_dim"],
        c["head"]["bottleneck_dim"],
        use_bn=meta["use_bn_in_head"],
        norm_last_layer=meta["norm_last_layer"],
        axis_name=sharding.AXES,
    )
    config = ConfigDict(
        {
            "seed": 0,
            "batch_size": c["batch"],
            "epochs": c["epochs"],
            "accum_steps": 1,
            "model": {"drop_path_rate": 0.0},
            "loss_weights": {"dino": 1.0},
            "dino": {
                "student_temp": 0.1,
                "teacher_temp": c["tt"],
                "warmup_teacher_temp": c["wt"],
                "warmup_teacher_temp_epochs": c["wte"],
                "center_momentum": 0.9,
                "teacher_momentum": c["momentum"],
                "teacher_momentum_end": 1.0,
                "teacher_temp_changes": "epoch",
                "teacher_update": "ema",
                "centering": True,
                "sharpening": True,
            },
            "optim": {
                "name": meta["optimizer"],
                "lr": c["lr"] * 256 / c["batch"],
                "lr_rule": "linear",
                "min_lr": c["min_lr"],
                "warmup_epochs": c["warmup_epochs"],
                "weight_decay": c["wd"],
                "weight_decay_end": c["wd_end"],
                "clip_grad": meta["clip_grad"],
                "clip_by": "tensor",
                "layer_decay": 1.0,
                "patch_embed_lr": 1.0,
                "skip_above": 0.0,
                "freeze_last_layer_epochs": meta["freeze_last_layer"],
                "freeze_by": "gradient",
                "freeze_backbone_epochs": 0.0,
            },
        }
    )
    config.update(changes)
    method = build_dino(config, backbone, head)
    setup = Setup(config, method, schedules.from_config(config, c["niter"]), lambda keys, batch: batch.crops)
    shapes = jax.eval_shape(partial(method.init, image_shape=(v["img_size"], v["img_size"], 3)), jax.random.key(0))
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    opt_state = jax.jit(optimizers.build(config.optim).init)(state.student)
    state = state.replace(opt_state=opt_state, recent=recent.init(head.out_dim))
    weights = rule_weights(meta["shapes"], meta["weights_seed"], override=meta["override"])
    if meta["norm_last_layer"]:
        np.testing.assert_array_equal(weights.pop("head.last_layer.weight_g"), 1)  # no parameter of ours then
    student, stats = {}, {}
    for part in ("backbone", "head"):
        like = {"params": state.student[part], "batch_stats": state.student_stats[part]}
        tensors = {name.removeprefix(f"{part}."): x for name, x in weights.items() if name.startswith(f"{part}.")}
        student[part], stats[part] = from_official(like, tensors, part).values()
    state = state.replace(student=student, teacher=student, student_stats=stats, teacher_stats=stats)

    def batch(i):
        crops = [inputs[f"step{i}_crop{j}"].transpose(0, 2, 3, 1) for j in range(2 + c["n_local"])]
        return CropBatch(np.arange(c["batch"]), Crops(np.stack(crops[:2], 1), np.stack(crops[2:], 1)))

    return Run(arrays, meta | {"batches": [batch(i) for i in range(len(arrays["loss"]))]}, setup, state)


def torch_params(tree):
    """Both parts' arrays by their names in the reference."""
    return {f"{part}.{name}": x for part in ("backbone", "head") for name, x in to_official(tree[part]).items()}


def compare(ours, theirs, meta, **tolerance):
    """Tensors by name, leaving out what meta.ignore lists (analytically zero gradients: noise under Adam)."""
    dim = meta["config"]["vit"]["embed_dim"]
    ignored = [pattern for pattern in meta["ignore"] if "[" not in pattern]
    for name, value in theirs.items():
        if name in ignored or name.endswith("num_batches_tracked"):
            continue
        if name not in ours:
            assert name == "head.last_layer.weight_g"  # no parameter of ours where its gain is fixed
            np.testing.assert_array_equal(value, 1)
            continue
        ours_value = np.asarray(ours[name])
        if name.endswith("qkv.bias"):
            value, ours_value = (np.delete(x, np.s_[dim : 2 * dim]) for x in (value, ours_value))
        np.testing.assert_allclose(ours_value, value, err_msg=name, **tolerance)


def norms_by_name(arrays, meta, key):
    """Norms of a golden, without those that contain ignored entries."""
    names = meta["grad_norm_names"] if key == "grad_norms_before_clip" else meta["norm_names"]
    return {name: i for i, name in enumerate(names) if "qkv.bias" not in name and name not in meta["ignore"]}


def step_and_gradient(setup, mesh, state, batch):
    """`train_step` and the gradient that it took, in one program."""
    taken = []

    def remember(*arguments):
        taken.append(gradients(*arguments))
        return taken[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_step, "gradients", remember)
        state, metrics = train_step(setup, mesh, state, batch)
    return state, metrics, taken[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAJECTORIES)
def test_trajectory(golden, rule_weights, kind):
    arrays, meta, setup, state = load_run(golden, rule_weights, kind)
    mesh = sharding.make_mesh(jax.devices()[:1])
    step = jax.jit(partial(step_and_gradient, setup, mesh))

    for i, batch in enumerate(meta["batches"]):
        state, metrics, grads = step(state, batch)
        ours = torch_params(grads)
        if i == 0:
            theirs = {k.removeprefix("grad_step0/"): v for k, v in arrays.items() if k.startswith("grad_step0/")}
            compare(ours, theirs, meta, rtol=1e-4, atol=1e-4)
        for name, column in norms_by_name(arrays, meta, "grad_norms_before_clip").items():
            expected = arrays["grad_norms_before_clip"][i, column]
            np.testing.assert_allclose(np.linalg.norm(ours[name]), expected, err_msg=name, rtol=1e-4, atol=1e-4)

        for key, theirs in [("loss", "loss"), ("lr", "lr"), ("weight_decay", "wd"), ("teacher_momentum", "momentum")]:
            np.testing.assert_allclose(metrics[key], arrays[theirs][i], err_msg=f"{key} {i}", rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(state.center, arrays[f"center_step{i}"][0], rtol=1e-4, atol=1e-4)
        for who in ("student", "teacher"):
            ours = torch_params(getattr(state, who))
            if meta["norm_last_layer"]:  # no parameter of ours, the constant 1 there
                ours["head.last_layer.weight_g"] = np.ones(meta["shapes"]["head.last_layer.weight_g"])
            for name, column in norms_by_name(arrays, meta, who).items():
                expected = arrays[f"{who}_norms_step{i}"][column]
                np.testing.assert_allclose(np.linalg.norm(ours[name]), expected, err_msg=name, rtol=1e-4, atol=1e-4)

    for who in ("student", "teacher"):
        theirs = {k.removeprefix(f"{who}/"): v for k, v in arrays.items() if k.startswith(f"{who}/")}
        ours = torch_params(getattr(state, who)) | torch_params(getattr(state, f"{who}_stats"))
        compare(ours, theirs, meta, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "changes"), [("adamw", {}), ("adamw_bn", {}), ("adamw", {"accum_steps": 2})])
def test_trajectory_with_logits_in_parts(golden, rule_weights, monkeypatch, kind, changes):
    _, meta, setup, state = load_run(golden, rule_weights, kind, **changes)
    mesh = sharding.make_mesh(jax.devices()[:1])
    batch = jax.tree.map(lambda *parts: np.concatenate(parts), *meta["batches"][:2])
    expected, losses, _, _ = jax.jit(partial(gradients, setup, mesh))(state, batch)
    monkeypatch.setattr(chunked_loss, "chunk_size", lambda views, K: K // 4)
    ours, chunked_losses, _, _ = jax.jit(partial(gradients, setup, mesh))(state, batch)
    np.testing.assert_allclose(chunked_losses["dino"], losses["dino"], rtol=1e-6)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        # Sums in other orders; gradients of biases before batch norm are nothing but rounding.
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max() + 1e-6)


def test_outputs_at_step_0(golden, rule_weights):
    arrays, meta, setup, state = load_run(golden, rule_weights, "adamw")
    crops = meta["batches"][0].crops
    for key, groups in [("teacher", [crops.global_crops]), ("student", [crops.global_crops, crops.local_crops])]:
        z, _ = setup.method.embed(state.student, state.student_stats, groups, [None] * len(groups))
        rows = setup.method.prototypes(state.student["head"]["last_layer"], z)
        rows = rows.swapaxes(0, 1).reshape(-1, setup.method.head.out_dim)
        np.testing.assert_allclose(rows, arrays[f"{key}_out_step0"], rtol=1e-4, atol=1e-5)
