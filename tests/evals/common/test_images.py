import numpy as np
import pytest

from dino_jax.evals.common import images
from dino_jax.weights.backbone import Backbone

CARD = {"preprocessing": {"mean": (0.0,), "std": (1 / 255,)}}


def brightest(backbone, images):
    return images.max((1, 2, 3))


@pytest.mark.parametrize("number", [0, 1, 5, 8])
def test_each_image_meets_its_own_row_whatever_the_batches(number):
    pixels = np.random.default_rng(0).integers(0, 256, (number, 4, 6, 1), np.uint8)
    found = list(images.map_images(iter(pixels), brightest, Backbone(None, {}, CARD), batch_size=3))
    assert len(found) == number
    for image, (same, value) in zip(pixels, found, strict=True):
        assert same is image or np.array_equal(same, image)
        assert value == pytest.approx(image.max())


def test_upsample_repeats_each_value():
    assert images.upsample(np.array([[1, 2]]), 2).tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]


def test_heat_goes_from_dark_to_bright():
    colors = images.heatmap(np.linspace(-3, 5, 20).reshape(1, 20))[0]
    brightness = colors.astype(int) @ [299, 587, 114]
    assert (np.diff(brightness) > 0).all()
    assert images.heatmap(np.ones((2, 2))).max() <= 4  # a flat map has no peak
