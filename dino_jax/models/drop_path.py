"""Stochastic depth (Huang et al., 2016) as DINO and as DINOv2 do it: factors of the residual branches."""

import jax
import jax.numpy as jnp


def drop_path_factors(keys: jax.Array, rate: float, depth: int, views: int) -> jax.Array:
    """DINO's: factors float32 [depth, 2, B * views], 0 or 1 / keep.

    `keys` [B] has one key per image, so the factors do not depend on how the images are sharded. The rate grows
    linearly from 0 at the first block to `rate` at the last.
    """
    keep = 1 - jnp.linspace(0, rate, depth)[:, None, None]
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (views, depth, 2)))(keys)
    uniform = uniform.reshape(-1, depth, 2).transpose(1, 2, 0)
    return (uniform < keep) / keep


def drop_path_subsets(keys: jax.Array, rate: float, depth: int, views: int, images: int) -> jax.Array:
    """DINOv2's: factors float32 [depth, 2, B * views], 0 or (crops of a group) / (those that are kept).

    Of the `images * views` crops of each group of images, max(int(crops * (1 - rate)), 1) are kept, drawn for each
    branch. The rate is the same for all blocks. keys [B]: one per image; that of a group's first image is used.
    """
    crops = images * views
    kept = max(int(crops * (1 - rate)), 1)

    def group(key: jax.Array) -> jax.Array:
        place = jnp.argsort(jnp.argsort(jax.random.uniform(key, (depth, 2, crops))))
        return jnp.where(place < kept, crops / kept, 0.0)

    factors = jax.vmap(group)(keys[::images])  # [groups, depth, 2, crops]
    return factors.transpose(1, 2, 0, 3).reshape(depth, 2, -1)
