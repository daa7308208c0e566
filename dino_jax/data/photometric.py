"""Color jitter, gray, blur and solarize on the device, with Pillow's definitions.

Every function takes one float32 image in 0..255, laid out `[H, C, W]`: a row holds its channels one after the other.
Cropping and blurring are matrix products over the first and the last axis, and in this layout all four of them are
plain products without a transposition; a channel is a contiguous run of pixels, which a trailing axis of 3 is not.

Pillow rounds to uint8 after each operation, these keep the fraction: they agree to about 1/255, hue to a few where
Pillow's own 8-bit HSV is coarse. Vectorize with `jax.vmap`: no function branches on a traced value.
"""

import jax
import jax.numpy as jnp
import numpy as np

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
NEUTRAL = np.array([1.0, 1.0, 1.0, 0.0], np.float32)  # the factors of the four that change nothing


def gray(image: jax.Array) -> jax.Array:
    """Pillow's luma `[H, 1, W]` of an image `[H, C, W]`; the channels' mean where there are not three of them."""
    if image.shape[1] != 3:
        return jnp.mean(image, axis=1, keepdims=True)
    return 0.299 * image[:, :1] + 0.587 * image[:, 1:2] + 0.114 * image[:, 2:]


def blend(image: jax.Array, target: jax.Array | float, factor: jax.Array | float) -> jax.Array:
    """Pillow's ImageEnhance: `factor` 0 gives the target, 1 the image, more exaggerates it; clipped to 0..255.

    Brightness has black as its target, contrast `mean_gray`, saturation (and, with factor 0, grayscale) `gray`.
    """
    return jnp.clip(target + factor * (image - target), 0.0, 255.0)


def mean_gray(image: jax.Array) -> jax.Array:
    """Contrast's target: the mean of `gray`, rounded to a whole level as Pillow rounds it; a scalar."""
    return jnp.floor(jnp.mean(gray(image)) + 0.5)


def shift_hue(image: jax.Array, turns: jax.Array | float) -> jax.Array:
    """Turn the hue of an RGB image `[H, 3, W]` by a part of the HSV circle; value and chroma stay."""
    red, green, blue = image[:, :1], image[:, 1:2], image[:, 2:]
    value = jnp.max(image, axis=1, keepdims=True)
    chroma = value - jnp.min(image, axis=1, keepdims=True)
    scale = 1.0 / jnp.where(chroma == 0.0, 1.0, chroma)
    # Not `value == red`: a compiler may compute the two in different places, rounded differently, and then no channel
    # is the largest. Where these comparisons go the other way by a rounding error, both formulas agree.
    sextant = jnp.where(
        (red >= green) & (red >= blue),
        (green - blue) * scale,
        jnp.where(green >= blue, 2.0 + (blue - red) * scale, 4.0 + (red - green) * scale),
    )
    # HSV to RGB without its six branches: channel n falls from the value by the chroma times a trapezoid of the hue.
    position = sextant + 6.0 * turns + jnp.array([5.0, 3.0, 1.0])[:, None]
    position -= 6.0 * jnp.floor(position / 6.0)
    return value - chroma * jnp.clip(jnp.minimum(position, 4.0 - position), 0.0, 1.0)


def color_jitter(image: jax.Array, factors: jax.Array, places: jax.Array) -> jax.Array:
    """Brightness, contrast, saturation and hue in any order (torchvision's ColorJitter).

    Args:
      image: `[H, C, W]`. Saturation and hue do not exist, and are skipped, unless C is 3.
      factors: float32 `[4]` by BRIGHTNESS, CONTRAST, SATURATION, HUE: three blend factors (1 changes nothing), then
        turns (0 changes nothing).
      places: int32 `[4]`, a permutation: when each of them has its turn.

    Only contrast must see the whole image. What comes before it is one elementwise pass with a sum at its end, what
    comes after it another, and in each half brightness and saturation may stand on both sides of hue. Giving
    the factor that changes nothing wherever an operation is not due makes all 24 orders the same program: a switch
    over orders would compute every branch under vmap.
    """
    early = places < places[CONTRAST]
    image = _pixelwise_jitter(image, jnp.where(early, factors, NEUTRAL), places)
    image = blend(image, mean_gray(image), factors[CONTRAST])
    return _pixelwise_jitter(image, jnp.where(early, NEUTRAL, factors), places)


def _pixelwise_jitter(image: jax.Array, factors: jax.Array, places: jax.Array) -> jax.Array:
    """Brightness, saturation and hue in the order of their places."""
    if image.shape[1] != 3:
        return blend(image, 0.0, factors[BRIGHTNESS])
    swapped = places[SATURATION] < places[BRIGHTNESS]
    pair = jnp.where(swapped, jnp.array([SATURATION, BRIGHTNESS]), jnp.array([BRIGHTNESS, SATURATION]))
    before_hue = places[pair] < places[HUE]

    def blend_pair(image, due):
        for i in range(2):
            target = jnp.where(pair[i] == SATURATION, 1.0, 0.0) * gray(image)
            image = blend(image, target, jnp.where(due[i], factors[pair[i]], 1.0))
        return image

    image = shift_hue(blend_pair(image, before_hue), factors[HUE])
    return blend_pair(image, ~before_hue)


def blur_matrix(size: int, sigma: jax.Array | float) -> jax.Array:
    """Pillow's GaussianBlur along one axis as a matrix float32 `[size, size]`: blurred = matrix @ signal.

    Three passes of a box of fractional radius (Gwosdek et al. 2011, equations 7, 11 and 14), edges replicated at each
    pass. Sigma in pixels; 0 gives the identity.
    """
    variance = jnp.asarray(sigma, jnp.float32) ** 2 / 3.0
    whole = jnp.floor((jnp.sqrt(12.0 * variance + 1.0) - 1.0) / 2.0)
    part = (2.0 * whole + 1.0) * (whole * (whole + 1.0) - 3.0 * variance) / (6.0 * (variance - (whole + 1.0) ** 2))
    reach = whole + part + 1.0

    rows, columns = jnp.arange(size)[:, None], jnp.arange(size)[None, :]
    box = jnp.clip(reach - jnp.abs(rows - columns), 0.0, 1.0)
    # The first and the last pixel stand for all those beyond them as well: the sum of the box's tail, in closed form.
    box = jnp.where(columns == 0, jnp.maximum(reach - rows, 0.0), box)
    box = jnp.where(columns == size - 1, jnp.maximum(reach - (size - 1 - rows), 0.0), box)
    box = box / (2.0 * reach - 1.0)
    return jnp.einsum("ij,jk,kl->il", box, box, box, precision=jax.lax.Precision.HIGHEST)


def solarize(image: jax.Array) -> jax.Array:
    """Invert the levels from 128 up: the smaller of a level and its inverse, which for whole levels is the same."""
    return jnp.minimum(image, 255.0 - image)
