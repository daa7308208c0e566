"""DINO: self-distillation with no labels (Caron et al., ICCV 2021), one page.

A student predicts, from many crops of an image, what a teacher says about its two large ones. The teacher is a moving
average of the student. Nothing but *centering* (no prototype may always win) and *sharpening* (the teacher must commit
itself) keeps both from saying the same of every image.

Shapes: `B` images of this device's share, `G` = 2 global crops, `L` local crops, `V` = G + L views, `K` prototypes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dino_jax import optimizers, sharding
from dino_jax.data.multicrop import Crops
from dino_jax.models.vit import drop_path_factors
from dino_jax.schedules import Schedules


class Network(NamedTuple):
    """The two modules; student and teacher are each a {"backbone": ..., "head": ...} of their parameters."""

    backbone: nn.Module
    head: nn.Module


@flax.struct.dataclass
class TrainState:
    """Arrays only. `*_stats` are the running statistics of batch norm, empty without it."""

    step: jax.Array
    student: dict
    teacher: dict
    student_stats: dict
    teacher_stats: dict
    center: jax.Array  # float32 [K]
    opt_state: optax.OptState


def targets(teacher_logits: jax.Array, center: jax.Array, temp: jax.Array) -> jax.Array:
    """Centered, sharpened teacher distributions, [B, G, K] -> [B, G, K]; no gradient flows into them."""
    return jax.lax.stop_gradient(jax.nn.softmax((teacher_logits - center) / temp))


def view_terms(q: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the loss takes of each student view: logsumexp of its logits, and their mean under its targets; both [B, V].

    q [B, G, K] are the teacher's; logits [B, V, K], over the student's temperature, have the global crops first.
    Cross-entropy is linear in its target, so each view meets the *sum* of its targets once: a global crop that of the
    other one, a local crop both. K may be a part of the prototypes.
    """
    G = q.shape[1]
    by_other = (q[:, ::-1] * logits[:, :G]).sum(-1)
    by_both = (q.sum(1, keepdims=True) * logits[:, G:]).sum(-1)
    return jax.nn.logsumexp(logits, axis=-1), jnp.concatenate([by_other, by_both], axis=1)


def mean_over_pairs(G: int, log_sums: jax.Array, means: jax.Array) -> jax.Array:
    """Mean cross-entropy over the pairs (global crop g of the teacher, view v != g) from `view_terms`; a scalar."""
    V = log_sums.shape[1]
    targets_met = jnp.where(jnp.arange(V) < G, 1, G)  # each of them sums to 1
    return (targets_met * log_sums - means).sum(1).mean() / (G * (V - 1))


def pair_loss(q: jax.Array, logits: jax.Array, temp: float) -> jax.Array:
    """The loss (equation 3 of the paper) of targets q [B, G, K] and the student's logits [B, V, K]."""
    return mean_over_pairs(q.shape[1], *view_terms(q, logits / temp))


def head_loss(q: jax.Array, z: jax.Array, last_layer: dict, prototypes: Callable, temp: float) -> jax.Array:
    """`pair_loss` of logits = prototypes(last_layer, z), z [B, V, bottleneck], made for some prototypes at a time.

    All of them, [B, V, K], would be the largest array of the step, several times over with what their gradient needs.
    The backward pass makes a part again when its turn comes: one product more, at K = 65,536 a three-hundredth of a
    ViT-S step's. All parameters of `last_layer` have an axis of K first.
    """
    G, K = q.shape[1:]
    size = _prototypes_at_a_time(z.shape[0] * z.shape[1], K)
    if size == K:
        return pair_loss(q, prototypes(last_layer, z), temp)

    @partial(jax.checkpoint, prevent_cse=False)  # within a loop there is nothing to prevent
    def terms(part):
        start, layer = part
        return view_terms(jax.lax.dynamic_slice_in_dim(q, start, size, axis=2), prototypes(layer, z) / temp)

    layers = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), last_layer)
    log_sums, means = jax.lax.map(terms, (jnp.arange(0, K, size), layers))
    return mean_over_pairs(G, jax.nn.logsumexp(log_sums, axis=0), means.sum(0))


def _prototypes_at_a_time(views: int, K: int) -> int:
    """A divisor of K, up to 1,024 or 8 times the `views` of all images; all K where its divisors are much smaller.

    On a CPU a small part stays in its cache; the more rows, the more columns a product wants to be worth a kernel.
    """
    most = max(1_024, 8 * views)
    largest = max(size for size in range(1, min(most, K) + 1) if K % size == 0)
    return largest if 8 * largest >= most else K


def update_teacher(teacher: dict, student: dict, momentum: jax.Array) -> dict:
    """teacher <- momentum * teacher + (1 - momentum) * student."""
    return optax.incremental_update(student, teacher, 1 - momentum)


