"""DINO: self-distillation with no labels (Caron et al., ICCV 2021, arXiv 2104.14294).

A student network learns to match the output of a teacher network across crops of the same image. The teacher is a
moving average of the student. Two operations on the teacher's output keep both from collapsing to a constant: centering
keeps any one prototype from dominating, and sharpening keeps the output from becoming uniform.

Shapes: `B` images, `G` = 2 global crops, `V` = G + L views with `L` local crops, `D` bottleneck, `K` prototypes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from dino_jax.data.multicrop import Crops
from dino_jax.health import signals
from dino_jax.models.head import prototype_logits
from dino_jax.models.layers import apply_in_training

Params = dict[str, Any]  # {"backbone": ..., "head": ...}; `*_stats` below are the running statistics of batch norm
Function = Callable[..., Any]


class TrainState(flax.struct.PyTreeNode):
    """Everything that changes during training, as arrays."""

    step: jax.Array  # int32 []
    student: Params
    teacher: Params
    student_stats: Params
    teacher_stats: Params
    center: jax.Array  # float32 [K]
    opt_state: optax.OptState
    recent: dict[str, jax.Array]  # of `training.recent`


def targets(teacher_logits: jax.Array, center: jax.Array, temp: jax.Array | float) -> jax.Array:
    """Centered and sharpened teacher distributions, [B, G, K] -> [B, G, K]. No gradient flows into them."""
    return jax.lax.stop_gradient(jax.nn.softmax((teacher_logits - center) / temp))


def loss(q: jax.Array, student_logits: jax.Array, temp: float) -> jax.Array:
    """Equation 3 of the paper: mean cross-entropy of each student view with the targets of the *other* global crops.

    q [B, G, K] are the targets; student_logits [B, V, K] have the global crops first. Returns a scalar.
    """
    (B, G, _), V = q.shape, student_logits.shape[1]
    log_p = jax.nn.log_softmax(student_logits / temp)  # [B, V, K]
    pairs = -jnp.einsum("bgk,bvk->gv", q, log_p)  # [G, V], summed over images
    return (pairs * (1 - jnp.eye(G, V))).sum() / (B * G * (V - 1))  # all pairs but a view with itself


def loss_from_head(q: jax.Array, z: jax.Array, prototypes: Function, last_layer: Params, temp: float) -> jax.Array:
    """`loss` of the logits prototypes(last_layer, z), for unit vectors z [B, V, D]."""
    return loss(q, prototypes(last_layer, z), temp)


def update_teacher(teacher: Params, student: Params, momentum: jax.Array | float) -> Params:
    """teacher <- momentum * teacher + (1 - momentum) * student."""
    return optax.incremental_update(student, teacher, 1 - momentum)


def update_center(center: jax.Array, batch_mean: jax.Array, momentum: float) -> jax.Array:
    """center <- momentum * center + (1 - momentum) * mean teacher logits of the global batch; [K]."""
    return momentum * center + (1 - momentum) * batch_mean


@dataclass(frozen=True)
class DINO:
    """The method. `training.step` runs `losses` on each device's share of a batch, then `update` once."""

    backbone: nn.Module
    head: nn.Module
    student_temp: float
    center_momentum: float  # 1 switches centering off: the center stays at 0
    loss_from_head: Function = loss_from_head  # or `training.chunked_loss`, which takes less memory

    def init(self, key: jax.Array, image_shape: tuple[int, int, int]) -> TrainState:
        """A random student, its copy as the teacher, a zero center. image_shape: [H, W, C] of a global crop."""
        backbone_key, head_key = jax.random.split(key)
        backbone = self.backbone.init(backbone_key, jnp.zeros((1, *image_shape)))
        head = self.head.init(head_key, jnp.zeros((1, self.backbone.embed_dim)))
        student = {"backbone": backbone["params"], "head": head["params"]}
        stats = {"backbone": backbone.get("batch_stats", {}), "head": head.get("batch_stats", {})}
        teacher, teacher_stats = jax.tree.map(jnp.copy, (student, stats))
        return TrainState(jnp.int32(0), student, teacher, stats, teacher_stats, jnp.zeros(self.head.out_dim), (), {})

    def losses(
        self, student: Params, state: TrainState, crops: Crops, drop_paths: list[Any], teacher_temp: jax.Array
    ) -> tuple[Params, Params, Params]:
        """Runs a batch through both networks. drop_paths: factors for each of `crops.groups`, or None.

        Returns the losses by name, means over the batch, and the new batch norm statistics by their TrainState field.
        """
        # 1. The teacher sees the global crops only.
        teacher_z, teacher_stats = self.embed(state.teacher, state.teacher_stats, crops.groups[:1], [None])
        teacher_logits = self.prototypes(state.teacher["head"]["last_layer"], teacher_z)  # [B, G, K]

        # 2. Its output is centered and sharpened.
        q = targets(teacher_logits, state.center, teacher_temp)

        # 3. The student sees all crops.
        z, student_stats = self.embed(student, state.student_stats, crops.groups, drop_paths)  # [B, V, D]

        # 4. Each of its views is to match the targets of the other global crops.
        value = self.loss_from_head(q, z, self.prototypes, student["head"]["last_layer"], self.student_temp)

        means = {"logits": teacher_logits.mean((0, 1))}
        means |= signals.batch_means(crops.groups[0], teacher_logits, q, z, teacher_z)
        return {"dino": value}, means, {"student_stats": student_stats, "teacher_stats": teacher_stats}

    def update(self, state: TrainState, means: Params, teacher_momentum: jax.Array) -> TrainState:
        """Moves what no gradient trains: the teacher after the student's step, and the center."""
        teacher = update_teacher(state.teacher, state.student, teacher_momentum)
        return state.replace(teacher=teacher, center=update_center(state.center, means["logits"], self.center_momentum))

    def signals(self, state: TrainState, losses: Params, means: Params) -> Params:
        """Scalars that tell learning from collapse, which the loss alone does not (paper, section 5.3)."""
        return signals.scalars(means, state.center, losses["dino"])

    def embed(self, params: Params, stats: Params, groups: list[Any], drop_paths: list[Any]) -> tuple[Any, Params]:
        """Groups of equally large crops [B, V_i, H, W, C] -> unit vectors float32 [B, V, D], new statistics.

        The backbone's batch norm is per crop size, so each group is a call; the head's is over all views together.
        """
        features, backbone_stats = [], stats["backbone"]
        for crops, drop_path in zip(groups, drop_paths, strict=True):
            images = crops.reshape(-1, *crops.shape[2:])
            x, backbone_stats = apply_in_training(self.backbone, params["backbone"], backbone_stats, images, drop_path)
            features.append(x.cls.reshape(*crops.shape[:2], -1))
        views = jnp.concatenate(features, axis=1)
        z, head_stats = apply_in_training(self.head, params["head"], stats["head"], views, method="bottleneck")
        return z, {"backbone": backbone_stats, "head": head_stats}

    def prototypes(self, last_layer: Params, z: jax.Array) -> jax.Array:
        """Unit vectors [..., D] -> logits float32 [..., K], for all the prototypes of last_layer or a part of them."""
        return prototype_logits(self.head, last_layer, z)
