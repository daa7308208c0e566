"""DINOv2 against the reference: each loss, then whole training runs, number by number."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_dino import CropBatch, by_image, step_and_gradient

from dino_jax import dino, dinov2, recipes
from dino_jax.data import masks
from dino_jax.distributed import sharding
from dino_jax.models.drop_path import drop_path_subsets
from dino_jax.training import optimizers, recent
from dino_jax.training.setup import build_setup
from dino_jax.weights.official import from_official, to_official

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
PARTS = {"backbone": "backbone", "head": "dino_head", "patch_head": "ibot_head"}  # ours: the reference's


@pytest.fixture(scope="module")
def losses(golden2):
    return golden2("loss2")


@pytest.mark.parametrize("targets", ["centering", "sinkhorn"])
def test_dino_loss(losses, targets):
    arrays, meta = losses
    c = meta["config"]
    center = jnp.zeros(c["out_dim"])
    for i, temp in enumerate(c["temps"]):
        teacher, ours = by_image(arrays[f"in/teacher_cls{i}"], 2), f"dino/{targets}"
        if targets == "sinkhorn":
            rows = teacher.reshape(-1, c["out_dim"])
            center = dinov2.sinkhorn_center(rows, jnp.ones(len(rows), bool), temp)
        else:
            np.testing.assert_allclose(center, arrays[f"{ours}/center_before{i}"][0], **CLOSE)
        q = dino.targets(teacher, center, temp)
        np.testing.assert_allclose(q, by_image(arrays[f"{ours}/teacher_probs{i}"], 2), **CLOSE)
        views = [by_image(arrays[f"in/student_{kind}{i}"], n) for kind, n in (("global", 2), ("local", c["n_local"]))]
        loss = partial(lambda q, *views: dino.loss(q, jnp.concatenate(views, 1), meta["student_temp"]), q)
        value, (global_grad, local_grad) = jax.value_and_grad(loss, (0, 1))(*views)
        np.testing.assert_allclose(value, arrays[f"{ours}/local_loss{i}"] + arrays[f"{ours}/global_loss{i}"], **CLOSE)
        np.testing.assert_allclose(global_grad, by_image(arrays[f"{ours}/grad_global{i}"], 2), **CLOSE)
        np.testing.assert_allclose(local_grad, by_image(arrays[f"{ours}/grad_local{i}"], c["n_local"]), **CLOSE)
        if targets == "centering":
            center = dino.update_center(center, teacher.mean((0, 1)), meta["center_momentum"])
            np.testing.assert_allclose(center, arrays[f"{ours}/center_after{i}"][0], **CLOSE)


@pytest.mark.parametrize("targets", ["centering", "sinkhorn"])
@pytest.mark.parametrize("padding", [0, 4])
def test_ibot_loss(losses, targets, padding):
    arrays, meta = losses
    c = meta["config"]
    center = jnp.zeros(c["out_dim"])
    for i, temp in enumerate(c["temps"]):
        # Padding rows hold values that would change the result if they counted.
        teacher, student = (
            np.pad(arrays[f"in/{who}_patch{i}"], ((0, padding), (0, 0)), constant_values=3)
            for who in ("teacher", "student")
        )
        weights = np.pad(arrays[f"in/masks_weight{i}"], (0, padding))
        if targets == "sinkhorn":
            center = dinov2.sinkhorn_center(teacher, weights > 0, temp)
        q = dino.targets(teacher, center, temp)
        count = len(weights) - padding
        np.testing.assert_allclose(q[:count], arrays[f"ibot/{targets}/teacher_probs{i}"], **CLOSE)
        crops = len(arrays[f"in/masks{i}"])
        loss = partial(dinov2.ibot_loss, q, weights=weights, crops=crops, temp=meta["student_temp"])
        value, grad = jax.value_and_grad(loss)(student)
        np.testing.assert_allclose(value, arrays[f"ibot/{targets}/loss{i}"], **CLOSE)
        np.testing.assert_allclose(grad[:count], arrays[f"ibot/{targets}/grad{i}"], **CLOSE)
        np.testing.assert_array_equal(grad[count:], 0)
        if targets == "centering":
            center = dino.update_center(center, teacher[:count].mean(0), meta["center_momentum"])
            np.testing.assert_allclose(center, arrays[f"ibot/centering/center_after{i}"][0, 0], **CLOSE)


def test_koleo_loss(losses):
    arrays, meta = losses
    for batch in meta["config"]["koleo_batches"]:
        value, grad = jax.value_and_grad(dinov2.koleo_loss)(arrays[f"in/koleo_b{batch}"])
        np.testing.assert_allclose(value, arrays[f"koleo/b{batch}/loss"], **CLOSE)
        np.testing.assert_allclose(grad, arrays[f"koleo/b{batch}/grad"], **CLOSE)

    def both_crops(x):
        return meta["koleo_weight"] * sum(map(dinov2.koleo_loss, jnp.split(x, 2)))

    value, grad = jax.value_and_grad(both_crops)(arrays["in/koleo_cls"])
    np.testing.assert_allclose(value, arrays["koleo/cls/backprop_loss"], **CLOSE)
    np.testing.assert_allclose(grad, arrays["koleo/cls/grad"], **CLOSE)


def test_equal_images_leave_koleo_finite():
    value, grad = jax.value_and_grad(dinov2.koleo_loss)(jnp.ones((4, 8)))
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


def test_sinkhorn_gives_prototypes_equal_shares():
    logits = 3 * jax.random.normal(jax.random.key(0), (512, 8)) + jnp.arange(8)
    q = dino.targets(logits, dinov2.sinkhorn_center(logits, jnp.ones(512, bool), 0.5), 0.5)
    np.testing.assert_allclose(q.mean(0), 1 / 8, atol=0.06)  # three rounds come close
    assert np.abs(dino.targets(logits, jnp.zeros(8), 0.5).mean(0) - 1 / 8).max() > 0.2


def test_drop_path_keeps_the_references_number_of_images(golden2):
    _, meta = golden2("drop2")
    for name, kept in meta["kept_sizes"].items():
        images, rate = name.removeprefix("b").split("_r")
        keys = jax.random.split(jax.random.key(0), 2 * int(images))
        factors = np.asarray(drop_path_subsets(keys, float(rate), 3, views=1, images=int(images)))
        groups = factors.reshape(3, 2, 2, -1)
        np.testing.assert_array_equal((groups > 0).sum(-1), kept)
        np.testing.assert_allclose(groups.sum(-1), int(images), rtol=1e-6)
    halves = [drop_path_subsets(part, 0.4, 3, views=2, images=64) for part in np.split(keys[: 2 * 64], 2)]
    whole = drop_path_subsets(keys[: 2 * 64], 0.4, 3, views=2, images=64)
    np.testing.assert_array_equal(np.concatenate(halves, axis=-1), whole)


class Run(NamedTuple):
    """A golden trajectory, ready to be run."""

    arrays: dict
    meta: dict
    setup: object
    state: dinov2.TrainState
    batches: list


def golden_config(meta):
    """The golden's settings as a config of ours."""
    c = meta["config"]
    config = recipes.get_config("default")
    changes = {
        "method": "dinov2",
        "batch_size": c["batch"],
        "epochs": float(c["epochs"]),
        "dtype": "float32",
        "model.arch": "vit",
        **{f"model.{name}": c["vit"][name] for name in ("embed_dim", "depth", "num_heads")},
        "model.patch_size": c["patch_size"],
        "model.drop_path_rate": 0.0,
        "model.layer_scale": 1e-5,
        "model.ffn": "swiglu" if "swiglu" in meta["ffn_layer"] else "mlp",
        "model.registers": meta["num_register_tokens"],
        "head.out_dim": c["out_dim"],
        "head.hidden_dim": c["hidden"],
        "head.bottleneck_dim": c["bottleneck"],
        "head.norm_last_layer": False,
        "dino.teacher_temp": c["tt"],
        "dino.warmup_teacher_temp": c["wt"],
        "dino.warmup_teacher_temp_epochs": float(c["wte"]),
        "dino.teacher_temp_changes": "step",
        "dino.teacher_momentum": c["momentum"],
        "dinov2.targets": "sinkhorn" if "sinkhorn" in meta["centering"] else "center",
        "dinov2.group_images": c["batch"],
        "dinov2.mask_probability": c["prob"],
        "dinov2.mask_ratio": tuple(c["ratio"]),
        "dinov2.separate_head": meta["separate_head"],
        "dinov2.patch_out_dim": c["ibot_out_dim"],
        "dinov2.patch_bottleneck_dim": c["ibot_bottleneck"],
        "loss_weights.koleo": c["koleo"],
        "optim.lr": c["base_lr"],
        "optim.lr_rule": "sqrt",
        "optim.min_lr": c["min_lr"],
        "optim.warmup_epochs": float(c["warmup_epochs"]),
        "optim.weight_decay": c["wd"],
        "optim.weight_decay_end": c["wd_end"],
        "optim.clip_grad": c["clip"],
        "optim.clip_by": "module",
        "optim.layer_decay": c["layer_decay"],
        "optim.patch_embed_lr": c["patch_mult"],
        "optim.freeze_last_layer_epochs": float(meta["official_cfg"]["optim"]["freeze_last_layer_epochs"]),
        "optim.freeze_by": "lr",
        "crops.global_size": c["global"],
        "crops.local_size": c["local"],
        "crops.local_number": c["n_local"],
    }
    config.update_from_flattened_dict(changes)
    return config


