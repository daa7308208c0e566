"""DINOv2 (Oquab et al., 2023, arXiv 2304.07193): DINO on whole images, iBOT on masked patches, KoLeo on features.

The student sees global crops with blocks of patches masked out, and the teacher sees them whole. Three losses are
added: DINO's on the CLS tokens; iBOT's, which predicts the teacher's output at each masked patch; and KoLeo, which
spreads the features of different images. The teacher's targets are centered by a moving average, as in DINO, or by
Sinkhorn-Knopp, which gives all prototypes the same share of the batch.

Shapes: as in `dino`, and `N` patches of a global crop, `M` masked patches of all global crops, padded to a constant.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dino_jax import dino
from dino_jax.data.masks import MaskedCrops
from dino_jax.dino import Function, Params, targets, update_center, update_teacher
from dino_jax.health import signals
from dino_jax.models.head import prototype_logits

SINKHORN_ROUNDS = 3
EPS = 1e-8  # of KoLeo's distances and their logarithm


class TrainState(flax.struct.PyTreeNode):
    """Everything that changes during training, as arrays."""

    step: jax.Array  # int32 []
    student: Params  # {"backbone", "head"}, and "patch_head" if patches have a head of their own
    teacher: Params
    student_stats: Params  # no batch norm: empty
    teacher_stats: Params
    center: jax.Array  # float32 [K], of CLS tokens
    patch_center: jax.Array  # float32 [K'], of patches
    opt_state: optax.OptState
    recent: dict[str, jax.Array]  # of `training.recent`


class Outputs(NamedTuple):
    """What a network makes of the crops of B images."""

    z: jax.Array  # unit vectors float32 [B, V, D], of the views
    patch_z: jax.Array  # unit vectors float32 [M, D'], of the masked patches
    weights: jax.Array  # float32 [M], 1 / (masked patches of the patch's crop), 0 for padding
    cls: jax.Array  # float32 [B, G, C], the backbone's features of the global crops


def ibot_loss(q: jax.Array, patch_logits: jax.Array, weights: jax.Array, crops: int, temp: float) -> jax.Array:
    """iBOT (Zhou et al., 2022): cross-entropy at masked patches, averaged over each crop's, then over all crops.

    q, patch_logits: [M, K']. weights [M]: 1 / (masked patches of the patch's crop), 0 for padding. crops: the number
    of global crops, masked or not: one without a mask counts as 0.
    """
    log_p = jax.nn.log_softmax(patch_logits / temp)
    return -jnp.sum(weights * jnp.einsum("mk,mk->m", q, log_p)) / crops


def ibot_from_head(
    q: jax.Array, z: jax.Array, weights: jax.Array, crops: int, prototypes: Function, last_layer: Params, temp: float
) -> jax.Array:
    """`ibot_loss` of the logits prototypes(last_layer, z), for unit vectors z [M, D']."""
    return ibot_loss(q, prototypes(last_layer, z), weights, crops, temp)


def koleo_loss(features: jax.Array) -> jax.Array:
    """KoLeo (Sablayrolles et al., 2019): minus the mean log distance of each unit vector to its nearest; [n, C] -> [].

    The gradient flows through both vectors of each pair.
    """
    x = features * jax.lax.rsqrt(jnp.maximum(jnp.square(features).sum(-1, keepdims=True), EPS**2))
    similarity = jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST)
    nearest = jnp.argmax(jnp.where(jnp.eye(len(x), dtype=bool), -jnp.inf, similarity), axis=1)
    distance = jnp.sqrt(jnp.square(x - x[nearest] + EPS).sum(-1))
    return -jnp.log(distance + EPS).mean()


def sinkhorn_center(logits: jax.Array, used: jax.Array, temp: jax.Array | float, axes: Any = None) -> jax.Array:
    """The center that makes `dino.targets` of these logits the result of Sinkhorn-Knopp (Cuturi, 2013), [M, K] -> [K].

    Each of three rounds divides exp(logits / temp) by its sum over rows, then by its sum over prototypes. The sums over
    rows end up in the center, and `targets` takes the last sum over prototypes. used [M]: False for padding. axes: the
    mesh axes that hold further rows.
    """
    scaled = logits / temp
    row_sums = jnp.where(used, 0.0, jnp.inf)  # logarithms, [M]; padding has no weight
    for _ in range(SINKHORN_ROUNDS):
        column_sums = _logsumexp_over_rows(scaled - row_sums[:, None], axes)  # [K]
        row_sums = jnp.where(used, jax.nn.logsumexp(scaled - column_sums, axis=1), jnp.inf)
    column_sums -= column_sums.mean()  # which no target depends on
    return jnp.where(jnp.isfinite(column_sums), temp * column_sums, 0.0)  # without any row that is used: no center


