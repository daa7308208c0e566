"""The bundled demo set: 14,000 garments of Fashion-MNIST, each at a random position and scale on a larger black canvas.

Fashion-MNIST itself is centered and tightly cropped, so random crops would be too easy. With random positions, the set
has real objects with a background and exact object masks, and it needs no download.
"""

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

ARRAYS = Path(__file__).parent / "demo" / "fashion_mnist_subset.npz"  # its license is in the same folder
SPLITS = ("train", "test")
NUM_CLASSES = 10

CANVAS = 40  # side of the square canvas, pixels
MIN_SIDE, MAX_SIDE = 18, 32  # pixels of a garment's side, uniform, both inclusive (28 in Fashion-MNIST itself)
PLACEMENT_SEED = 0
MASK_THRESHOLD = 25  # of 255: a brighter pixel of the resized garment belongs to the object


def demo_labels(split: str) -> np.ndarray:
    """Returns the garment classes 0..9 of a split, int32 [n]."""
    return _garments(split)[1]


@cache
def demo_images(split: str) -> np.ndarray:
    """Returns all images of a split ("train": 12,000, "test": 2,000), gray uint8 [n, CANVAS, CANVAS, 1]."""
    garments, _ = _garments(split)
    images = np.zeros((len(garments), CANVAS, CANVAS, 1), np.uint8)
    for i, garment in enumerate(garments):
        pixels, window = _place(garment, split, i)
        images[i, ..., 0][window] = pixels
    return images


def demo_masks(split: str) -> np.ndarray:
    """Returns the object masks of `demo_images(split)`, bool [n, CANVAS, CANVAS]: pixels above MASK_THRESHOLD."""
    garments, _ = _garments(split)
    masks = np.zeros((len(garments), CANVAS, CANVAS), bool)
    for i, garment in enumerate(garments):
        pixels, window = _place(garment, split, i)
        masks[i][window] = pixels > MASK_THRESHOLD
    return masks


@cache
def _garments(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the bundled images uint8 [n, 28, 28] and labels int32 [n]."""
    with np.load(ARRAYS) as file:
        return file[f"{split}_images"], file[f"{split}_labels"].astype(np.int32)


def _place(garment: np.ndarray, split: str, i: int) -> tuple[np.ndarray, tuple[slice, slice]]:
    """Returns a garment resized to its random side, uint8 [side, side], and its window on the canvas."""
    rng = np.random.default_rng([PLACEMENT_SEED, SPLITS.index(split), i])
    side = int(rng.integers(MIN_SIDE, MAX_SIDE, endpoint=True))
    top, left = rng.integers(0, CANVAS - side, size=2, endpoint=True)
    pixels = np.asarray(Image.fromarray(garment).resize((side, side), Image.Resampling.BICUBIC))
    return pixels, (slice(top, top + side), slice(left, left + side))
