"""Stochastic depth as DINOv2 does it: a fixed number of a group's images goes through each residual branch."""

import jax
import jax.numpy as jnp


def drop_path_subsets(keys: jax.Array, rate: float, depth: int, views: int, images: int) -> jax.Array:
    """Returns factors float32 [depth, 2, B * views] for `ViT`: 0, or (crops of a group) / (those that are kept).

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
