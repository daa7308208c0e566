"""Multi-crop augmentation on the device: boxes, crop and resize, flip, color, blur, solarize, normalize.

`multicrop` is a pure function with a key per image, so the crops of an image depend neither on the rest of the batch
nor on the number of devices.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dino_jax.data import photometric
from dino_jax.data.pixels import to_levels

GLOBAL_CROPS = 2
PICTURES = (1, 3)  # numbers of channels that are gray and RGB
ATTEMPTS = 10
# Uniform random numbers for one crop. One call of the generator gives all of them; a call for each quantity would take
# most of the compile time.
BOX_NUMBERS, JITTER_NUMBERS, OTHER_NUMBERS = 2 * ATTEMPTS + 2, 9, 5
MIN_RATIO, MAX_RATIO = 3.0 / 4.0, 4.0 / 3.0
# With plain bfloat16 products, levels up to 255 would be off by half a level or more in each of four steps. HIGH is
# TF32 on GPUs, three bfloat16 passes on TPUs and float32 on CPUs: an error of at most a quarter of a level per step.
PRECISION = jax.lax.Precision.HIGH


class Crops(NamedTuple):
    """Normalized crops of B images, batch-major: merging `[B, V]` into one axis needs no communication."""

    global_crops: jax.Array  # [B, 2, Hg, Wg, C]
    local_crops: jax.Array  # [B, L, Hl, Wl, C], L may be 0

    @property
    def groups(self) -> list[jax.Array]:
        """Returns the crops by size, global first, without local crops if there are none."""
        return [self.global_crops] + ([self.local_crops] if self.local_crops.shape[1] else [])


class Group(NamedTuple):
    """Static settings of the crops that share a size; the tuples have one probability per crop."""

    first: int  # index of the group's first crop among all crops of an image
    size: int
    scale: tuple[float, float]
    blur: tuple[float, ...]
    solarize: tuple[float, ...]


def multicrop(
    keys: jax.Array,
    canvas: jax.Array,
    sizes: jax.Array,
    crops: Any,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: Any,
) -> Crops:
    """Takes two global and L local crops per image, augmented as in the reference (torchvision on Pillow images).

    Jit it with all but the first three arguments bound. Operations with probability 0 cost nothing. Saturation, hue and
    grayscale need three channels. Images that are neither gray nor RGB change brightness and contrast of each channel
    on its own, and are not solarized, because their channels have no common scale.

    Args:
      keys: typed PRNG keys `[B]`.
      canvas: uint8, uint16 or float32 `[B, S, S, C]`, see `decoding.to_canvas`.
      sizes: `[B, 2]`, the original height and width in pixels; boxes are drawn in these coordinates.
      crops: the section `config.crops`.
      mean: C values, for levels in 0..1.
      std: C values, for levels in 0..1.
      dtype: of the result; all arithmetic is in float32.

    `training.config_checks.check_config` says what is wrong with `crops`, mean and std.
    """
    local = crops.local_number
    groups = (
        Group(0, crops.global_size, crops.global_scale, crops.global_blur, crops.global_solarize),
        Group(GLOBAL_CROPS, crops.local_size, crops.local_scale, (crops.local_blur,) * local, (0.0,) * local),
    )
    planes = to_levels(jnp.swapaxes(canvas, 2, 3))  # [B, S, C, S]: see photometric about this layout
    slope = 1.0 / (255.0 * jnp.array(std))
    offset = jnp.array(mean) / jnp.array(std)

    def normalized(group: Any) -> jax.Array:
        images = _group_crops(keys, planes, sizes, group, crops)
        return (jnp.swapaxes(images, 3, 4) * slope - offset).astype(dtype)

    return Crops(*map(normalized, groups))


def _group_crops(keys: jax.Array, planes: jax.Array, sizes: jax.Array, group: Group, crops: Any) -> jax.Array:
    """Returns the n crops of a group: float32 `[B, n, size, C, size]` in 0..255."""
    number = len(group.blur)
    if number == 0:
        return jnp.zeros((planes.shape[0], 0, group.size, planes.shape[2], group.size))

    def view(key: jax.Array, image: jax.Array, size: jax.Array, blur: jax.Array, solarize: jax.Array) -> jax.Array:
        channels = image.shape[1]
        picture = channels in PICTURES
        jitter_numbers = JITTER_NUMBERS if picture else 2 * channels + 1
        numbers = jax.random.uniform(key, (BOX_NUMBERS + jitter_numbers + OTHER_NUMBERS,))
        for_box, for_jitter, others = jnp.split(numbers, (BOX_NUMBERS, BOX_NUMBERS + jitter_numbers))
        flipped, grayed, blurred, sigma, solarized = others
        crop = crop_and_resize(image, size, random_box(for_box, size, group.scale), flipped < crops.flip, group.size)
        if crops.jitter > 0:
            if picture:
                crop = photometric.color_jitter(crop, *random_jitter(for_jitter, crops))
            else:
                crop = photometric.channel_jitter(crop, random_channel_jitter(for_jitter, crops))
        if crops.grayscale > 0 and channels == 3:
            crop = jnp.where(grayed < crops.grayscale, photometric.gray(crop), crop)
        if max(group.blur) > 0:
            sigma = crops.blur_sigma[0] + sigma * (crops.blur_sigma[1] - crops.blur_sigma[0])
            sigma = jnp.where(blurred < blur, sigma, 0.0)
            matrix = (
                photometric.kernel_matrix(group.size, sigma, crops.blur_taps)
                if crops.blur_taps
                else photometric.blur_matrix(group.size, sigma)
            )
            crop = jnp.einsum("oh,hcw->ocw", matrix, crop, precision=PRECISION)
            crop = jnp.einsum("hcw,pw->hcp", crop, matrix, precision=PRECISION)
        if max(group.solarize) > 0 and picture:
            crop = jnp.where(solarized < solarize, photometric.solarize(crop), crop)
        return crop

    def views(key: jax.Array, image: jax.Array, size: jax.Array) -> jax.Array:
        view_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, group.first + jnp.arange(number))
        arguments = view_keys, image, size, jnp.array(group.blur), jnp.array(group.solarize)
        return jax.vmap(view, (0, None, None, 0, 0))(*arguments)

    return jax.vmap(views)(keys, planes, sizes.astype(jnp.float32))


def random_box(numbers: jax.Array, size: jax.Array, scale: tuple[float, float]) -> jax.Array:
    """Draws the box of torchvision's RandomResizedCrop: float32 `[4]` (top, left, height, width), in integer pixels.

    Returns the first of ten boxes of random area and aspect ratio that fits; if none does, the largest central box of
    an allowed ratio. `numbers` are BOX_NUMBERS uniform numbers in [0, 1), `size` is height and width.
    """
    for_area, for_ratio, for_corner = jnp.split(numbers, (ATTEMPTS, 2 * ATTEMPTS))
    area = size[0] * size[1] * (scale[0] + for_area * (scale[1] - scale[0]))
    ratio = jnp.exp(math.log(MIN_RATIO) + for_ratio * math.log(MAX_RATIO / MIN_RATIO))
    drawn = jnp.round(jnp.sqrt(jnp.stack([area / ratio, area * ratio], axis=1)))  # [10, 2] heights and widths
    fits = jnp.all((drawn > 0) & (drawn <= size), axis=1)

    clamped = jnp.clip(size[1] / size[0], MIN_RATIO, MAX_RATIO)
    central = jnp.minimum(size, jnp.round(size[::-1] * jnp.stack([1.0 / clamped, clamped])))
    extent = jnp.where(jnp.any(fits), drawn[jnp.argmax(fits)], central)

    room = size - extent
    corner = jnp.minimum(jnp.floor(for_corner * (room + 1.0)), room)
    corner = jnp.where(jnp.any(fits), corner, jnp.floor(room / 2.0))
    return jnp.concatenate([corner, extent])


def crop_and_resize(image: jax.Array, size: jax.Array, box: jax.Array, flip: jax.Array | bool, out: int) -> jax.Array:
    """Crops, resizes (antialiased bicubic as in Pillow) and flips horizontally if `flip`, by two matrix products.

    `image` is `[S, C, S]`, the canvas (`decoding.to_canvas`) of an original of `size` (height, width); `box` is in
    pixels of the original. Returns float32 `[out, C, out]`. Rows are first: with `vmap` over boxes, all views of an
    image share this product of one large matrix with the unchanged image.
    """
    canvas = image.shape[0]
    used = jnp.minimum(size, canvas)  # a longer side is squeezed to the canvas, see `decoding.to_canvas`
    start, extent = box[:2] / size * used, box[2:] / size * used
    rows = resize_matrix(canvas, out, start[0], extent[0])
    columns = resize_matrix(canvas, out, start[1], extent[1])
    columns = jnp.where(flip, columns[::-1], columns)
    image = jnp.einsum("oh,hcw->ocw", rows, image, precision=PRECISION)
    image = jnp.einsum("ocw,pw->ocp", image, columns, precision=PRECISION)
    return jnp.clip(image, 0.0, 255.0)


def resize_matrix(size: int, out: int, start: jax.Array, extent: jax.Array) -> jax.Array:
    """Returns weights float32 `[out, size]` that resize the part `start..start + extent` of an axis to `out` pixels.

    Pillow's bicubic (a = -0.5), with its support widened by the downscaling factor. Only pixels whose center is in the
    part are used, as after a crop; a part thinner than a pixel is widened to one.
    """
    step = extent / out
    centers = start + (jnp.arange(out)[:, None] + 0.5) * step
    pixels = jnp.arange(size) + 0.5
    distance = jnp.abs(pixels - centers) / jnp.maximum(step, 1.0)
    near = (1.5 * distance - 2.5) * distance**2 + 1.0
    far = ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
    weights = jnp.where(distance < 1.0, near, jnp.where(distance < 2.0, far, 0.0))
    inside = jnp.abs(pixels - (start + extent / 2.0)) <= jnp.maximum(extent / 2.0, 0.5)
    weights = jnp.where(inside, weights, 0.0)
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def random_jitter(numbers: jax.Array, crops: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the factors and places for `photometric.color_jitter`, from JITTER_NUMBERS uniform numbers in [0, 1).

    With probability `1 - crops.jitter` the factors are neutral. All 24 orders are equally likely.
    """
    for_factors, for_places, applied = numbers[:4], numbers[4:8], numbers[8] < crops.jitter
    span = jnp.array([crops.brightness, crops.contrast, crops.saturation, crops.hue])
    neutral = photometric.NEUTRAL
    low = jnp.maximum(neutral - span, jnp.array([0.0, 0.0, 0.0, -crops.hue]))
    factors = low + for_factors * (neutral + span - low)
    return jnp.where(applied, factors, neutral), jnp.argsort(for_places)


def random_channel_jitter(numbers: jax.Array, crops: Any) -> jax.Array:
    """Returns factors `[2, C]` for `photometric.channel_jitter`, from 2 C + 1 uniform numbers in [0, 1).

    With probability `1 - crops.jitter` the factors are neutral.
    """
    for_factors, applied = numbers[:-1].reshape(2, -1), numbers[-1] < crops.jitter
    span = jnp.array([crops.brightness, crops.contrast])[:, None]
    low = jnp.maximum(1.0 - span, 0.0)
    return jnp.where(applied, low + for_factors * (1.0 + span - low), 1.0)
