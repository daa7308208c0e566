"""What a network reads of stored images: the number of channels, the depth, and the values that are black and white."""

from typing import Any, NamedTuple

import numpy as np

# The value of white by dtype of canvases and crops. Black is 0.
WHITE = {"uint8": 255, "uint16": 65_535, "float32": 1}
FLAT = 1e-4  # smallest contrast that is stretched to black and white, so that noise does not become a picture


class Pixels(NamedTuple):
    """How stored values become pixels, the same for all images of a run."""

    channels: int
    dtype: str = "uint8"  # of canvases and crops, a key of WHITE
    range: tuple[float, float] = (0.0, 0.0)  # stored values that become black and white; both 0: as the dtype implies
    shown: tuple[int, ...] = (0, 1, 2)  # channels that pictures show as red, green and blue

    @classmethod
    def of_config(cls, config: Any) -> "Pixels":
        """Reads model.in_channels, data.dtype, data.range and data.shown of a training config."""
        low, high = config.data.range
        return cls(config.model.in_channels, config.data.dtype, (low, high), tuple(config.data.shown))


def to_unit(images: Any) -> Any:
    """Pixels of any dtype of WHITE -> float32, black 0 and white 1. NumPy stays on the host, JAX on the device."""
    return images.astype(np.float32) / WHITE[images.dtype.name]


def to_levels(images: Any) -> Any:
    """Like `to_unit`, but white is 255, the level for which photometric operations are defined."""
    white = WHITE[images.dtype.name]
    images = images.astype(np.float32)
    return images if white == 255 else images * np.float32(255 / white)


def to_rgb(images: np.ndarray, shown: tuple[int, ...], reference: np.ndarray | None = None) -> np.ndarray:
    """Makes pixels [..., H, W, C] visible: uint8 [..., H, W, 3].

    Gray and RGB of 8 bits stay as they are. Of any other image, the three channels `shown` become red, green and blue,
    or the first becomes gray if there are only two. Each is stretched so that 2% of its pixels in the `reference`, by
    default the images themselves, are black and 2% are white, because deep images often fill a small part of the range.
    """
    count = images.shape[-1]
    if images.dtype == np.uint8 and count in (1, 3):
        return np.broadcast_to(images, (*images.shape[:-1], 3))
    chosen = list(shown) if count >= 3 else [0]
    unit, seen = (to_unit(one[..., chosen]) for one in (images, images if reference is None else reference))
    low, high = np.percentile(seen.reshape(-1, len(chosen)), (2, 98), axis=0)
    stretched = np.clip((unit - low) / np.maximum(high - low, FLAT), 0, 1)
    return np.broadcast_to(np.round(stretched * 255).astype(np.uint8), (*images.shape[:-1], 3))
