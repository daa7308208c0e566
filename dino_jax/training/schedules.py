"""Schedules: pure functions from the step to a value, built once from the config.

Reference: dino `utils.cosine_scheduler` and the teacher temperature of `DINOLoss`; dinov2 for the square root and the
temperature by step. All return float32 scalars and work under `jit`. Epochs become steps in `steps_of` and nowhere
else.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

Schedule = Callable[[jax.Array], jax.Array]

TEACHER_UPDATES = ("ema", "epoch", "copy")
TEMPERATURE_STEPS = ("epoch", "step")
# config.optim.lr_rule -> the factor of optim.lr for a batch: DINO's and DINOv2's
LR_RULES: dict[str, Callable[[int], float]] = {
    "linear": lambda batch_size: batch_size / 256,
    "sqrt": lambda batch_size: math.sqrt(batch_size / 1024),
}


class Values(NamedTuple):
    """What the schedules give at one step, scalars."""

    lr: jax.Array
    weight_decay: jax.Array
    teacher_momentum: jax.Array
    teacher_temp: jax.Array
    last_layer_frozen: jax.Array
    backbone_frozen: jax.Array


class Schedules(NamedTuple):
    """Everything that the train step derives from the step number."""

    lr: Schedule
    weight_decay: Schedule
    teacher_momentum: Schedule
    teacher_temp: Schedule
    last_layer_frozen: Schedule
    backbone_frozen: Schedule

    def at(self, step: jax.Array) -> Values:
        """The values at a step, an int32 scalar."""
        return Values(*(schedule(step) for schedule in self))


def cosine(base: float, final: float, total_steps: int, warmup_steps: int = 0, warmup_start: float = 0.0) -> Schedule:
    """Linear from `warmup_start` to `base` over `warmup_steps` (both ends included), then cosine towards `final`.

    The cosine is one step short of `final` at the last step, as in the reference.
    """

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        warmup = warmup_start + (base - warmup_start) * step / max(warmup_steps - 1, 1)
        progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
        decay = final + 0.5 * (base - final) * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
        return jnp.where(step < warmup_steps, warmup, decay)

    return schedule


def steps_of(epochs: float, steps_per_epoch: int) -> int:
    """Returns the whole number of steps nearest to a number of epochs."""
    return round(epochs * steps_per_epoch)


def temperature(
    start: float, final: float, warmup_epochs: float, steps_per_epoch: int, changes: str = "epoch"
) -> Schedule:
    """Linear from `start` to `final` over `warmup_epochs`, then `final`. It changes every `epoch` or `step`."""
    if changes == "step":
        steps_per_epoch, warmup_epochs = 1, steps_of(warmup_epochs, steps_per_epoch)
    warmup_steps = steps_of(warmup_epochs, steps_per_epoch)

    def schedule(step: jax.Array) -> jax.Array:
        epoch = jnp.asarray(step) // steps_per_epoch
        warmup = start + (final - start) * jnp.minimum(epoch / max(warmup_epochs - 1, 1), 1)
        return jnp.where(jnp.asarray(step) < warmup_steps, warmup, final).astype(jnp.float32)

    return schedule


def teacher_momentum(update: str, start: float, end: float, total_steps: int, steps_per_epoch: int) -> Schedule:
    """The weight of the old teacher in its update, for the variants of the paper's ablation (section 5.2).

    `ema` is DINO's; `copy` makes the teacher the student of the step before (momentum 0); `epoch` keeps the teacher
    through an epoch (momentum 1) and replaces it by the student at the end (momentum 0).
    """
    return {
        "ema": cosine(start, end, total_steps),
        "copy": lambda step: jnp.float32(0),
        "epoch": lambda step: jnp.float32((jnp.asarray(step) + 1) % steps_per_epoch != 0),
    }[update]


def from_config(config: ConfigDict, steps_per_epoch: int) -> Schedules:
    """All schedules of a run. `optim.lr` is scaled by `optim.lr_rule` to its peak; `optim.min_lr` is not."""
    dino, optim = config.dino, config.optim
    total_steps = steps_of(config.epochs, steps_per_epoch)
    warmup_steps = steps_of(optim.warmup_epochs, steps_per_epoch)
    frozen_steps = steps_of(optim.freeze_last_layer_epochs, steps_per_epoch)
    heads_only_steps = steps_of(optim.freeze_backbone_epochs, steps_per_epoch)
    if dino.sharpening:
        teacher_temp = temperature(
            dino.warmup_teacher_temp,
            dino.teacher_temp,
            dino.warmup_teacher_temp_epochs,
            steps_per_epoch,
            dino.teacher_temp_changes,
        )
    else:  # the teacher is no sharper than the student
        teacher_temp = temperature(dino.student_temp, dino.student_temp, 0, steps_per_epoch)
    return Schedules(
        lr=cosine(optim.lr * LR_RULES[optim.lr_rule](config.batch_size), optim.min_lr, total_steps, warmup_steps),
        weight_decay=cosine(optim.weight_decay, optim.weight_decay_end, total_steps),
        teacher_momentum=teacher_momentum(
            dino.teacher_update, dino.teacher_momentum, dino.teacher_momentum_end, total_steps, steps_per_epoch
        ),
        teacher_temp=teacher_temp,
        last_layer_frozen=lambda step: jnp.asarray(step) < frozen_steps,
        backbone_frozen=lambda step: jnp.asarray(step) < heads_only_steps,
    )