def load_run(golden2, rule_weights2, kind):
    """The golden's config, initial weights, crops and masks as a setup, a state and batches."""
    arrays, meta = golden2(f"traj2_{kind}")
    inputs, inputs_meta = golden2("traj2_inputs")
    config = golden_config(meta)
    setup = build_setup(config, meta["config"]["epoch_length"])._replace(augment=lambda keys, batch: batch.crops)
    size = config.crops.global_size
    shapes = jax.eval_shape(partial(setup.method.init, image_shape=(size, size, 3)), jax.random.key(0))
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    weights = rule_weights2(meta["shapes"], meta["weights_seed"], override=meta["override"])
    student = {
        part: from_official(
            {"params": state.student[part], "batch_stats": {}},
            {name.removeprefix(f"{theirs}."): x for name, x in weights.items() if name.startswith(f"{theirs}.")},
            part,
        )["params"]
        for part, theirs in PARTS.items()
        if part in state.student
    }
    opt_state = jax.jit(optimizers.build(config.optim).init)(student)
    state = state.replace(
        student=student, teacher=student, opt_state=opt_state, recent=recent.init(config.head.out_dim)
    )

    def batch(i):
        crops = [
            inputs[f"step{i}/{kind}"].transpose(0, 2, 3, 1).reshape(n, -1, side, side, 3).swapaxes(0, 1)
            for kind, n, side in (("global", 2, size), ("local", config.crops.local_number, config.crops.local_size))
        ]
        given = by_image(inputs[f"step{i}/masks"], 2)
        rows, row_weights = masks.masked_rows(given, inputs_meta["steps"][i]["upperbound"])
        return CropBatch(np.arange(config.batch_size), masks.MaskedCrops(*crops, given, rows[None], row_weights[None]))

    return Run(arrays, meta, setup, state, [batch(i) for i in range(len(arrays["loss/total_backprop"]))])


