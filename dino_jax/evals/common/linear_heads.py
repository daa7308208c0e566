"""The heads of a linear probe: what they read of a frozen backbone, and one step that trains or tests all of them.

Shapes: `B` images of this device's share, `K` kinds of features, `D` channels of one, `L` learning rates, `C` classes.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dino_jax.data.multicrop import BOX_NUMBERS, crop_and_resize, random_box
from dino_jax.distributed.sharding import AXES
from dino_jax.models.vit import ViT
from dino_jax.weights.backbone import normalize

POOLINGS = ("cls", "cls_mean")
MOMENTUM = 0.9

Array = jax.Array | np.ndarray  # on the host, then on the devices


class Kind(NamedTuple):
    """What heads read: CLS of the last `blocks` blocks, with ("cls_mean") or without ("cls") the last's mean patch."""

    blocks: int
    pooling: str

    def __str__(self) -> str:
        return f"{self.pooling}_{self.blocks}"


class Probe(NamedTuple):
    """What stays the same in every step."""

    model: Any  # the backbone's module
    kinds: tuple[Kind, ...]
    config: ConfigDict  # with all sizes set
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    steps_per_epoch: int


@flax.struct.dataclass
class ProbeState:
    """Arrays only. `heads` and `momentum`: {kind: {"kernel": float32 [D, L, C], "bias": float32 [L, C]}}."""

    step: jax.Array
    variables: dict  # the backbone's, which nothing changes
    heads: dict
    momentum: dict


class TrainRows(NamedTuple):
    """What of a training batch the devices need."""

    canvas: Array  # uint8 [B, S, S, channels]
    size: Array  # float32 [B, 2]
    position: Array  # int32 [B]
    label: Array  # int32 [B]


class EvalRows(NamedTuple):
    """What of a test batch the devices need."""

    images: Array  # uint8 [B, crop, crop, channels]
    label: Array  # int32 [B], -1 in rows that only fill the batch up


def feature_kinds(model: Any, blocks: Sequence[int], poolings: Sequence[str]) -> tuple[Kind, ...]:
    """All combinations for a ViT, where more blocks than it has are all it has; of a convnet what it pools."""
    if not isinstance(model, ViT):
        return (Kind(1, "cls"),)
    return tuple(dict.fromkeys(Kind(min(n, model.depth), pooling) for pooling in poolings for n in blocks))


def official_kind(model: Any) -> Kind:
    """What the reference's commands read: CLS of four blocks for ViT-S, CLS and mean patch of the last for ViT-B.

    By width: smaller models are read like ViT-S, larger ones like ViT-B. A convnet has its pooled features only.
    """
    if not isinstance(model, ViT):
        return Kind(1, "cls")
    return Kind(1, "cls_mean") if model.embed_dim >= 768 else Kind(min(4, model.depth), "cls")


def probe_features(blocks: list[jax.Array], kind: Kind) -> jax.Array:
    """What a head reads of the last blocks' tokens, [B, 1+N, D] each, oldest first, after the final norm.

    Float32 [B, n D] for "cls", the CLS tokens one after the other; "cls_mean" adds D channels, the last block's mean
    patch token, channel by channel between those of its CLS. That is the reference's order (`eval_linear.py`, where
    it takes one block only).
    """
    parts = [tokens[:, 0].astype(jnp.float32) for tokens in blocks[-kind.blocks :]]
    if kind.pooling == "cls_mean":
        mean = blocks[-1][:, 1:].mean(1, dtype=jnp.float32)
        parts[-1] = jnp.stack([parts[-1], mean], axis=2).reshape(len(mean), -1)
    return jnp.concatenate(parts, axis=1)


def all_features(probe: Probe, variables: dict, images: jax.Array) -> dict[str, jax.Array]:
    """Normalized images [B, H, W, channels] -> {kind: float32 [B, D]}, with one pass through the backbone."""
    if isinstance(probe.model, ViT):
        most = max(kind.blocks for kind in probe.kinds)
        blocks: Any = probe.model.apply(variables, images, most, method="last_tokens")
    else:
        blocks = [probe.model.apply(variables, images)[:, None]]  # pooled features in the place of CLS
    return {str(kind): probe_features(blocks, kind) for kind in probe.kinds}


