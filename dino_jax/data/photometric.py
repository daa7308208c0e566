"""Color jitter, gray, blur and solarize on the device, with Pillow's definitions.

Every function takes one float32 image in 0..255 with layout `[H, C, W]`. Cropping and blurring are matrix products over
the first and the last axis, and in this layout all four of them need no transposition. The pixels of a channel are
contiguous in a row, which a trailing axis of 3 would prevent.

Pillow rounds to uint8 after each operation, these functions do not. They agree to about 1/255, and to a few levels for
hue, where Pillow's 8-bit HSV is coarse. Vectorize with `jax.vmap`: no function branches on a traced value.
"""

import jax
import jax.numpy as jnp
import numpy as np

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
NEUTRAL = np.array([1.0, 1.0, 1.0, 0.0], np.float32)  # the neutral factors of the four


def gray(image: jax.Array) -> jax.Array:
    """Returns Pillow's luma `[H, 1, W]` of an image `[H, C, W]`; the mean of the channels unless there are three."""
    if image.shape[1] != 3:
        return jnp.mean(image, axis=1, keepdims=True)
    return 0.299 * image[:, :1] + 0.587 * image[:, 1:2] + 0.114 * image[:, 2:]


def blend(image: jax.Array, target: jax.Array | float, factor: jax.Array | float) -> jax.Array:
    """Blends as Pillow's ImageEnhance: `factor` 0 gives the target, 1 the image, more extrapolates; clips to 0..255.

    The target of brightness is black, of contrast `mean_gray`, of saturation (and, with factor 0, grayscale) `gray`.
    """
    return jnp.clip(target + factor * (image - target), 0.0, 255.0)


def mean_gray(image: jax.Array) -> jax.Array:
    """Returns the target of contrast, a scalar: the mean of `gray`, rounded to an integer as in Pillow."""
    return jnp.floor(jnp.mean(gray(image)) + 0.5)


def shift_hue(image: jax.Array, turns: jax.Array | float) -> jax.Array:
    """Rotates the hue of an RGB image `[H, 3, W]` by a fraction of the HSV circle, keeping value and chroma."""
    red, green, blue = image[:, :1], image[:, 1:2], image[:, 2:]
    value = jnp.max(image, axis=1, keepdims=True)
    chroma = value - jnp.min(image, axis=1, keepdims=True)
    scale = 1.0 / jnp.where(chroma == 0.0, 1.0, chroma)
    # Not `value == red`: the compiler may compute the two in different places with different rounding, and then no
    # channel would be the largest. Where rounding flips these comparisons, both formulas agree.
    sextant = jnp.where(
        (red >= green) & (red >= blue),
        (green - blue) * scale,
        jnp.where(green >= blue, 2.0 + (blue - red) * scale, 4.0 + (red - green) * scale),
    )
    # HSV to RGB without six branches: channel n is the value minus the chroma times a trapezoid function of the hue.
    position = sextant + 6.0 * turns + jnp.array([5.0, 3.0, 1.0])[:, None]
    position -= 6.0 * jnp.floor(position / 6.0)
    return value - chroma * jnp.clip(jnp.minimum(position, 4.0 - position), 0.0, 1.0)


def color_jitter(image: jax.Array, factors: jax.Array, places: jax.Array) -> jax.Array:
    """Applies brightness, contrast, saturation and hue in any order (torchvision's ColorJitter).

    Args:
      image: `[H, C, W]`. Saturation and hue are skipped unless C is 3.
      factors: float32 `[4]`, indexed by BRIGHTNESS, CONTRAST, SATURATION, HUE: three blend factors (1 is neutral) and
        turns (0 is neutral).
      places: int32 `[4]`, a permutation: the position of each operation in the order.

    Only contrast depends on the whole image. The operations before it are one elementwise pass that ends in a sum, and
    those after it are another. In both passes, brightness and saturation are applied before and after hue. An operation
    gets its neutral factor wherever it is not due, so all 24 orders are one program. A switch over orders would compute
    every branch under vmap.
    """
    early = places < places[CONTRAST]
    image = _pixelwise_jitter(image, jnp.where(early, factors, NEUTRAL), places)
    image = blend(image, mean_gray(image), factors[CONTRAST])
    return _pixelwise_jitter(image, jnp.where(early, NEUTRAL, factors), places)


