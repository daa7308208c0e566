"""Images of any shape through a backbone in square windows of one size, and scores of patches as classes of pixels."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from dino_jax.evals.common.images import map_images, resize
from dino_jax.evals.common.segmentation_data import Example
from dino_jax.weights.backbone import Backbone

BAND = 64  # rows of an image whose scores are held at a time


class Windows(NamedTuple):
    """Squares that cover a scaled image."""

    size: tuple[int, int]  # of the scaled image, pixels
    rows: list[int]  # upper edges of the squares
    columns: list[int]  # left edges
    side: int


def windows_of(shape: tuple[int, int], side: int, overlap: float) -> Windows:
    """Scales an image so that its shorter side is `side` pixels, and covers the longer one with overlapping squares."""
    height, width = (max(side, round(length * side / min(shape))) for length in shape)
    step = max(1, round(side * (1 - overlap)))
    rows, columns = ([*range(0, length - side, step), length - side] for length in (height, width))
    return Windows((height, width), rows, columns, side)


def cut(scaled: np.ndarray, windows: Windows) -> list[np.ndarray]:
    """Returns the windows of a scaled image [h, w, ...], row by row."""
    side = windows.side
    return [scaled[y : y + side, x : x + side] for y in windows.rows for x in windows.columns]


def map_windows(
    examples: Iterable[Example], side: int, overlap: float, function: Callable[..., Any], backbone: Backbone
) -> Iterator[tuple[Example, Windows, np.ndarray]]:
    """Yields each image with its windows and the rows of function(backbone, normalized windows [B, side, side, C])."""
    placed = ((one, windows_of(one.classes.shape, side, overlap)) for one in examples)
    shown, sources = itertools.tee(placed)
    squares = (square for one, windows in sources for square in cut(resize(one.image, *windows.size), windows))
    rows = (row for _, row in map_images(squares, function, backbone))
    for one, windows in shown:
        yield one, windows, np.stack(list(itertools.islice(rows, len(windows.rows) * len(windows.columns))))


def interpolation(length: int, scaled: int, starts: list[int], side: int, cells: int) -> np.ndarray:
    """Returns the matrix from the cells of all windows along an axis to pixels, float32 [length, windows * cells].

    A pixel is interpolated linearly between the centers of the cells in each window that covers it; the mean of these
    windows counts.
    """
    place = (np.arange(length) + 0.5) * scaled / length
    parts = []
    for start in starts:
        inside = (place >= start) & (place < start + side)
        cell = np.clip((place - start) * cells / side - 0.5, 0, cells - 1)
        parts.append(inside[:, None] * np.maximum(0, 1 - np.abs(cell[:, None] - np.arange(cells))))
    weights = np.concatenate(parts, axis=1)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def classes_of_pixels(scores: np.ndarray, shape: tuple[int, int], windows: Windows) -> np.ndarray:
    """Returns the class with the highest score of each pixel, int16 [H, W], given those of patches [windows, h, w, C].

    The scores are upsampled to the size of the image, not to that of the scaled image.
    """
    n, m = len(windows.rows), len(windows.columns)
    _, h, w, C = scores.shape
    grid = scores.reshape(n, m, h, w, C).swapaxes(1, 2).reshape(n * h, m * w * C)
    down = interpolation(shape[0], windows.size[0], windows.rows, windows.side, h)
    across = interpolation(shape[1], windows.size[1], windows.columns, windows.side, w)
    found = np.empty(shape, np.int16)
    for start in range(0, shape[0], BAND):
        band = (down[start : start + BAND] @ grid).reshape(-1, m * w, C)
        found[start : start + BAND] = np.tensordot(across, band, (1, 1)).argmax(-1).T
    return found
