import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from dino_jax.data import photometric

jitter = jax.jit(photometric.color_jitter)


def planar(image):
    """uint8 [H, W, C] -> float32 [H, C, W]"""
    return jnp.asarray(image, jnp.float32).swapaxes(1, 2)


def difference(planes, expected):
    return np.abs(np.asarray(planes).swapaxes(1, 2) - np.asarray(expected, np.float32))


def blur(planes, sigma):
    rows = photometric.blur_matrix(planes.shape[0], sigma)
    columns = photometric.blur_matrix(planes.shape[2], sigma)
    return jnp.einsum("oh,hcw,pw->ocp", rows, planes, columns)


def operations(golden):
    """(name, setting, input, expected) of every operation of the golden that is named OPERATION_SETTING."""
    arrays, _ = golden("aug_ops")
    for key, expected in arrays.items():
        if named := re.fullmatch(r"(brightness|contrast|saturation|hue|blur)_(-?[\d.]+)", key):
            yield named[1], float(named[2]), planar(arrays["in/image"]), expected


def test_each_operation_is_the_references(golden):
    """Pillow rounds or truncates to whole levels, saturation's gray as well; blur rounds by half a level six times."""
    apply = {
        "brightness": lambda x, factor: photometric.blend(x, 0.0, factor),
        "contrast": lambda x, factor: photometric.blend(x, photometric.mean_gray(x), factor),
        "saturation": lambda x, factor: photometric.blend(x, photometric.gray(x), factor),
        "blur": blur,
    }
    tolerance = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.5, "blur": 3.0}
    seen = set()
    for name, setting, image, expected in operations(golden):
        if name in apply:
            worst = difference(apply[name](image, setting), expected).max()
            assert worst <= tolerance[name] + 1e-3, f"{name} {setting}: {worst}"
            seen.add(name)
    assert seen == set(apply)


def test_hue_is_the_references_up_to_its_8_bit_hsv(golden):
    """Pillow truncates hue and saturation to bytes; hue loses a step more where the shifted byte wraps at 256.

    A step of hue, 1/255, is worth 6 levels at most, one of saturation 1: 2 x 6 + 1, and 1 for rounding, at most.
    torchvision also truncates the shift to whole steps, which is taken out here.
    """
    tested = [case for case in operations(golden) if case[0] == "hue"]
    assert tested
    for _, turns, image, expected in tested:
        gap = difference(photometric.shift_hue(image, np.trunc(turns * 255) / 255), expected)
        assert gap.mean() < 1.0, turns
        assert gap.max() <= 14.0, turns


def test_grayscale_and_solarize_are_the_references(golden):
    arrays, _ = golden("aug_ops")
    image = planar(arrays["in/image"])
    assert difference(photometric.gray(image), arrays["grayscale"]).max() <= 0.5 + 1e-3
    assert difference(photometric.solarize(image), arrays["solarize"]).max() == 0
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = ImageOps.solarize(Image.fromarray(levels), threshold=128)
    np.testing.assert_array_equal(photometric.solarize(levels.astype(np.float32)), np.asarray(expected))


@pytest.mark.parametrize("sigma", [0.1, 0.57, 1.4142, 2.0, 7.3])
def test_blur_is_pillows_for_any_sigma_edges_included(sigma):
    """On an image brighter at its edges than inside, where another treatment of edges would show."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 52, 3)).astype(np.uint8)
    noise[4:-4, 4:-4] //= 4
    expected = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(sigma))
    gap = difference(blur(planar(noise), sigma), expected)
    assert gap.max() <= 3.0  # half a level in each of Pillow's six passes
    assert gap.mean() < 1.0


def test_the_kernel_and_solarize_are_dinov2s(golden2):
    """torchvision rounds to whole levels once, after both axes."""
    arrays, meta = golden2("aug2")
    planes = planar(arrays["in/image"])
    for key in arrays:
        if key.startswith("blur_sigma"):
            sigma, taps = float(key.removeprefix("blur_sigma")), meta["blur_kernel"]
            rows, columns = (photometric.kernel_matrix(planes.shape[axis], sigma, taps) for axis in (0, 2))
            blurred = jnp.einsum("oh,hcw,pw->ocp", rows, planes, columns)
            assert difference(blurred, arrays[key]).max() <= 0.501, key
    assert difference(photometric.solarize(planes), arrays["solarize128"]).max() == 0
    np.testing.assert_array_equal(photometric.kernel_matrix(12, 0.0, 9), np.eye(12))


def test_blur_of_sigma_zero_changes_nothing():
    np.testing.assert_array_equal(photometric.blur_matrix(9, 0.0), np.eye(9))


@pytest.mark.parametrize("places", list(itertools.permutations(range(4))))
def test_jitter_applies_its_operations_in_the_order_of_their_places(places):
    """All 24 orders, against the operations one after the other; the factors are strong so that orders differ."""
    image = planar(np.random.default_rng(1).integers(0, 256, (12, 10, 3)))
    factors = np.array([1.4, 0.5, 1.8, 0.2], np.float32)
    step = {
        photometric.BRIGHTNESS: lambda x: photometric.blend(x, 0.0, factors[0]),
        photometric.CONTRAST: lambda x: photometric.blend(x, photometric.mean_gray(x), factors[1]),
        photometric.SATURATION: lambda x: photometric.blend(x, photometric.gray(x), factors[2]),
        photometric.HUE: lambda x: photometric.shift_hue(x, factors[3]),
    }
    expected = image
    for operation in np.argsort(places):
        expected = step[operation](expected)
    made = jitter(image, factors, jnp.array(places))
    np.testing.assert_allclose(made, expected, atol=5e-3)


def test_neutral_jitter_changes_nothing():
    image = planar(np.random.default_rng(2).integers(0, 256, (8, 8, 3)))
    np.testing.assert_allclose(photometric.color_jitter(image, photometric.NEUTRAL, jnp.arange(4)), image, atol=1e-3)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_channel_counts_jitter_brightness_and_contrast_only(channels):
    image = planar(np.random.default_rng(3).integers(0, 256, (8, 8, channels)))
    factors = jnp.array([0.7, 1.3, 0.1, 0.4])
    made = photometric.color_jitter(image, factors, jnp.array([0, 1, 2, 3]))
    dark = photometric.blend(image, 0.0, 0.7)
    np.testing.assert_allclose(made, photometric.blend(dark, jnp.floor(dark.mean() + 0.5), 1.3), atol=1e-3)