def _pixelwise_jitter(image: jax.Array, factors: jax.Array, places: jax.Array) -> jax.Array:
    """Applies brightness, saturation and hue in the order of their places."""
    if image.shape[1] != 3:
        return blend(image, 0.0, factors[BRIGHTNESS])
    swapped = places[SATURATION] < places[BRIGHTNESS]
    pair = jnp.where(swapped, jnp.array([SATURATION, BRIGHTNESS]), jnp.array([BRIGHTNESS, SATURATION]))
    before_hue = places[pair] < places[HUE]

    def blend_pair(image: jax.Array, due: jax.Array) -> jax.Array:
        for i in range(2):
            target = jnp.where(pair[i] == SATURATION, 1.0, 0.0) * gray(image)
            image = blend(image, target, jnp.where(due[i], factors[pair[i]], 1.0))
        return image

    image = shift_hue(blend_pair(image, before_hue), factors[HUE])
    return blend_pair(image, ~before_hue)


def channel_jitter(image: jax.Array, factors: jax.Array) -> jax.Array:
    """Changes brightness and contrast of each channel on its own, for images that are neither gray nor RGB.

    Args:
      image: `[H, C, W]`.
      factors: float32 `[2, C]`, indexed by BRIGHTNESS and CONTRAST; 1 is neutral.

    The target of contrast is the mean of the channel. The order would matter only for what is clipped.
    """
    image = blend(image, 0.0, factors[BRIGHTNESS][:, None])
    return blend(image, jnp.mean(image, axis=(0, 2))[:, None], factors[CONTRAST][:, None])


def blur_matrix(size: int, sigma: jax.Array | float) -> jax.Array:
    """Returns Pillow's GaussianBlur along one axis as a matrix, float32 `[size, size]`: blurred = matrix @ signal.

    Three passes of a box of fractional radius (Gwosdek et al. 2011, equations 7, 11 and 14), with edges replicated in
    each pass. `sigma` is in pixels; 0 gives the identity.
    """
    variance = jnp.asarray(sigma, jnp.float32) ** 2 / 3.0
    radius = jnp.floor((jnp.sqrt(12.0 * variance + 1.0) - 1.0) / 2.0)
    alpha = (2.0 * radius + 1.0) * (radius * (radius + 1.0) - 3.0 * variance) / (6.0 * (variance - (radius + 1.0) ** 2))
    reach = radius + alpha + 1.0

    rows, columns = jnp.arange(size)[:, None], jnp.arange(size)[None, :]
    box = jnp.clip(reach - jnp.abs(rows - columns), 0.0, 1.0)
    # The first and the last pixel also stand for all pixels beyond them: add the tail of the box, in closed form.
    box = jnp.where(columns == 0, jnp.maximum(reach - rows, 0.0), box)
    box = jnp.where(columns == size - 1, jnp.maximum(reach - (size - 1 - rows), 0.0), box)
    box = box / (2.0 * reach - 1.0)
    return jnp.einsum("ij,jk,kl->il", box, box, box, precision=jax.lax.Precision.HIGHEST)


def kernel_matrix(size: int, sigma: jax.Array | float, taps: int) -> jax.Array:
    """Returns torchvision's gaussian_blur along one axis as a matrix, float32 `[size, size]`.

    A Gaussian sampled at an odd number of taps and normalized; the edge is reflected, without the edge pixel itself.
    `sigma` is in pixels; 0 gives the identity.
    """
    offsets = jnp.arange(taps) - taps // 2
    weights = jnp.exp(-0.5 * jnp.square(offsets / jnp.maximum(sigma, 1e-3)))
    sources = jnp.abs(jnp.arange(size)[:, None] + offsets)  # reflected at 0, then at the other end
    sources = (size - 1) - jnp.abs((size - 1) - sources)
    matrix = jnp.zeros((size, size)).at[jnp.arange(size)[:, None], sources].add(weights)
    return matrix / weights.sum()


def solarize(image: jax.Array) -> jax.Array:
    """Inverts levels from 128 up: min(level, 255 - level), which is the same for integer levels."""
    return jnp.minimum(image, 255.0 - image)
