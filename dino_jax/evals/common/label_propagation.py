"""Propagates the first frame's labels through a video by the similarity of patch features (Jabri et al., NeurIPS 2020).

There is no training: each patch takes the labels of the most similar patches in the first and the latest frames.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# A tile's similarities are [TILE**2, frames * (TILE + 2 radius)**2]: 6 MB in float32 at the paper's settings, half of
# them within reach. All patches against all would be 1.2 GB a frame (ViT-S/8, 480p), an eighth of them within reach.
TILE = 12
EXACT = jax.lax.Precision.HIGHEST  # the choice of the nearest patches depends on the last digits


class Context(NamedTuple):
    """The first frame (index 0) and the `n` latest frames; a new frame replaces the oldest."""

    features: jax.Array  # float32 [1 + n, h, w, D], of length 1
    labels: jax.Array  # float32 [1 + n, h, w, C], soft


def propagate(
    features: Iterable[jax.Array | np.ndarray],
    first_labels: jax.Array,
    *,
    context: int = 7,
    radius: int = 12,
    topk: int = 5,
    temperature: float = 0.1,
) -> Iterator[jax.Array]:
    """Yields the soft labels of each frame after the first, one frame after the other.

    The labels of a patch are the mean of the labels of its nearest patches, weighted by exp(cosine similarity /
    temperature). Candidates are the patches of the first and the latest frames that are at most `radius` rows and
    columns away. As in the reference, ties with the last of the `topk` count too (there are many in still frames).

    Args:
        features: float [h, w, D] of each frame, starting with the first; not necessarily normalized.
        first_labels: float [h, w, C], the share of each class in each patch; the background is a class too.
        context: number of latest frames to use besides the first, at least 1.
        radius: of the square neighborhood, in patches.
        topk: number of nearest patches, over all frames together.
        temperature: of the weights, above 0.

    Yields:
        float32 [h, w, C]; sums to 1 if `first_labels` does.
    """
    features = iter(features)
    first = _unit(jnp.asarray(next(features), jnp.float32))
    labels = jnp.asarray(first_labels, jnp.float32)
    known = Context(*(jnp.zeros((1 + context, *x.shape)).at[0].set(x) for x in (first, labels)))
    for seen, frame in enumerate(features, start=1):
        known, labels = _follow(known, jnp.asarray(frame, jnp.float32), seen, radius, topk, temperature)
        yield labels


@partial(jax.jit, static_argnames="patch_size")
def hard_labels(soft: jax.Array, patch_size: int) -> jax.Array:
    """Returns the label of each pixel, uint8 [h * patch_size, w * patch_size], given soft labels of patches [h, w, C].

    The soft labels are upsampled (bilinear), and each class is stretched to 0..1 over the frame before the argmax. As
    in the reference, the stretching keeps the background from suppressing small objects.
    """
    h, w, classes = soft.shape
    fine = jax.image.resize(soft, (h * patch_size, w * patch_size, classes), "bilinear", precision=EXACT)
    low, high = fine.min((0, 1)), fine.max((0, 1))
    stretched = (fine - low) / jnp.where(high > low, high - low, 1)
    return jnp.where(high > low, stretched, fine).argmax(-1).astype(jnp.uint8)


@partial(jax.jit, static_argnames=("radius", "topk"), donate_argnums=0)
def _follow(
    known: Context, frame: jax.Array, seen: jax.Array, radius: int, topk: int, temperature: jax.Array
) -> tuple[Context, jax.Array]:
    """Returns the context with a new frame, and its labels [h, w, C]; `seen` is the number of previous frames."""
    places, shape = len(known.features), known.labels.shape[1:]
    frame, tile = _unit(frame), (min(TILE, shape[0]), min(TILE, shape[1]))

    def add(labels: jax.Array, start: Any) -> tuple[jax.Array, None]:
        found = _tile_labels(known, jnp.arange(places) < seen, frame, start, tile, radius, topk, temperature)
        return jax.lax.dynamic_update_slice(labels, found, (*start, 0)), None

    labels, _ = jax.lax.scan(add, jnp.zeros(shape), _tile_starts(shape[0], shape[1], *tile))
    oldest = 1 + (seen - 1) % (places - 1)
    return Context(known.features.at[oldest].set(frame), known.labels.at[oldest].set(labels)), labels


def _tile_starts(h: int, w: int, tile_h: int, tile_w: int) -> np.ndarray:
    """Returns the first row and column of each tile, int [tiles, 2]; the last tiles overlap those before."""
    rows, columns = (np.minimum(np.arange(0, side, tile), side - tile) for side, tile in ((h, tile_h), (w, tile_w)))
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)


def _tile_labels(
    known: Context,
    valid: jax.Array,
    frame: jax.Array,
    start: jax.Array,
    tile: tuple[int, int],
    radius: int,
    topk: int,
    temperature: jax.Array,
) -> jax.Array:
    """Returns labels [tile_h, tile_w, C] of the tile that begins at `start`, from the valid frames of the context."""
    places, h, w, D = known.features.shape
    # The patches within reach of the tile. At the borders this window is shifted inwards, to have a constant size.
    reach = min(tile[0] + 2 * radius, h), min(tile[1] + 2 * radius, w)
    corner = [jnp.clip(start[i] - radius, 0, (h, w)[i] - reach[i]) for i in (0, 1)]
    queries = jax.lax.dynamic_slice(frame, (*start, 0), (*tile, D))
    keys, labels = (jax.lax.dynamic_slice(x, (0, *corner, 0), (places, *reach, x.shape[-1])) for x in known)
    near_y, near_x = (  # each [tile, reach]
        jnp.abs(start[i] + jnp.arange(tile[i])[:, None] - corner[i] - jnp.arange(reach[i])) <= radius for i in (0, 1)
    )
    candidate = valid[:, None, None] & near_y[:, None, None, :, None] & near_x[:, None, None, :]
    similarity = jnp.einsum("yxd,pijd->yxpij", queries, keys, precision=EXACT)
    similarity = jnp.where(candidate, similarity, -jnp.inf).reshape(tile[0] * tile[1], -1)
    best, _ = jax.lax.top_k(similarity, min(topk, similarity.shape[1]))
    # With best[:, :1] and best[:, -1:] instead, XLA on CPUs would sort complete rows, which takes 12 times as long.
    most, least = best.max(-1, keepdims=True), best.min(-1, keepdims=True)
    weights = jnp.where(similarity >= least, jnp.exp((similarity - most) / temperature), 0)
    weights /= weights.sum(-1, keepdims=True)
    return jnp.matmul(weights, labels.reshape(-1, labels.shape[-1]), precision=EXACT).reshape(*tile, -1)


def _unit(features: jax.Array) -> jax.Array:
    """Divides vectors [..., D] by their length."""
    return features / jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
