"""Variants of DINO for the paper's table of components (Caron et al., 2021, table 7): siblings of `dino.DINO`.

Each changes one component and keeps the rest: mean squared error instead of cross-entropy, a predictor on the student
as in BYOL (Grill et al., 2020), and targets by Sinkhorn-Knopp instead of centering as in SwAV (Caron et al., 2020).

Shapes: as in `dino`.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dino_jax import dino
from dino_jax.data.multicrop import Crops
from dino_jax.dino import DINO, Params, TrainState, targets
from dino_jax.dinov2 import sinkhorn_center
from dino_jax.health import signals
from dino_jax.models.head import l2_normalize
from dino_jax.models.layers import apply_in_training, gelu


def mse(q: jax.Array, student_logits: jax.Array, temp: float) -> jax.Array:
    """Mean squared error of each student view's distribution to the targets of the *other* global crops.

    The error of a pair is the squared distance of the two distributions, *summed* over prototypes: 0 to 2, whatever
    their number. As in `dino.loss`, it is averaged over pairs. q [B, G, K], student_logits [B, V, K]; a scalar.
    """
    (B, G, _), V = q.shape, student_logits.shape[1]
    p = jax.nn.softmax(student_logits / temp)  # [B, V, K]
    squares = jnp.square(q).sum((0, 2))[:, None] + jnp.square(p).sum((0, 2))  # [G, V], summed over images
    pairs = squares - 2 * jnp.einsum("bgk,bvk->gv", q, p)
    return (pairs * (1 - jnp.eye(G, V))).sum() / (B * G * (V - 1))  # all pairs but a view with itself


class Predictor(nn.Module):
    """Two-layer MLP from bottleneck to bottleneck."""

    hidden_dim: int
    out_dim: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, z: jax.Array, train: bool = False) -> jax.Array:
        """Unit vectors [..., D] -> unit vectors float32 [..., D]."""
        small = nn.initializers.normal(0.02)
        x = gelu(nn.Dense(self.hidden_dim, kernel_init=small, dtype=self.dtype, name="mlp_0")(z))
        x = nn.Dense(self.out_dim, kernel_init=small, dtype=self.dtype, name="mlp_1")(x)
        return l2_normalize(x.astype(jnp.float32))


@dataclass(frozen=True)
class DINOWithMSE(DINO):
    """DINO trained by `mse`, on the same targets. All logits are in memory at once."""

    def losses(
        self, student: Params, state: TrainState, crops: Crops, drop_paths: list[Any], teacher_temp: jax.Array
    ) -> tuple[Params, Params, Params]:
        """The steps of `DINO.losses`, with another loss in the last one."""
        teacher_z, teacher_stats = self.embed(state.teacher, state.teacher_stats, crops.groups[:1], [None])
        teacher_logits = self.prototypes(state.teacher["head"]["last_layer"], teacher_z)
        q = targets(teacher_logits, state.center, teacher_temp)
        z, student_stats = self.embed(student, state.student_stats, crops.groups, drop_paths)
        logits = self.prototypes(student["head"]["last_layer"], z)

        means = {"logits": teacher_logits.mean((0, 1)), "cross_entropy": dino.loss(q, logits, self.student_temp)}
        means |= signals.batch_means(crops.groups[0], teacher_logits, q, z, teacher_z)
        stats = {"student_stats": student_stats, "teacher_stats": teacher_stats}
        return {"mse": mse(q, logits, self.student_temp)}, means, stats

    def signals(self, state: TrainState, losses: Params, means: Params) -> Params:
        """The scalars of `health.signals`; the cross-entropy is measured, not trained."""
        return signals.scalars(means, state.center, means["cross_entropy"])


@dataclass(frozen=True)
class DINOWithPredictor(DINO):
    """DINO whose student predicts the teacher's bottleneck from its own, before the prototypes.

    The predictor is a part of the student's parameters only. It is as wide as the head and has no batch norm.
    """

    @property
    def predictor(self) -> Predictor:
        """The predictor's module."""
        return Predictor(self.head.hidden_dim, self.head.bottleneck_dim, self.head.dtype)

    def init(self, key: jax.Array, image_shape: tuple[int, int, int]) -> TrainState:
        """The state of `DINO.init`, with a random predictor in the student."""
        state = super().init(key, image_shape)
        z = jnp.zeros((1, self.head.bottleneck_dim))
        predictor = self.predictor.init(jax.random.fold_in(key, 1), z)["params"]
        return state.replace(student=state.student | {"predictor": predictor})

    def embed(self, params: Params, stats: Params, groups: list[Any], drop_paths: list[Any]) -> tuple[Any, Params]:
        """As `DINO.embed`; the unit vectors of a network with a predictor are those that it predicts."""
        z, stats = super().embed(params, stats, groups, drop_paths)
        if "predictor" not in params:  # the teacher
            return z, stats
        z, _ = apply_in_training(self.predictor, params["predictor"], {}, z)
        return z, stats

    def update(self, state: TrainState, means: Params, teacher_momentum: jax.Array) -> TrainState:
        """As `DINO.update`, of all that the teacher has."""
        student = {part: state.student[part] for part in state.teacher}
        return super().update(state.replace(student=student), means, teacher_momentum).replace(student=state.student)


@dataclass(frozen=True)
class DINOWithSinkhorn(DINO):
    """DINO whose targets are centered on the batch itself, by Sinkhorn-Knopp: a `training.setup.BatchCentered`."""

    axes: Any = None  # mesh axes over which the batch is split

    def teach(self, state: TrainState, crops: Crops) -> jax.Array:
        """Runs the teacher on the global crops; unit vectors [B, G, D]."""
        return self.embed(state.teacher, state.teacher_stats, crops.groups[:1], [None])[0]

    def center_on(self, state: TrainState, taught: jax.Array, teacher_temp: jax.Array) -> TrainState:
        """Centers the targets of a batch on the batch itself. taught: the result of `teach` for all of it."""
        logits = self.prototypes(state.teacher["head"]["last_layer"], taught)
        rows = logits.reshape(-1, logits.shape[-1])
        center = sinkhorn_center(rows, jnp.ones(len(rows), bool), teacher_temp, self.axes)
        return state.replace(center=center)

    def losses(
        self,
        student: Params,
        state: TrainState,
        crops: Crops,
        drop_paths: list[Any],
        teacher_temp: jax.Array,
        taught: jax.Array | None = None,
    ) -> tuple[Params, Params, Params]:
        """As `DINO.losses`, which runs the teacher again, for its batch norm statistics.

        The compiler merges the two runs, except where a batch is computed in parts.
        """
        losses, means, stats = super().losses(student, state, crops, drop_paths, teacher_temp)
        return losses, means | {"center": state.center}, stats

    def update(self, state: TrainState, means: Params, teacher_momentum: jax.Array) -> TrainState:
        """As `DINO.update`, but the center is that of the batch."""
        return super().update(state, means, teacher_momentum).replace(center=means["center"])


@dataclass(frozen=True)
class DINOWithSinkhornAndPredictor(DINOWithSinkhorn, DINOWithPredictor):
    """Both changes."""
