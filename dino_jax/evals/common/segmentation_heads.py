"""Classifiers of patches: a linear layer and nearest neighbors on frozen features, and measures of their answers.

Shapes: `B` images, `S` pixels of a window's side, `h` x `w` patches of a window, `D` channels, `C` classes.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from dino_jax.distributed.sharding import AXES
from dino_jax.evals.common.segmentation_data import VOID, resize_classes
from dino_jax.evals.knn import class_votes
from dino_jax.weights.backbone import Backbone, normalize

EPS = 1e-5  # of the batch norm
MOMENTUM = 0.1  # smallest share of a batch in the running statistics
SAMPLES = 8  # per side of a patch, for the class of a patch

Array = jax.Array | np.ndarray


class Probe(NamedTuple):
    """Constants of a linear layer's training."""

    model: Any  # the backbone's module
    blocks: int
    mean: tuple[float, ...]  # of the pixels
    std: tuple[float, ...]
    num_classes: int
    batch_norm: bool
    optimizer: optax.GradientTransformation


@flax.struct.dataclass
class Head:
    """A linear layer on features that are normalized by `mean` and `var`, both float32 [D]."""

    kernel: jax.Array  # float32 [D, C]
    bias: jax.Array  # float32 [C]
    mean: jax.Array
    var: jax.Array  # includes EPS; 1 without batch norm


@flax.struct.dataclass
class ProbeState:
    """The arrays of a step."""

    step: jax.Array
    variables: dict[str, Any]  # of the frozen backbone
    head: Head
    moments: Any  # of the optimizer, for kernel and bias


class Rows(NamedTuple):
    """A training batch."""

    images: Array  # pixels.dtype [B, S, S, channels]
    classes: Array  # int16 [B, S, S], VOID where a pixel does not count


class Bank(NamedTuple):
    """Patches that vote."""

    features: Array  # float32 [M, D]
    classes: Array  # int32 [M]


# --- the linear layer ------------------------------------------------------------------------------------------------


def make_probe(backbone: Backbone, config: ConfigDict, num_classes: int) -> Probe:
    """Returns the probe for the knobs blocks, batch_norm, lr, weight_decay, warmup and steps."""
    warmup = round(config.warmup * config.steps)
    rate = optax.join_schedules(
        [optax.linear_schedule(0, config.lr, warmup), optax.linear_schedule(config.lr, 0, config.steps - warmup)],
        [warmup],
    )
    trained = backbone.card["preprocessing"]
    return Probe(
        model=backbone.model,
        blocks=min(config.blocks, backbone.num_blocks),
        mean=trained["mean"],
        std=trained["std"],
        num_classes=num_classes,
        batch_norm=config.batch_norm,
        optimizer=optax.adamw(rate, weight_decay=config.weight_decay),
    )


def patch_features(model: Any, variables: dict[str, Any], images: jax.Array, blocks: int) -> jax.Array:
    """Normalized images -> patch tokens of the last blocks, concatenated, float32 [B, h, w, D].

    A convnet has the cells of its last feature map.
    """
    found = model.apply(variables, images, blocks, method="last_blocks")
    joined = jnp.concatenate([tokens.patches.astype(jnp.float32) for tokens in found], axis=-1)
    return joined.reshape(len(images), *found[-1].grid, -1)


def init_state(probe: Probe, variables: dict[str, Any], crop: int, seed: int) -> ProbeState:
    """Returns the first state: weights from N(0, 0.01), zero biases."""
    images = jax.ShapeDtypeStruct((1, crop, crop, len(probe.mean)), jnp.float32)
    features = jax.eval_shape(lambda v, x: patch_features(probe.model, v, x, probe.blocks), variables, images)
    channels = features.shape[-1]
    kernel = 0.01 * jax.random.normal(jax.random.key(seed), (channels, probe.num_classes))
    head = Head(kernel, jnp.zeros(probe.num_classes), jnp.zeros(channels), jnp.ones(channels))
    return ProbeState(jnp.int32(0), variables, head, probe.optimizer.init((head.kernel, head.bias)))


def logits(head: Head, features: jax.Array) -> jax.Array:
    """[B, h, w, D] -> [B, h, w, C]."""
    return (features - head.mean) / jnp.sqrt(head.var) @ head.kernel + head.bias