def torch_params(tree):
    """All arrays by their names in the reference."""
    return {f"{PARTS[part]}.{name}": x for part in tree for name, x in to_official(tree[part]).items()}


def compare(ours, theirs, meta):
    """Tensors by name, without the key third of qkv.bias, whose true gradient is 0 (noise under Adam)."""
    dim = meta["config"]["vit"]["embed_dim"]
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        ours_value = np.asarray(ours[name])
        if name.endswith("qkv.bias"):
            value, ours_value = (np.delete(x, np.s_[dim : 2 * dim]) for x in (value, ours_value))
        np.testing.assert_allclose(ours_value, value, err_msg=name, **CLOSE)


def part_of(arrays, prefix):
    return {name.removeprefix(f"{prefix}/"): x for name, x in arrays.items() if name.startswith(f"{prefix}/")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shared_centering", "separate_sinkhorn"])
def test_trajectory(golden2, rule_weights2, kind):
    arrays, meta, setup, state, batches = load_run(golden2, rule_weights2, kind)
    step = jax.jit(partial(step_and_gradient, setup, sharding.make_mesh(jax.devices()[:1])))
    for i, batch in enumerate(batches):
        state, metrics, grads = step(state, batch)
        if i == 0:
            compare(torch_params(grads), part_of(arrays, "grad_step0"), meta)
        for part, theirs in PARTS.items():
            if part in grads:
                norm = np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(grads[part])))
                np.testing.assert_allclose(norm, arrays[f"grad_norm/{theirs}"][i], err_msg=f"{part} {i}", **CLOSE)
        shown = {name: arrays[f"loss/{name}"][i] for name in ("dino_local_crops_loss", "dino_global_crops_loss")}
        np.testing.assert_allclose(metrics["loss_dino"], sum(shown.values()), **CLOSE)
        np.testing.assert_allclose(metrics["loss_ibot"], 2 * arrays["loss/ibot_loss"][i], **CLOSE)
        np.testing.assert_allclose(
            meta["config"]["koleo"] * metrics["loss_koleo"], 2 * arrays["loss/koleo_loss"][i], **CLOSE
        )
        np.testing.assert_allclose(metrics["loss"], arrays["loss/total_backprop"][i], **CLOSE)
        for ours, theirs in (
            ("lr", "lr"),
            ("weight_decay", "wd"),
            ("teacher_momentum", "momentum"),
            ("teacher_temp", "teacher_temp"),
        ):
            np.testing.assert_allclose(
                metrics[ours], meta["schedules"][theirs][i], err_msg=theirs, rtol=1e-5, atol=1e-8
            )
        if setup.config.dinov2.targets == "center":
            for ours, theirs in (("center", "dino"), ("patch_center", "ibot")):
                expected = arrays[f"center_{theirs}_step{i}"].ravel()
                np.testing.assert_allclose(getattr(state, ours), expected, **CLOSE)
        for who in ("student", "teacher"):
            ours = torch_params(getattr(state, who))
            for name, expected in zip(meta["norm_names"], arrays[f"{who}_norms_step{i}"], strict=True):
                if "qkv.bias" not in name:
                    np.testing.assert_allclose(np.linalg.norm(ours[name]), expected, err_msg=name, **CLOSE)
    for who in ("student", "teacher"):
        compare(torch_params(getattr(state, who)), part_of(arrays, who), meta)