def random_crops(probe: Probe, step: jax.Array, rows: TrainRows) -> jax.Array:
    """One crop an image, float32 [B, crop, crop, channels], normalized: RandomResizedCrop and flip (torchvision).

    A function of the seed, the step and each image's position in the global batch.
    """
    config = probe.config
    step_key = jax.random.fold_in(jax.random.key(config.seed), step)

    def crop(position, plane, size):
        numbers = jax.random.uniform(jax.random.fold_in(step_key, position), (BOX_NUMBERS + 1,))
        box = random_box(numbers[:BOX_NUMBERS], size, config.scale)
        return crop_and_resize(plane, size, box, numbers[BOX_NUMBERS] < config.flip, config.crop)

    planes = jnp.swapaxes(rows.canvas, 2, 3).astype(jnp.float32)
    return normalize(jnp.swapaxes(jax.vmap(crop)(rows.position, planes, rows.size), 2, 3), probe.mean, probe.std)


def logits(head: dict, features: jax.Array) -> jax.Array:
    """[B, D] -> [B, L, C]: one matrix product for all learning rates."""
    product = jnp.einsum("bd,dlc->blc", features, head["kernel"], precision=jax.lax.Precision.HIGHEST)
    return product + head["bias"]


def losses(heads: dict, features: dict[str, jax.Array], label: Array) -> jax.Array:
    """Mean cross-entropy of each head, [K, L]; label int32 [B]."""

    def mean_loss(head, x):
        z = logits(head, x)
        return (jax.nn.logsumexp(z, axis=2) - jnp.take_along_axis(z, label[:, None, None], axis=2)[:, :, 0]).mean(0)

    return jnp.stack([mean_loss(heads[kind], x) for kind, x in features.items()])


def learning_rates(probe: Probe, step: jax.Array) -> jax.Array:
    """[L] in this step: lr x batch_size / 256, a cosine to 0 that moves once an epoch (torch's CosineAnnealingLR)."""
    config, epoch = probe.config, step // probe.steps_per_epoch
    start = jnp.array(config.lr, jnp.float32) * (config.batch_size / 256)
    return start * 0.5 * (1 + jnp.cos(jnp.pi * epoch / config.epochs))


def train_step(probe: Probe, state: ProbeState, rows: TrainRows) -> tuple[ProbeState, jax.Array]:
    """A step of all heads on this device's share of a batch: SGD with momentum as torch's; -> losses [K, L]."""
    features = all_features(probe, state.variables, random_crops(probe, state.step, rows))

    def total(heads):
        each = losses(heads, features, rows.label)  # no head's loss depends on another head
        return each.sum(), each

    grads, each = jax.lax.pmean(jax.grad(total, has_aux=True)(state.heads), AXES)
    momentum = jax.tree.map(lambda m, g: MOMENTUM * m + g, state.momentum, grads)
    lr = learning_rates(probe, state.step)[:, None]
    heads = jax.tree.map(lambda w, m: w - lr * m, state.heads, momentum)
    return ProbeState(state.step + 1, state.variables, heads, momentum), each


def eval_step(probe: Probe, state: ProbeState, rows: EvalRows) -> tuple[jax.Array, jax.Array]:
    """Over all devices: the number of images in a batch, and how many of them each head gets right at once and in five.

    int32 [] and [2, K, L].
    """
    features = all_features(probe, state.variables, normalize(rows.images, probe.mean, probe.std))
    label = rows.label[:, None, None]

    def right(head, x):
        z = logits(head, x)
        own = jnp.take_along_axis(z, label, axis=2)
        # Written so that a head that is not a number is never right, and a tie goes to the lower class.
        ahead = ~(z <= own) | ((z == own) & (jnp.arange(z.shape[2]) < label))
        rank = jnp.where(label[:, :, 0] < 0, z.shape[2], ahead.sum(2))
        return jnp.stack([(rank < 1).sum(0), (rank < min(5, z.shape[2])).sum(0)])

    each = jnp.stack([right(state.heads[kind], x) for kind, x in features.items()], axis=1)
    return jax.lax.psum(((rows.label >= 0).sum(), each), AXES)


def init_heads(probe: Probe, variables: dict) -> dict:
    """Weights N(0, 0.01), the same for every learning rate and whatever else the grid holds; zero biases."""
    crop, channels = probe.config.crop, len(probe.mean)
    images = jax.ShapeDtypeStruct((1, crop, crop, channels), jnp.float32)
    shapes = jax.eval_shape(partial(all_features, probe), variables, images)
    rates, heads = len(probe.config.lr), {}
    for kind in probe.kinds:
        number = kind.blocks * len(POOLINGS) + POOLINGS.index(kind.pooling)
        key = jax.random.fold_in(jax.random.key(probe.config.seed), number)
        kernel = 0.01 * jax.random.normal(key, (shapes[str(kind)].shape[1], 1, probe.num_classes))
        heads[str(kind)] = {
            "kernel": np.repeat(np.asarray(kernel), rates, axis=1),
            "bias": np.zeros((rates, probe.num_classes), np.float32),
        }
    return heads