def train_step(probe: Probe, state: ProbeState, rows: Rows) -> tuple[ProbeState, jax.Array]:
    """Takes a step of AdamW on a device's share of a batch; returns the new state and the loss.

    The loss is the mean cross-entropy over the pixels that count, of logits that are upsampled bilinearly. Batch norm
    is over all patches of the batch on all devices.
    """
    images = normalize(rows.images, probe.mean, probe.std)
    features = patch_features(probe.model, state.variables, images, probe.blocks)
    head = state.head
    running = head.mean, head.var
    if probe.batch_norm:
        mean = jax.lax.pmean(features.mean((0, 1, 2)), AXES)
        var = jax.lax.pmean(jnp.square(features - mean).mean((0, 1, 2)), AXES) + EPS
        head = replace(head, mean=mean, var=var)
        share = jnp.maximum(MOMENTUM, 1 / (state.step + 1))  # the mean of all batches in the first steps
        running = running[0] + share * (mean - running[0]), running[1] + share * (var - running[1])
    counts = rows.classes != VOID
    pixels = jnp.maximum(jax.lax.psum(counts.sum(), AXES), 1)

    def loss(weights: Any) -> jax.Array:
        z = logits(replace(head, kernel=weights[0], bias=weights[1]), features)
        z = jax.image.resize(z, (*rows.classes.shape, probe.num_classes), "bilinear")
        each = optax.softmax_cross_entropy_with_integer_labels(z, jnp.maximum(rows.classes, 0))
        return (each * counts).sum() / pixels

    weights = state.head.kernel, state.head.bias
    value, grads = jax.lax.psum(jax.value_and_grad(loss)(weights), AXES)
    updates, moments = probe.optimizer.update(grads, state.moments, weights)
    kernel, bias = optax.apply_updates(weights, updates)
    return ProbeState(state.step + 1, state.variables, Head(kernel, bias, *running), moments), value


# --- scores of patches -----------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("model", "blocks"))
def features_of(model: Any, variables: Any, images: jax.Array, blocks: int) -> jax.Array:
    """`patch_features`, compiled."""
    return patch_features(model, variables, images, blocks)


@jax.jit
def linear_scores(head: Head, features: jax.Array) -> jax.Array:
    """`logits`, compiled."""
    return logits(head, features)


@partial(jax.jit, static_argnames=("k", "num_classes"))
def knn_scores(bank: Bank, features: jax.Array, k: int, temperature: float, num_classes: int) -> jax.Array:
    """Returns the votes of the k most similar patches of the bank, by cosine, [B, h, w, D] -> [B, h, w, C]."""
    queries = _unit(features.reshape(-1, features.shape[-1]))
    similarity = jnp.matmul(queries, _unit(jnp.asarray(bank.features)).T, precision=jax.lax.Precision.HIGHEST)
    similarity, row = jax.lax.top_k(similarity, k)
    votes = class_votes(similarity, jnp.asarray(bank.classes)[row], k, temperature, num_classes)
    return votes.reshape(*features.shape[:-1], num_classes)


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def patch_classes(classes: np.ndarray, grid: tuple[int, int], num_classes: int) -> np.ndarray:
    """Returns the most frequent class (or VOID) in each cell of a grid over int16 [H, W], sampled at 8 x 8 points."""
    sampled = resize_classes(classes, grid[0] * SAMPLES, grid[1] * SAMPLES)
    sampled = sampled.reshape(grid[0], SAMPLES, grid[1], SAMPLES).swapaxes(1, 2)
    cells = np.arange(grid[0] * grid[1]).repeat(SAMPLES**2)
    places = cells * (num_classes + 1) + sampled.ravel() - VOID
    counts = np.bincount(places, minlength=grid[0] * grid[1] * (num_classes + 1))
    return counts.reshape(*grid, num_classes + 1).argmax(-1) + VOID


# --- measures --------------------------------------------------------------------------------------------------------


def confusion(truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts pixels by true class (rows) and predicted class, int64 [C, C], without those whose truth is VOID."""
    counts = truth != VOID
    places = truth[counts].astype(np.int64) * num_classes + predicted[counts]
    return np.bincount(places, minlength=num_classes**2).reshape(num_classes, num_classes)


def intersection_over_union(counts: np.ndarray) -> np.ndarray:
    """Returns the IoU of each class in percent, [C]; NaN for a class that no pixel has or is predicted to have."""
    hits = np.diag(counts).astype(np.float64)
    union = counts.sum(0) + counts.sum(1) - hits
    return np.divide(100 * hits, union, out=np.full(len(hits), np.nan), where=union > 0)


def pixel_accuracy(counts: np.ndarray) -> float:
    """Returns the percentage of pixels whose class is right; NaN if none counts."""
    total = counts.sum()
    return float(100 * np.trace(counts) / total) if total else float("nan")
