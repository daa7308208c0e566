"""The heads of a linear probe: their input features, and steps that train and test all heads at once.

Shapes: `B` images on this device, `K` kinds of features, `D` channels of a kind, `L` learning rates, `C` classes.
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
from dino_jax.data.pixels import Pixels, to_levels
from dino_jax.distributed.sharding import AXES
from dino_jax.models import Tokens
from dino_jax.weights.backbone import Backbone, normalize

POOLINGS = ("cls", "cls_mean", "cls_then_mean")
DECAYS = ("epoch", "step")
MOMENTUM = 0.9

Array = jax.Array | np.ndarray  # on the host before a step, on the devices in it


class Kind(NamedTuple):
    """A kind of features: CLS of the last `blocks` blocks, and with it the mean patch token of the last block.

    "cls_mean" interleaves the mean with the last CLS, as DINO does; "cls_then_mean" appends it, as DINOv2 does.
    """

    blocks: int
    pooling: str

    def __str__(self) -> str:
        return f"{self.pooling}_{self.blocks}"


class Probe(NamedTuple):
    """Constants of a linear probe."""

    model: Any  # the backbone's module
    kinds: tuple[Kind, ...]
    official: Kind  # what the reference's commands read, see `official_kind`
    config: ConfigDict  # with all sizes set
    pixels: Pixels
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    several: bool  # whether an image may have any number of classes; labels are then float32 [B, C]
    steps_per_epoch: int

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of the figures of each head, in percent; the first selects the best head."""
        return ("mAP",) if self.several else ("top1", "top5")


@flax.struct.dataclass
class ProbeState:
    """The arrays of a step; `heads` and `momentum`: {kind: {"kernel": float32 [D, L, C], "bias": float32 [L, C]}}."""

    step: jax.Array
    variables: dict[str, Any]  # of the frozen backbone
    heads: dict[str, Any]
    momentum: dict[str, Any]


class TrainRows(NamedTuple):
    """Fields of a training batch that are sent to the devices."""

    canvas: Array  # pixels.dtype [B, S, S, channels]
    size: Array  # float32 [B, 2]
    position: Array  # int32 [B]
    label: Array  # int32 [B], or float32 [B, C]


class EvalRows(NamedTuple):
    """Fields of a test batch that are sent to the devices."""

    images: Array  # pixels.dtype [B, crop, crop, channels]
    label: Array  # int32 [B], or float32 [B, C]; -1 in padding


def feature_kinds(backbone: Backbone, blocks: Sequence[int], poolings: Sequence[str]) -> tuple[Kind, ...]:
    """Returns all combinations for a ViT, with at most all of its blocks; for a convnet, the pooled features."""
    if not backbone.family.block_tokens:
        return (Kind(1, "cls"),)
    return tuple(dict.fromkeys(Kind(min(n, backbone.num_blocks), pooling) for pooling in poolings for n in blocks))


def official_kind(backbone: Backbone) -> Kind:
    """Returns the features of the reference's commands: CLS of four blocks (ViT-S), CLS and mean patch of one (ViT-B).

    The width decides: narrower models are treated like ViT-S, wider ones like ViT-B. A convnet has pooled features.
    """
    if not backbone.family.block_tokens:
        return Kind(1, "cls")
    wide = backbone.model.embed_dim >= 768
    return Kind(1, "cls_mean") if wide else Kind(min(4, backbone.num_blocks), "cls")


def probe_features(blocks: list[Tokens], kind: Kind) -> jax.Array:
    """Returns a head's features, given the last blocks' tokens after the final norm, oldest first.

    For "cls" these are the concatenated CLS tokens, float32 [B, n D]. "cls_mean" adds D channels, the mean patch token
    of the last block, interleaved with the channels of its CLS token. This is the order of DINO's reference
    (`eval_linear.py`, which does so for one block). "cls_then_mean" appends them, the order of DINOv2's.
    """
    parts = [tokens.cls.astype(jnp.float32) for tokens in blocks[-kind.blocks :]]
    if kind.pooling != "cls":
        mean = blocks[-1].patches.mean(1, dtype=jnp.float32)
        together = [parts[-1], mean]
        parts[-1:] = together if kind.pooling == "cls_then_mean" else [jnp.stack(together, 2).reshape(len(mean), -1)]
    return jnp.concatenate(parts, axis=1)


def all_features(probe: Probe, variables: dict[str, Any], images: jax.Array) -> dict[str, jax.Array]:
    """Runs the backbone once on normalized images [B, H, W, channels]; returns {kind: float32 [B, D]}."""
    most = max(kind.blocks for kind in probe.kinds)
    blocks: Any = probe.model.apply(variables, images, most, method="last_blocks")
    return {str(kind): probe_features(blocks, kind) for kind in probe.kinds}


def random_crops(probe: Probe, step: jax.Array, rows: TrainRows) -> jax.Array:
    """Takes one normalized crop per image, float32 [B, crop, crop, channels]: torchvision's RandomResizedCrop and flip.

    The crop depends only on the seed, the step and the image's position in the global batch.
    """
    config = probe.config
    step_key = jax.random.fold_in(jax.random.key(config.seed), step)

    def crop(position: Any, plane: Any, size: Any) -> jax.Array:
        numbers = jax.random.uniform(jax.random.fold_in(step_key, position), (BOX_NUMBERS + 1,))
        box = random_box(numbers[:BOX_NUMBERS], size, config.scale)
        return crop_and_resize(plane, size, box, numbers[BOX_NUMBERS] < config.flip, config.crop)

    planes = to_levels(jnp.swapaxes(rows.canvas, 2, 3))
    levels = jnp.swapaxes(jax.vmap(crop)(rows.position, planes, rows.size), 2, 3)
    return normalize(levels / 255, probe.mean, probe.std)


