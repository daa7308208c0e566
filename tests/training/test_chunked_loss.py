"""The loss in chunks of prototypes is the loss of the paper: value and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dino_jax import dino, dinov2
from dino_jax.training import chunked_loss


def test_the_chunked_loss_is_the_loss():
    images, views, K, D = 4, 10, 2**13, 4
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.dirichlet(np.full(8, 0.1), (images, 2)), jnp.float32).repeat(K // 8, -1) / (K // 8)
    z, weights = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((images, views, D), (K, D)))
    assert chunked_loss.chunk_size(images * views, K) == 1_024

    def in_parts(z, weights):
        return chunked_loss.loss_from_head(q, z, lambda part, z: z @ part.T, weights, 0.1)

    def at_once(z, weights):
        return dino.loss_from_head(q, z, lambda weights, z: z @ weights.T, weights, 0.1)

    (ours, grads), (expected, expected_grads) = (
        jax.jit(jax.value_and_grad(loss, (0, 1)))(z, weights) for loss in (in_parts, at_once)
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    for ours, expected in zip(grads, expected_grads, strict=True):  # sums over K and over images in another order
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


def test_the_chunked_loss_of_patches_is_the_loss():
    M, K, D = 40, 2**13, 4
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.dirichlet(np.full(8, 0.1), M), jnp.float32).repeat(K // 8, -1) / (K // 8)
    z, layer = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((M, D), (K, D)))
    weights = jnp.where(jnp.arange(M) < 30, 1 / 7, 0.0)  # the last ten are padding
    (ours, grads), (expected, expected_grads) = (
        jax.jit(
            jax.value_and_grad(lambda z, layer, f=f: f(q, z, weights, 6, lambda p, z: z @ p.T, layer, 0.1), (0, 1))
        )(z, layer)
        for f in (chunked_loss.ibot_from_head, dinov2.ibot_from_head)
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    for ours, expected in zip(grads, expected_grads, strict=True):  # sums over K and over rows in another order
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("views", "K", "expected"),
    [(640, 65_536, 4_096), (40, 65_536, 1_024), (40, 60_000, 1_000), (96, 256, 256), (12, 65_537, 65_537)],
)
def test_chunk_size(views, K, expected):
    assert chunked_loss.chunk_size(views, K) == expected
