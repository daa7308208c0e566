import jax
import numpy as np
import pytest

from dino_jax.evals.common.sliding_windows import classes_of_pixels, cut, interpolation, windows_of


def test_one_window_is_bilinear_upsampling():
    scores = np.random.default_rng(0).standard_normal((1, 4, 4, 3)).astype(np.float32)
    windows = windows_of((16, 16), 16, 0.5)
    assert windows.rows == windows.columns == [0]
    expected = jax.image.resize(scores[0], (16, 16, 3), "bilinear")
    np.testing.assert_array_equal(classes_of_pixels(scores, (16, 16), windows), expected.argmax(-1))
    rows = interpolation(16, 16, [0], 16, 4)
    np.testing.assert_allclose(np.einsum("ha,wb,abc->hwc", rows, rows, scores[0]), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(20, 47), (47, 20), (200, 470), (5, 9)])
def test_windows_cover_every_pixel_and_average(shape):
    windows = windows_of(shape, 16, 1 / 3)
    assert min(windows.size) == 16
    for length, scaled, starts in zip(shape, windows.size, (windows.rows, windows.columns), strict=True):
        assert starts[0] == 0
        assert starts[-1] == scaled - 16
        assert all(0 < b - a <= 11 for a, b in zip(starts, starts[1:], strict=False))
        weights = interpolation(length, scaled, starts, 16, 4)
        np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
        # The scores of a ramp are a ramp, but within half a cell of the border.
        ramp = np.concatenate([start + (np.arange(4) + 0.5) * 4 for start in starts])
        place = (np.arange(length) + 0.5) * scaled / length
        assert np.abs(weights @ ramp - place).max() <= 2
    count = len(windows.rows) * len(windows.columns)
    scores = np.zeros((count, 4, 4, 2), np.float32)
    scores[..., 1] = 1
    assert (classes_of_pixels(scores, shape, windows) == 1).all()


def test_windows_are_where_they_were_cut():
    """Scores that are the image itself give its classes."""
    classes = np.zeros((16, 48), np.int16)
    classes[:, 20:33] = 1
    windows = windows_of(classes.shape, 16, 1 / 3)
    parts = np.stack(cut(classes, windows))
    found = classes_of_pixels(np.eye(2, dtype=np.float32)[parts], classes.shape, windows)
    np.testing.assert_array_equal(found, classes)