def update_center(center: jax.Array, batch_mean: jax.Array, momentum: float) -> jax.Array:
    """center <- momentum * center + (1 - momentum) * mean teacher logits of the global batch; [K]."""
    return momentum * center + (1 - momentum) * batch_mean


def forward(network: Network, params: dict, stats: dict, crop_groups: list, drop_paths: list) -> tuple[Any, dict]:
    """Groups of equally large crops [B, V_i, H, W, C] -> unit vectors float32 [B, V, bottleneck], new statistics.

    One backbone call a group, as batch norm there is per crop size; the head's MLP sees all views together, as its
    batch norm must. What is left is the prototypes (`logits`).
    """
    features, backbone_stats = [], stats["backbone"]
    for crops, drop_path in zip(crop_groups, drop_paths, strict=True):
        B, V = crops.shape[:2]
        x, backbone_stats = _apply(
            network.backbone, params["backbone"], backbone_stats, crops.reshape(B * V, *crops.shape[2:]), drop_path
        )
        features.append(x.reshape(B, V, -1))
    z, head_stats = _apply(
        network.head, params["head"], stats["head"], jnp.concatenate(features, axis=1), method="bottleneck"
    )
    return z, {"backbone": backbone_stats, "head": head_stats}


def logits(network: Network, last_layer: dict, z: jax.Array) -> jax.Array:
    """Unit vectors [..., bottleneck] -> similarity to each prototype of last_layer, all or some, float32 [..., K]."""
    head = network.head.clone(out_dim=last_layer["weight_v"].shape[0])
    scores: Any = head.apply({"params": {"last_layer": last_layer}}, z, method="prototypes")
    return scores


def _apply(module: nn.Module, params: dict, stats: dict, x: jax.Array, *args, method: str = "__call__"):
    variables = {"params": params, "batch_stats": stats}
    y, mutated = module.apply(variables, x, True, *args, method=method, mutable=["batch_stats"])
    return y, mutated.get("batch_stats", stats)


def init_state(key: jax.Array, network: Network, optim, image_shape: tuple[int, int, int]) -> TrainState:
    """Fresh student, its copy as the teacher, zero centre. image_shape: [H, W, C] of a global crop."""
    backbone_key, head_key = jax.random.split(key)
    backbone = network.backbone.init(backbone_key, jnp.zeros((1, *image_shape)))
    head = network.head.init(head_key, jnp.zeros((1, network.backbone.embed_dim)))
    student = {"backbone": backbone["params"], "head": head["params"]}
    stats = {"backbone": backbone.get("batch_stats", {}), "head": head.get("batch_stats", {})}
    return TrainState(
        step=jnp.int32(0),
        student=student,
        teacher=jax.tree.map(jnp.copy, student),
        student_stats=stats,
        teacher_stats=jax.tree.map(jnp.copy, stats),
        center=jnp.zeros(network.head.out_dim),
        opt_state=optimizers.build(optim).init(student),
    )


class Recipe(NamedTuple):
    """What stays the same in every step of a run.

    `augment(keys [B], batch) -> Crops` is the first thing that happens to a batch, a pytree whose leaves have `B` rows
    and whose `position` (int32 [B]) is each image's place in the *global* batch.
    """

    config: ConfigDict
    network: Network
    schedules: Schedules
    augment: Callable[..., Crops]


def image_keys(seed: int, step: jax.Array, position: jax.Array) -> jax.Array:
    """Keys [B, 3] of each image: for its crops, and for its drop paths in the global and in the local crops."""
    step_key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda place: jax.random.split(jax.random.fold_in(step_key, place), 3))(position)


def gradients(recipe: Recipe, mesh: Mesh, state: TrainState, batch) -> tuple[dict, dict, dict, dict]:
    """Gradient and other means over the global batch, new student and teacher statistics: see `share_of_gradients`."""
    # check_vma=False keeps JAX from adding gradient reductions of its own where replicated parameters are used.
    return jax.shard_map(
        partial(share_of_gradients, recipe),
        mesh=mesh,
        in_specs=(sharding.specs(state), sharding.BATCH),
        out_specs=(sharding.specs(state.student), *[sharding.REPLICATED] * 3),
        check_vma=False,
    )(state, batch)