def logits(head: dict[str, Any], features: jax.Array) -> jax.Array:
    """Returns the logits for all learning rates by one matrix product: [B, D] -> [B, L, C]."""
    product = jnp.einsum("bd,dlc->blc", features, head["kernel"], precision=jax.lax.Precision.HIGHEST)
    return product + head["bias"]


def losses(heads: dict[str, Any], features: dict[str, jax.Array], label: Array) -> jax.Array:
    """Returns the mean cross-entropy of each head, [K, L], given labels int32 [B].

    Given labels float32 [B, C], each class is a logistic regression, and their losses are summed.
    """

    def mean_loss(head: Any, x: jax.Array) -> jax.Array:
        z = logits(head, x)
        if label.ndim == 2:
            return (jax.nn.softplus(z) - label[:, None] * z).sum(2).mean(0)
        return (jax.nn.logsumexp(z, axis=2) - jnp.take_along_axis(z, label[:, None, None], axis=2)[:, :, 0]).mean(0)

    return jnp.stack([mean_loss(heads[kind], x) for kind, x in features.items()])


def learning_rates(probe: Probe, step: jax.Array) -> jax.Array:
    """Returns the rates of this step, [L]: lr * batch_size / 256 times a cosine by epoch (as in torch) or step."""
    config, steps = probe.config, probe.steps_per_epoch
    done = step // steps / config.epochs if config.decay == "epoch" else step / (steps * config.epochs)
    start = jnp.array(config.lr, jnp.float32) * (config.batch_size / 256)
    return start * 0.5 * (1 + jnp.cos(jnp.pi * done))


def train_step(probe: Probe, state: ProbeState, rows: TrainRows) -> tuple[ProbeState, jax.Array]:
    """Takes a step of SGD with momentum (as in torch) with all heads; returns the new state and the losses [K, L]."""
    features = all_features(probe, state.variables, random_crops(probe, state.step, rows))

    def total(heads: Any) -> tuple[jax.Array, jax.Array]:
        each = losses(heads, features, rows.label)  # independent, so the gradient of the sum is that of each
        return each.sum(), each

    grads, each = jax.lax.pmean(jax.grad(total, has_aux=True)(state.heads), AXES)
    momentum = jax.tree.map(lambda m, g: MOMENTUM * m + g, state.momentum, grads)
    lr = learning_rates(probe, state.step)[:, None]
    heads = jax.tree.map(lambda w, m: w - lr * m, state.heads, momentum)
    return ProbeState(state.step + 1, state.variables, heads, momentum), each


def eval_step(probe: Probe, state: ProbeState, rows: EvalRows) -> tuple[jax.Array, jax.Array]:
    """Returns the number of images in a batch, int32 [], and each head's top-1 and top-5 hits, int32 [2, K, L].

    Both are summed over all devices.
    """
    features = all_features(probe, state.variables, normalize(rows.images, probe.mean, probe.std))
    label = rows.label[:, None, None]

    def right(head: Any, x: jax.Array) -> jax.Array:
        z = logits(head, x)
        own = jnp.take_along_axis(z, label, axis=2)
        # A head with NaNs is never correct, and ties go to the lower class.
        ahead = ~(z <= own) | ((z == own) & (jnp.arange(z.shape[2]) < label))
        rank = jnp.where(label[:, :, 0] < 0, z.shape[2], ahead.sum(2))
        return jnp.stack([(rank < 1).sum(0), (rank < min(5, z.shape[2])).sum(0)])

    each = jnp.stack([right(state.heads[kind], x) for kind, x in features.items()], axis=1)
    return jax.lax.psum(((rows.label >= 0).sum(), each), AXES)


def scores_step(probe: Probe, state: ProbeState, rows: EvalRows) -> tuple[jax.Array, jax.Array]:
    """Returns the labels [B, C] of a whole batch, and each head's logits for it, [K, B, L, C], on all devices."""
    features = all_features(probe, state.variables, normalize(rows.images, probe.mean, probe.std))
    each = jnp.stack([logits(state.heads[kind], x) for kind, x in features.items()])
    gather = partial(jax.lax.all_gather, axis_name=AXES, tiled=True)
    return gather(rows.label, axis=0), gather(each, axis=1)


def init_heads(probe: Probe, variables: dict[str, Any]) -> dict[str, Any]:
    """Returns weights from N(0, 0.01), equal for all learning rates and independent of the grid, and zero biases."""
    crop, channels = probe.config.crop, len(probe.mean)
    images = jax.ShapeDtypeStruct((1, crop, crop, channels), jnp.float32)
    shapes = jax.eval_shape(partial(all_features, probe), variables, images)
    rates, heads = len(probe.config.lr), {}
    for kind in probe.kinds:
        number = 2 * kind.blocks + (kind.pooling != "cls")
        key = jax.random.fold_in(jax.random.key(probe.config.seed), number)
        kernel = 0.01 * jax.random.normal(key, (shapes[str(kind)].shape[1], 1, probe.num_classes))
        heads[str(kind)] = {
            "kernel": np.repeat(np.asarray(kernel), rates, axis=1),
            "bias": np.zeros((rates, probe.num_classes), np.float32),
        }
    return heads