@pytest.mark.parametrize("kind", ["shared_centering", "separate_sinkhorn"])
def test_outputs_at_step_0(golden2, rule_weights2, kind):
    arrays, meta, setup, state, batches = load_run(golden2, rule_weights2, kind)
    method = dataclasses.replace(setup.method, axes=None)  # outside of a mesh
    crops, temp = batches[0].crops, meta["schedules"]["teacher_temp"][0]
    taught = method.teach(state, crops)
    if setup.batch_centered:
        state = method.center_on(state, taught, temp)
    logits, patch_logits = method.logits(state.teacher, taught)
    q, patch_q = dino.targets(logits, state.center, temp), dino.targets(patch_logits, state.patch_center, temp)
    # The reference's rows of masked patches are ordered by crop, then image.
    image, crop, _ = np.unravel_index(crops.rows[0], crops.masks.shape)
    order = np.lexsort((crops.rows[0], image, crop, crops.weights[0] == 0))[: int((crops.weights > 0).sum())]
    np.testing.assert_allclose(q, by_image(arrays["step0/teacher_cls_probs"], 2), **CLOSE)
    np.testing.assert_allclose(patch_q[order], arrays["step0/teacher_patch_probs"], **CLOSE)
    out = method.outputs(state.student, crops, crops.groups, [None, None], crops.masks)
    logits, patch_logits = method.logits(state.student, out)
    np.testing.assert_allclose(logits[:, :2], by_image(arrays["step0/student_global"], 2), **CLOSE)
    local = setup.config.crops.local_number
    np.testing.assert_allclose(logits[:, 2:], by_image(arrays["step0/student_local"], local), **CLOSE)
    np.testing.assert_allclose(patch_logits[order], arrays["step0/student_patch"], **CLOSE)
