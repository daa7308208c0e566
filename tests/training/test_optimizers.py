"""Parameter groups, schedules and freezes of DINOv2 against the reference; DINO's are in its trajectories."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from dino_jax import recipes
from dino_jax.models import DINOHead, build_backbone
from dino_jax.training import optimizers, schedules
from dino_jax.weights.official import to_official

SCHEDULES = {"lr": "lr", "wd": "weight_decay", "momentum": "teacher_momentum", "teacher_temp": "teacher_temp"}


@pytest.fixture(scope="module")
def reference(goldens2_dir):
    return json.loads((goldens2_dir / "optim2.json").read_text())


def shapes(module, x):
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(x))["params"]


def student_of(group):
    """Shapes of a student like that of a group of the reference."""
    names = group["backbone"]
    width, channels, patch, _ = names["patch_embed.proj.weight"]["shape"]
    positions = names["pos_embed"]["shape"][1]
    backbone = build_backbone(
        "vit",
        embed_dim=width,
        depth=group["depth"],
        num_heads=1,
        patch_size=patch,
        image_size=patch * round((positions - 1) ** 0.5),
        registers=group["registers"],
        layer_scale=1e-5,
        ffn="swiglu" if any("w12" in name for name in names) else "mlp",
        mask_token=True,
    )
    bottleneck, hidden = group["dino_head"]["mlp.4.weight"]["shape"]
    head = DINOHead(group["dino_head"]["last_layer.weight_v"]["shape"][0], hidden, bottleneck, norm_last_layer=False)
    return {"backbone": shapes(backbone, (1, patch, patch, channels)), "head": shapes(head, (1, width))}


@pytest.mark.parametrize("kind", ["unchunked", "chunked", "no_decay"])
def test_groups_are_dinov2s(reference, kind):
    group = reference["groups"][kind]
    student = student_of(group)
    multipliers = optimizers.lr_multipliers(student, group["layer_decay"], group["patch_embed_lr_mult"])
    decayed = optimizers.decay_mask(student)
    for part, theirs in (("backbone", "backbone"), ("head", "dino_head")):
        full = [
            to_official(jax.tree.map(lambda x, v: np.broadcast_to(np.float32(v), x.shape), student[part], tree[part]))
            for tree in (multipliers, decayed)
        ]
        # The reference's names of blocks in chunks are blocks.CHUNK.BLOCK.
        expected = {
            ".".join(name.split(".")[:1] + name.split(".")[2:])
            if group["block_chunks"] and "blocks" in name
            else name: one
            for name, one in group[theirs].items()
        }
        assert set(full[0]) == set(expected)
        for name, one in expected.items():
            np.testing.assert_allclose(full[0][name], one["lr_multiplier"], rtol=1e-6, err_msg=name)
            np.testing.assert_array_equal(full[1][name], one["wd_multiplier"], err_msg=name)


def given_config(one):
    """Our config for a schedule of the reference."""
    optim, teacher = one["config"]["optim"], one["config"]["teacher"]
    config = recipes.get_config("default")
    config.batch_size, config.epochs = one["batch_total"], float(optim["epochs"])
    config.optim.update(
        lr=optim["base_lr"],
        lr_rule="sqrt",
        min_lr=optim["min_lr"],
        warmup_epochs=float(optim["warmup_epochs"]),
        weight_decay=optim["weight_decay"],
        weight_decay_end=optim["weight_decay_end"],
        freeze_last_layer_epochs=float(optim["freeze_last_layer_epochs"]),
    )
    config.dino.update(
        teacher_momentum=teacher["momentum_teacher"],
        teacher_momentum_end=float(teacher["final_momentum_teacher"]),
        warmup_teacher_temp=teacher["warmup_teacher_temp"],
        teacher_temp=teacher["teacher_temp"],
        warmup_teacher_temp_epochs=float(teacher["warmup_teacher_temp_epochs"]),
        teacher_temp_changes="step",
    )
    return config


def compare_schedules(config, steps_per_epoch, steps, values):
    schedule = schedules.from_config(config, steps_per_epoch)
    ours = jax.vmap(schedule.at)(jnp.asarray(steps))
    for theirs, name in SCHEDULES.items():
        # float32 on the device against float64
        tolerance = {"rtol": 1e-5, "atol": 2e-6 * max(values[theirs])}
        np.testing.assert_allclose(getattr(ours, name), values[theirs], err_msg=theirs, **tolerance)
    last_layer_lr = jnp.where(ours.last_layer_frozen, 0, ours.lr)
    np.testing.assert_allclose(
        last_layer_lr, values["last_layer_lr"], rtol=1e-5, atol=2e-6 * max(values["last_layer_lr"])
    )


def test_schedules_are_dinov2s(reference):
    for one in reference["schedules"]:
        steps = range(len(one["values"]["lr"]))
        compare_schedules(given_config(one), one["OFFICIAL_EPOCH_LENGTH"], steps, one["values"])


@pytest.mark.parametrize(("recipe", "epoch"), [("vitl16_short", 625), ("vitl14", 4_621), ("vitg14", 4_621)])
def test_recipes_have_dinov2s_schedules(reference, recipe, epoch):
    one = reference["milestones"][recipe]
    config = recipes.get_config(f"dinov2_{recipe}")
    assert config.batch_size == one["batch_total"]
    assert schedules.steps_of(config.epochs, epoch) == one["total_iters"]
    compare_schedules(config, epoch, one["iterations"], one["values"])


def test_a_frozen_backbone_stays_while_heads_train():
    student = {"backbone": {"kernel": jnp.ones((2, 2))}, "head": {"last_layer": {"weight_v": jnp.ones((2, 2))}}}
    optim = ConfigDict(recipes.get_config("default").optim.to_dict() | {"freeze_backbone_epochs": 1.0})
    for frozen in (True, False):
        optimizer = optimizers.build(optim, 0.1, 0.1, backbone_frozen=frozen)
        updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, student), optimizer.init(student), student)
        assert (np.abs(updates["backbone"]["kernel"]).max() == 0) == frozen
        assert np.abs(updates["head"]["last_layer"]["weight_v"]).min() > 0