def share_of_gradients(recipe: Recipe, state: TrainState, batch) -> tuple[dict, dict, dict, dict]:
    """This step's gradient, other means over the global batch, and the new student and teacher statistics.

    Runs on one device's share inside `shard_map` over AXES. All randomness of an image comes from its position in the
    global batch, so that the run does not depend on how many devices or hosts share it. With `accum_steps` the share
    is walked in that many parts under one centre, and everything is reduced over devices once, at the end.
    """
    config, network, schedules, augment = recipe
    teacher_temp = schedules.teacher_temp(state.step)
    rate = config.model.drop_path_rate
    gather = partial(sharding.gather, dtype=network.backbone.dtype)
    teacher = gather(state.teacher)

    def part(stats, batch):
        student_stats, teacher_stats = stats
        keys = image_keys(config.seed, state.step, batch.position)
        crops = augment(keys[:, 0], batch)
        groups = [crops.global_crops] + ([crops.local_crops] if crops.local_crops.shape[1] else [])
        drop_paths = [
            drop_path_factors(keys[:, 1 + i], rate, network.backbone.depth, group.shape[1]) if rate else None
            for i, group in enumerate(groups)
        ]

        z, teacher_stats = forward(network, teacher, teacher_stats, groups[:1], [None])
        teacher_logits = logits(network, teacher["head"]["last_layer"], z)
        q = targets(teacher_logits, state.center, teacher_temp)

        def loss_fn(student):
            student = gather(student)
            z, stats = forward(network, student, student_stats, groups, drop_paths)
            last_layer = student["head"]["last_layer"]
            return head_loss(q, z, last_layer, partial(logits, network), config.dino.student_temp), stats

        (loss, student_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.student)
        means = {
            "grads": grads,
            "loss": loss,
            "teacher_entropy": entropy(q).mean(),
            "teacher_logits": teacher_logits.mean((0, 1)),
            "targets": q.mean((0, 1)),
        }
        return (student_stats, teacher_stats), means

    stats = state.student_stats, state.teacher_stats
    if config.accum_steps == 1:  # XLA keeps a loop of one turn, which costs a fifth of the step on a CPU
        stats, sums = part(stats, batch)
    else:
        parts = jax.tree.map(lambda x: x.reshape(config.accum_steps, -1, *x.shape[1:]), batch)
        shapes = jax.eval_shape(lambda stats, parts: part(stats, jax.tree.map(lambda x: x[0], parts)), stats, parts)[1]
        zeros = jax.tree.map(jnp.zeros_like, shapes)

        def add(carry, batch):
            stats, new = part(carry[0], batch)
            return (stats, jax.tree.map(jnp.add, carry[1], new)), None

        (stats, sums), _ = jax.lax.scan(add, (stats, zeros), parts)
    means = sharding.mean(jax.tree.map(lambda x: x / config.accum_steps, sums))  # all that crosses devices
    return means.pop("grads"), means, *stats


def train_step(
    recipe: Recipe, mesh: Mesh, state: TrainState, batch, max_grad_norm: float | jax.Array = jnp.inf
) -> tuple[TrainState, dict]:
    """One step on the global batch: student by gradient, teacher by average, then the centre.

    A loss or a gradient that is not finite, or a gradient norm above `max_grad_norm`, changes nothing but `step`:
    metrics["skipped"] is 1 then, and the next batch has its chance. Returns the new state and scalar metrics.
    """
    config, _, schedules, _ = recipe
    step = state.step
    grads, mean, student_stats, teacher_stats = gradients(recipe, mesh, state, batch)

    lr, weight_decay = schedules.lr(step), schedules.weight_decay(step)
    optimizer = optimizers.build(config.optim, lr, weight_decay, schedules.last_layer_frozen(step))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.student)
    student = optax.apply_updates(state.student, updates)

    teacher_momentum = schedules.teacher_momentum(step)
    teacher = update_teacher(state.teacher, student, teacher_momentum)
    center_momentum = config.dino.center_momentum if config.dino.centering else 1.0  # 1: the centre stays at 0
    center = update_center(state.center, mean["teacher_logits"], center_momentum)

    new = TrainState(step, student, teacher, student_stats, teacher_stats, center, opt_state)
    grad_norm = optax.tree.norm(grads)
    sound = jnp.isfinite(mean["loss"]) & jnp.isfinite(grad_norm) & (grad_norm <= max_grad_norm)
    new = jax.tree.map(partial(jnp.where, sound), new, state)
    new = jax.lax.with_sharding_constraint(new, sharding.shardings(new, mesh))

    metrics = {
        "loss": mean["loss"],
        "teacher_entropy": mean["teacher_entropy"],
        "kl": mean["loss"] - mean["teacher_entropy"],
        "mean_target_entropy": entropy(mean["targets"]),
        "center_norm": jnp.linalg.norm(new.center),
        "grad_norm": grad_norm,
        "skipped": 1.0 - sound,
        "param_norm": optax.tree.norm(new.student),
        "lr": lr,
        "weight_decay": weight_decay,
        "teacher_momentum": teacher_momentum,
        "teacher_temp": schedules.teacher_temp(step),
        "student_temp": jnp.float32(config.dino.student_temp),
    }
    return new.replace(step=step + 1), metrics


def entropy(p: jax.Array) -> jax.Array:
    """-sum p log p over the last axis, in nats; 0 log 0 is 0."""
    return -jax.scipy.special.xlogy(p, p).sum(-1)
