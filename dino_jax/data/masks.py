"""Block masks of patches for masked image modeling (BEiT, Bao et al., 2022), on the device.

A mask is a union of random rectangles. As in DINOv2, the images of a group draw masks together: a fixed share of their
global crops is masked, with ratios from equal parts of a range, so that the number of masked patches has a constant
bound. Masks are functions of a key per group, so they do not depend on the number of devices.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dino_jax.data.multicrop import GLOBAL_CROPS, Crops

LEAST_CELLS = 4.0  # smallest area of a rectangle that is drawn
LEAST_ASPECT = 0.3  # its height by its width: from this to the inverse
TRIES = 10  # rectangles that may fail in a row before a mask is left as it is


class MaskSettings(NamedTuple):
    """Static settings of `group_masks`."""

    grid: tuple[int, int]  # rows and columns of patches of a global crop
    largest: int  # most patches that one rectangle adds
    images: int  # images of a group
    probability: float  # share of the global crops that are masked
    ratio: tuple[float, float]  # range of the share of masked patches in a masked crop

    @property
    def patches(self) -> int:
        """Patches of a crop, N."""
        return self.grid[0] * self.grid[1]

    @property
    def masked_crops(self) -> int:
        """Crops of a group that are masked."""
        return int(GLOBAL_CROPS * self.images * self.probability)

    @property
    def ratios(self) -> np.ndarray:
        """Ends of the parts of the range, float32 [masked_crops + 1], with the rounding of `torch.linspace`."""
        low, high = (np.float32(end) for end in self.ratio)
        i, step = np.arange(self.masked_crops + 1), np.float64((high - low) / np.float32(max(self.masked_crops, 1)))
        from_low, from_high = np.float64(low) + step * i, np.float64(high) - step * (self.masked_crops - i)
        return np.where(i < len(i) // 2, from_low, from_high).astype(np.float32)

    @property
    def bound(self) -> int:
        """Most masked patches of a group."""
        return sum(int(self.patches * float(ratio)) for ratio in self.ratios[1:])


class MaskedCrops(NamedTuple):
    """Crops of B images, and which patches of the global ones the student does not see.

    Each group of images has M rows for its masked patches, padded: the number of masked patches varies.
    """

    global_crops: jax.Array  # [B, 2, Hg, Wg, C]
    local_crops: jax.Array  # [B, L, Hl, Wl, C], L may be 0
    masks: jax.Array  # bool [B, 2, N]
    rows: jax.Array  # int32 [groups, M], indices of the masked patches among all patches of the group's global crops
    weights: jax.Array  # float32 [groups, M]: 1 / (masked patches of the crop), 0 for padding

    @property
    def groups(self) -> list[jax.Array]:
        """The crops by size, as `Crops.groups`."""
        return Crops(self.global_crops, self.local_crops).groups

    def flat_rows(self) -> jax.Array:
        """Indices of the masked patches among all patches of all global crops, int32 [groups * M]."""
        patches = self.masks.size // len(self.rows)
        return (self.rows + patches * jnp.arange(len(self.rows))[:, None]).ravel()


def mask_crops(keys: jax.Array, crops: Crops, settings: MaskSettings) -> MaskedCrops:
    """Adds masks to crops. keys [B]: one per image; that of the first image of a group draws the group's masks."""
    masks = jax.vmap(lambda key: group_masks(key, settings))(keys[:: settings.images])  # [groups, n, 2, N]
    rows, weights = jax.vmap(lambda one: masked_rows(one, settings.bound))(masks)
    return MaskedCrops(*crops, masks.reshape(-1, *masks.shape[2:]), rows, weights)


def masked_rows(masks: jax.Array, bound: int) -> tuple[jax.Array, jax.Array]:
    """Returns `rows` and `weights` of a group, [bound], for its masks [..., N]."""
    counts = masks.sum(-1, keepdims=True)
    weights = jnp.where(masks, 1.0 / jnp.maximum(counts, 1), 0.0).ravel()
    (rows,) = jnp.nonzero(masks.ravel(), size=bound, fill_value=0)
    return rows.astype(jnp.int32), jnp.where(jnp.arange(bound) < masks.sum(), weights[rows], 0.0)


def group_masks(key: jax.Array, settings: MaskSettings) -> jax.Array:
    """Draws the masks of a group of images, bool [n, 2, N].

    The j-th masked crop asks for a uniform share from the j-th part of the range of ratios; which crop that is, is
    random.
    """
    crops, masked, ratios = GLOBAL_CROPS * settings.images, settings.masked_crops, jnp.asarray(settings.ratios)
    order_key, share_key, mask_key = jax.random.split(key, 3)
    share = ratios[:-1] + jax.random.uniform(share_key, (masked,)) * (ratios[1:] - ratios[:-1])
    wanted = jnp.zeros(crops, jnp.int32).at[:masked].set(jnp.floor(settings.patches * share).astype(jnp.int32))
    wanted = wanted[jax.random.permutation(order_key, crops)]
    keys = jax.random.split(mask_key, crops)
    masks = jax.vmap(lambda key, number: block_mask(key, number, settings.grid, settings.largest))(keys, wanted)
    return masks.reshape(settings.images, GLOBAL_CROPS, settings.patches)


def block_mask(key: jax.Array, wanted: jax.Array, grid: tuple[int, int], largest: int) -> jax.Array:
    """Draws a mask of about `wanted` patches, never more: bool [rows, columns].

    Adds rectangles that cover between one and the missing number of new patches (at most `largest`), until there are
    enough or TRIES in a row do not fit. A rectangle is smaller than the grid in both directions.
    """
    grid_rows, grid_columns = grid
    row, column = jnp.arange(grid_rows)[:, None], jnp.arange(grid_columns)

    def unfinished(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        mask, failed, _ = carry
        return (failed < TRIES) & (mask.sum() < wanted)

    def add(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        mask, failed, number = carry
        for_area, for_aspect, for_top, for_left = jax.random.uniform(jax.random.fold_in(key, number), (4,))
        room = jnp.minimum(wanted - mask.sum(), largest)
        area = LEAST_CELLS + for_area * (room - LEAST_CELLS)
        aspect = jnp.exp((2 * for_aspect - 1) * -math.log(LEAST_ASPECT))
        height, width = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
        top = jnp.floor(for_top * (grid_rows - height + 1))
        left = jnp.floor(for_left * (grid_columns - width + 1))
        inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
        new = (inside & ~mask).sum()
        fits = (height < grid_rows) & (width < grid_columns) & (new > 0) & (new <= room)
        return mask | (inside & fits), jnp.where(fits, 0, failed + 1), number + 1

    start = jnp.zeros(grid, bool), jnp.int32(0), jnp.int32(0)
    return jax.lax.while_loop(unfinished, add, start)[0]


def largest_block(image_size: int, patch_size: int) -> int:
    """Most patches that one rectangle adds: about half of the grid, with the reference's rounding."""
    return int(0.5 * image_size // patch_size * image_size // patch_size)
