"""The losses without an array of all the student's logits: for `dino.loss_from_head` and `dinov2.ibot_from_head`.

The student's logits [B, V, K] would be the largest array of the step, several times over with what their gradient
needs. Cross-entropy is linear in its target, so a view's share of the loss needs two numbers only, both of which are
sums over prototypes: the logsumexp of its logits, and their mean under the sum of the targets that it is compared
with. They are added up over chunks of prototypes, and the backward pass computes a chunk's logits again when its turn
comes. At K = 65,536 that is one more product, a three-hundredth of a ViT-S step.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def loss_from_head(
    q: jax.Array, z: jax.Array, prototypes: Callable[..., jax.Array], last_layer: Any, temp: float
) -> jax.Array:
    """The value and gradients of `dino.loss_from_head`, up to float32 rounding, in a fraction of its memory.

    q: targets [B, 2, K]. z: unit vectors [B, V, D], global crops first. All parameters of `last_layer` have K as their
    first axis. Returns a scalar.
    """
    G, K = q.shape[1:]
    if G != 2:
        raise ValueError(f"{G} global crops: this form of the loss is for two")
    return _mean_over_pairs(G, *_sums_over_chunks(_view_sums, q, z, prototypes, last_layer, temp))


def ibot_from_head(
    q: jax.Array,
    z: jax.Array,
    weights: jax.Array,
    crops: int,
    prototypes: Callable[..., jax.Array],
    last_layer: Any,
    temp: float,
) -> jax.Array:
    """The value and gradients of `dinov2.ibot_from_head`, up to float32 rounding, in a fraction of its memory.

    q: targets [M, K]. z: unit vectors [M, D]. weights: [M]. Returns a scalar.
    """
    log_sums, means = _sums_over_chunks(_row_sums, q, z, prototypes, last_layer, temp)
    return jnp.sum(weights * (log_sums - means)) / crops


def _sums_over_chunks(
    sums_of: Callable[..., tuple[jax.Array, jax.Array]],
    q: jax.Array,
    z: jax.Array,
    prototypes: Callable[..., jax.Array],
    last_layer: Any,
    temp: float,
) -> tuple[jax.Array, jax.Array]:
    """Runs sums_of(q, logits) -> (logsumexp of logits, their mean under targets) on chunks of prototypes, and adds."""
    K = q.shape[-1]
    size = chunk_size(z.size // z.shape[-1], K)
    if size == K:
        return sums_of(q, prototypes(last_layer, z) / temp)

    @partial(jax.checkpoint, prevent_cse=False)  # inside a loop there are no common subexpressions to eliminate
    def sums(chunk: tuple[jax.Array, Any]) -> tuple[jax.Array, jax.Array]:
        start, layer = chunk
        return sums_of(jax.lax.dynamic_slice_in_dim(q, start, size, axis=-1), prototypes(layer, z) / temp)

    layers = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), last_layer)
    log_sums, means = jax.lax.map(sums, (jnp.arange(0, K, size), layers))
    return jax.nn.logsumexp(log_sums, axis=0), means.sum(0)


def chunk_size(views: int, K: int) -> int:
    """Prototypes in a chunk: a divisor of K, at most 1,024 or 8 times the `views` of all images.

    Small chunks stay in a CPU's cache; the more rows a product has, the more columns make it efficient. K itself where
    all its divisors in that range are much smaller, as for a prime.
    """
    most = max(1_024, 8 * views)
    largest = max(size for size in range(1, min(most, K) + 1) if K % size == 0)
    return largest if 8 * largest >= most else K


def _view_sums(q: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logsumexp of each view's logits, and their mean under the view's targets, over some prototypes; both [B, V].

    A global crop is compared with the other global crop, a local crop with both.
    """
    G = q.shape[1]
    # [:, ::-1] swaps the targets of the two global crops, so that no view meets its own.
    under_other = (q[:, ::-1] * logits[:, :G]).sum(-1)
    under_both = (q.sum(1, keepdims=True) * logits[:, G:]).sum(-1)
    return jax.nn.logsumexp(logits, axis=-1), jnp.concatenate([under_other, under_both], axis=1)


def _row_sums(q: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logsumexp of each row's logits, and their mean under the row's targets, over some prototypes; both [M]."""
    return jax.nn.logsumexp(logits, axis=-1), (q * logits).sum(-1)


def _mean_over_pairs(G: int, log_sums: jax.Array, means: jax.Array) -> jax.Array:
    """Mean cross-entropy over the pairs (global crop of the teacher, another view) from `_view_sums`; a scalar."""
    V = log_sums.shape[1]
    targets_met = jnp.where(jnp.arange(V) < G, 1, G)  # each of them sums to 1
    return (targets_met * log_sums - means).sum(1).mean() / (G * (V - 1))
