"""Resizes learned position embeddings to other image sizes, as the DINO and DINOv2 references do with torch."""

import jax
import jax.numpy as jnp
import numpy as np

SIDE_OFFSET = 0.1  # of the references' scale factor; 0 in the DINOv2 models with registers, which antialias


def resize_pos_embed(
    pos_embed: jax.Array,
    rows: int,
    columns: int,
    square: bool,
    antialias: bool = False,
    offset: float | None = None,
) -> jax.Array:
    """Interpolates position embeddings of a square grid: [1, 1+n, D] -> [1, 1+rows*columns, D].

    As in the references, they stay as they are only for a `square` image (in pixels, before the rest of a patch is cut
    off) of n patches. An image of 32 x 36 pixels has the learned grid of 32 x 32, but resized positions.

    The scale factor is (side + offset) / sqrt(n); an offset shifts every sample slightly. By default, the offset is
    0.1, or 0 with `antialias`: these are the two pairs that published weights expect (`interpolate_pos_encoding` of
    dino and dinov2).
    """
    side = int((pos_embed.shape[1] - 1) ** 0.5)
    if square and rows * columns == side * side:
        return pos_embed
    if offset is None:
        offset = 0.0 if antialias else SIDE_OFFSET
    grid = pos_embed[0, 1:].reshape(side, side, -1)
    down, across = (jnp.asarray(bicubic(side, n, (n + offset) / side, antialias)) for n in (rows, columns))
    resized = jnp.einsum("yi,xj,ijd->yxd", down, across, grid, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([pos_embed[:, :1], resized.reshape(1, rows * columns, -1)], axis=1)


def bicubic(n_in: int, n_out: int, scale: float, antialias: bool) -> np.ndarray:
    """Returns torch's bicubic interpolation of one axis as a matrix, float32 [n_out, n_in].

    Without `antialias`, the kernel has a = -0.75 and taps beyond the border count for the border. With it, a = -0.5,
    the kernel is as wide as an output pixel where the axis shrinks, weights within the border are normalized, and an
    axis of the same size stays as it is, whatever the scale.
    """
    if antialias and n_in == n_out:
        return np.eye(n_in, dtype=np.float32)
    center = (np.arange(n_out) + 0.5) / scale - 0.5
    if antialias:
        stretch = max(1 / scale, 1.0)
        weights = _cubic((np.arange(n_in) - center[:, None]) / stretch, a=-0.5)
        return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    first = np.floor(center).astype(int) - 1
    weights = np.zeros((n_out, n_in), np.float32)
    for tap in range(4):
        column = np.clip(first + tap, 0, n_in - 1)
        tap_weights = _cubic(center - (first + tap), a=-0.75)
        np.add.at(weights, (np.arange(n_out), column), tap_weights.astype(np.float32))
    return weights


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel (1981), 0 beyond a distance of 2."""
    d = np.abs(x)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0))
