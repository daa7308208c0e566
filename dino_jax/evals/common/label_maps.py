"""Label maps: palette PNGs as in VOC and DAVIS, where a pixel is the number of a class or an object."""

from pathlib import Path

import numpy as np
from PIL import Image

from dino_jax import atomic
from dino_jax.errors import UserError

MOST_OBJECTS = 20  # in a user's mask: more colors are those of a photo, or of a mask saved as JPEG


def _palette() -> np.ndarray:
    """Returns the palette of DAVIS, uint8 [256, 3]: bits of the number give red, green and blue; gray from 22 on."""
    number, level = np.arange(22), np.array([0, 64, 128, 191])
    colors = [level[2 * (number >> bit & 1) + (number >> bit + 3 & 1)] for bit in range(3)]
    return np.concatenate([np.stack(colors, 1), np.arange(22, 256)[:, None].repeat(3, 1)]).astype(np.uint8)


def _class_colors() -> np.ndarray:
    """Returns the colors of VOC, uint8 [256, 3]: each third bit of a label is one of a color, the highest first."""
    label = np.arange(256)
    channels = [sum((label >> 3 * i + channel & 1) << 7 - i for i in range(3)) for channel in range(3)]
    return np.stack(channels, 1).astype(np.uint8)


PALETTE = _palette()
CLASS_COLORS = _class_colors()
VOID_COLOR = np.array((224, 224, 192), np.uint8)  # VOC's, of label 255


def read_labels(path: Path, knob: str) -> np.ndarray:
    """Reads the numbers in a palette (or 8-bit gray) PNG, uint8 [H, W]. Raises UserError if there are none."""
    try:
        with Image.open(path) as picture:
            mode, labels = picture.mode, np.array(picture)
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises of damaged files
        raise UserError(f"{knob}: {path} can't be read as a label map ({error})") from error
    if mode.startswith("I"):
        raise UserError(f"{knob}: {path} has labels of 16 bits or more: save at most 256 classes as an 8-bit PNG")
    if mode not in ("P", "L"):
        raise UserError(f"{knob}: {path} has colors ({mode}) instead of labels: give the original palette PNG")
    return labels


def read_objects(path: Path, knob: str) -> np.ndarray:
    """Reads a hand-drawn mask as labels, uint8 [H, W]: black is 0, other colors (or numbers) are 1.. in rising order.

    Raises:
        UserError: the file is unreadable, all black or has more than MOST_OBJECTS colors.
    """
    try:
        with Image.open(path) as picture:
            pixels = np.array(picture if picture.mode in ("P", "L") else picture.convert("RGB"), np.int64)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{knob}: {path} can't be read as a picture ({error})") from error
    if pixels.ndim == 3:
        pixels = pixels @ np.array([1 << 16, 1 << 8, 1])
    colors = np.setdiff1d(pixels, [0])
    if not len(colors):
        raise UserError(f"{knob}: {path} is all black: paint each object in another color")
    if len(colors) > MOST_OBJECTS:
        raise UserError(
            f"{knob}: {path} has {len(colors):,} colors, at most {MOST_OBJECTS} objects work: save it as PNG, one "
            "plain color an object, without soft edges"
        )
    return np.where(pixels == 0, 0, np.searchsorted(colors, pixels) + 1).astype(np.uint8)


def write_labels(path: Path, labels: np.ndarray) -> None:
    """Writes uint8 [H, W] as a PNG in DAVIS's palette."""
    picture = Image.fromarray(labels)
    picture.putpalette(PALETTE.ravel().tolist())
    atomic.write_picture(path, picture)


def tint_objects(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Tints the objects of an image, uint8 [H, W, 3], in the palette's colors, given labels, uint8 [H, W]."""
    return np.where(labels[..., None] > 0, image // 2 + PALETTE[labels] // 2, image)