def _logsumexp_over_rows(x: jax.Array, axes: Any) -> jax.Array:
    """[M, K] -> [K], over the rows of all devices of the mesh axes."""
    top = x.max(axis=0)
    top = jax.lax.pmax(top, axes) if axes else top
    total = jnp.exp(x - top).sum(axis=0)
    return top + jnp.log(jax.lax.psum(total, axes) if axes else total)


@dataclass(frozen=True)
class DINOv2:
    """The method, a sibling of `dino.DINO` for `training.step`. It takes ViTs with a mask token."""

    backbone: Any  # a Flax module
    head: Any
    patch_head: Any | None  # None: patches share the head of the CLS tokens
    student_temp: float
    center_momentum: float
    sinkhorn: bool  # targets by Sinkhorn-Knopp instead of centering
    group_images: int  # images whose features KoLeo compares, consecutive in the global batch
    axes: Any = None  # mesh axes over which the batch is split
    loss_from_head: Function = dino.loss_from_head  # or those of `training.chunked_loss`, which take less memory
    ibot_from_head: Function = ibot_from_head

    def init(self, key: jax.Array, image_shape: tuple[int, int, int]) -> TrainState:
        """A random student, its copy as the teacher, zero centers. image_shape: [H, W, C] of a global crop."""
        backbone_key, head_key, patch_key = jax.random.split(key, 3)
        features = jnp.zeros((1, self.backbone.embed_dim))
        student = {
            "backbone": self.backbone.init(backbone_key, jnp.zeros((1, *image_shape)))["params"],
            "head": self.head.init(head_key, features)["params"],
        }
        if self.patch_head:
            student["patch_head"] = self.patch_head.init(patch_key, features)["params"]
        stats: Params = {"backbone": {}, "head": {}}
        teacher, teacher_stats = jax.tree.map(jnp.copy, (student, stats))
        centers = jnp.zeros(self.head.out_dim), jnp.zeros((self.patch_head or self.head).out_dim)
        return TrainState(jnp.int32(0), student, teacher, stats, teacher_stats, *centers, (), {})

    def teach(self, state: TrainState, crops: MaskedCrops) -> Outputs:
        """Runs the teacher. It sees the global crops only, and sees them whole."""
        return self.outputs(state.teacher, crops, crops.groups[:1], [None], None)

    def center_on(self, state: TrainState, taught: Outputs, teacher_temp: jax.Array) -> TrainState:
        """Centers the targets of a batch on the batch itself, by Sinkhorn-Knopp. taught: outputs for all of it."""
        logits, patch_logits = self.logits(state.teacher, taught)
        rows = logits.reshape(-1, logits.shape[-1])
        return state.replace(
            center=sinkhorn_center(rows, jnp.ones(len(rows), bool), teacher_temp, self.axes),
            patch_center=sinkhorn_center(patch_logits, taught.weights > 0, teacher_temp, self.axes),
        )

    def losses(
        self,
        student: Params,
        state: TrainState,
        crops: MaskedCrops,
        drop_paths: list[Any],
        teacher_temp: jax.Array,
        taught: Outputs | None = None,
    ) -> tuple[Params, Params, Params]:
        """Compares the student with the teacher. drop_paths: factors for each of `crops.groups`, or None.

        taught: what `teach` returns, if the caller has it. Returns the losses by name, means over the batch, and the
        (empty) statistics of batch norm by their TrainState field.
        """
        # 1. The teacher's outputs become targets for the views and for the masked patches.
        taught = taught or self.teach(state, crops)
        logits, patch_logits = self.logits(state.teacher, taught)  # [B, G, K], [M, K']
        q = targets(logits, state.center, teacher_temp)
        patch_q = targets(patch_logits, state.patch_center, teacher_temp)

        # 2. The student sees all crops, the global ones with masks.
        out = self.outputs(student, crops, crops.groups, drop_paths, crops.masks)

        # 3. Its views match the targets of the other global crops, its masked patches those of the same patches.
        B, G, _ = q.shape
        head, patch_head = student["head"], self._patch_head(student)[1]
        patches = patch_q, out.patch_z, out.weights, B * G, self.patch_prototypes, patch_head["last_layer"]
        losses = {
            "dino": self.loss_from_head(q, out.z, self.prototypes, head["last_layer"], self.student_temp),
            "ibot": self.ibot_from_head(*patches, self.student_temp),
        }

        # 4. Its features of different images keep apart, in each global crop for itself.
        groups = out.cls.reshape(-1, self.group_images, G, out.cls.shape[-1]).swapaxes(1, 2)
        losses["koleo"] = jax.vmap(jax.vmap(koleo_loss))(groups).sum(1).mean()

        masked = (out.weights > 0)[:, None]
        means = {"logits": logits.mean((0, 1)), "center": state.center, "patch_center": state.patch_center}
        means |= {"patch_logits": (masked * patch_logits).sum(0) / B, "masked_patches": masked.sum() / B}
        means |= signals.batch_means(crops.global_crops, logits, q, out.z, taught.z)
        return losses, means, {"student_stats": state.student_stats, "teacher_stats": state.teacher_stats}

    def update(self, state: TrainState, means: Params, teacher_momentum: jax.Array) -> TrainState:
        """Moves what no gradient trains: the teacher after the student's step, and the centers."""
        state = state.replace(teacher=update_teacher(state.teacher, state.student, teacher_momentum))
        if self.sinkhorn:  # the centers were those of this batch
            return state.replace(center=means["center"], patch_center=means["patch_center"])
        some = means["masked_patches"] > 0
        patch_mean = means["patch_logits"] / jnp.where(some, means["masked_patches"], 1)
        patch_center = update_center(state.patch_center, patch_mean, self.center_momentum)
        return state.replace(
            center=update_center(state.center, means["logits"], self.center_momentum),
            patch_center=jnp.where(some, patch_center, state.patch_center),
        )

    def signals(self, state: TrainState, losses: Params, means: Params) -> Params:
        """The scalars of `health.signals`, of the CLS tokens."""
        return signals.scalars(means, state.center, losses["dino"])

    def embed(self, params: Params, stats: Params, groups: list[Any], drop_paths: list[Any]) -> tuple[Any, Params]:
        """Groups of equally large, whole crops -> unit vectors float32 [B, V, D], as `dino.DINO.embed`."""
        views, _ = self._features(params, groups, drop_paths, None)
        return self.head.apply({"params": params["head"]}, views, method="bottleneck"), stats

    def prototypes(self, last_layer: Params, z: jax.Array) -> jax.Array:
        """Unit vectors [..., D] -> logits float32 [..., K], for all the prototypes of last_layer or a part of them."""
        return prototype_logits(self.head, last_layer, z)

    def patch_prototypes(self, last_layer: Params, z: jax.Array) -> jax.Array:
        """The same of masked patches, [..., D'] -> [..., K']."""
        return prototype_logits(self.patch_head or self.head, last_layer, z)

    def _features(
        self, params: Params, groups: list[Any], drop_paths: list[Any], masks: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Returns CLS tokens [B, V, C] of all crops and patch tokens [B * G, N, C] of the first group.

        masks: of the crops of the first group, bool [B, G, N], or None.
        """
        views: list[jax.Array] = []
        patches: list[jax.Array] = []
        for crops, drop_path in zip(groups, drop_paths, strict=True):
            images = crops.reshape(-1, *crops.shape[2:])
            mask = None if masks is None or patches else masks.reshape(len(images), -1)
            tokens = self.backbone.apply({"params": params["backbone"]}, images, True, drop_path, mask)
            views.append(tokens.cls.reshape(*crops.shape[:2], -1))
            patches.append(tokens.patches)
        return jnp.concatenate(views, axis=1), patches[0]

    def outputs(
        self, params: Params, crops: MaskedCrops, groups: list[Any], drop_paths: list[Any], masks: Any
    ) -> Outputs:
        """Runs backbone and heads on groups of crops, and on those patches of global crops that have a mask."""
        views, patches = self._features(params, groups, drop_paths, masks)
        rows = patches.reshape(-1, patches.shape[-1])[crops.flat_rows()]
        z = self.head.apply({"params": params["head"]}, views, method="bottleneck")
        patch_head, patch_params = self._patch_head(params)
        patch_z = patch_head.apply({"params": patch_params}, rows, method="bottleneck")
        global_views = views[:, : crops.global_crops.shape[1]].astype(jnp.float32)
        return Outputs(z, patch_z, crops.weights.ravel(), global_views)

    def logits(self, params: Params, outputs: Outputs) -> tuple[jax.Array, jax.Array]:
        """Returns the logits of views and of masked patches, [B, V, K] and [M, K']."""
        patch_layer = self._patch_head(params)[1]["last_layer"]
        return (
            self.prototypes(params["head"]["last_layer"], outputs.z),
            self.patch_prototypes(patch_layer, outputs.patch_z),
        )

    def _patch_head(self, params: Params) -> tuple[Any, Params]:
        """Returns the head of patches and its parameters."""
        return (self.patch_head, params["patch_head"]) if self.patch_head else (self.head, params["head"])
