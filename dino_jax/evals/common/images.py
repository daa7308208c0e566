"""Images of any size: reading, fitting to patches, mapping through a backbone on all devices, and drawing."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dino_jax import atomic
from dino_jax.data.decoding import DecodeError, decode
from dino_jax.data.pixels import WHITE, Pixels
from dino_jax.data.sources import folder
from dino_jax.distributed.sharding import make_mesh, replicate, shard_batch
from dino_jax.errors import UserError
from dino_jax.weights.backbone import Backbone, normalize

# Matplotlib's colormap "inferno" at eight points: a table, because these pictures must not need matplotlib.
HEAT = np.array(
    [
        (0, 0, 4),
        (40, 11, 84),
        (101, 21, 110),
        (159, 42, 99),
        (212, 72, 66),
        (245, 125, 21),
        (250, 193, 39),
        (252, 255, 164),
    ]
)
GAP = 4  # pixels between the tiles of a sheet


# --- in --------------------------------------------------------------------------------------------------------------


def crop_to_patches(images: np.ndarray, patch: int) -> np.ndarray:
    """Cuts off the rows and columns of [..., H, W, C] beyond the last whole patch."""
    height, width = (side // patch * patch for side in images.shape[-3:-1])
    return images[..., :height, :width, :]


def resize(
    image: np.ndarray, height: int, width: int, method: Image.Resampling = Image.Resampling.BICUBIC
) -> np.ndarray:
    """Resizes pixels [H, W, C] to [height, width, C], any dtype of `WHITE` and any C, with antialiasing."""
    if image.shape[:2] == (height, width):
        return image
    bands = image if image.dtype == np.uint8 else image.astype(np.float32)
    resized = [Image.fromarray(bands[..., c]).resize((width, height), method) for c in range(image.shape[2])]
    stacked = np.stack([np.asarray(band) for band in resized], -1)
    if image.dtype == np.uint8:
        return stacked
    stacked = np.clip(stacked, 0, WHITE[image.dtype.name])
    return stacked if image.dtype == np.float32 else np.round(stacked).astype(image.dtype)


def read_image(path: Path, pixels: Pixels, knob: str) -> np.ndarray:
    """Reads an image file as [H, W, channels], see `decode`. Raises UserError with the knob if it can't."""
    try:
        return decode(folder.read_file(path), pixels)
    except (OSError, DecodeError) as error:
        raise UserError(f"{knob}: {path} can't be read as a picture ({error})") from error


def fit_to_patches(image: np.ndarray, size: int, patch: int, path: Path) -> np.ndarray:
    """Scales the longer side to `size` pixels (0: keeps the size), then cuts to whole patches."""
    scale = size / max(image.shape[:2]) if size else 1
    image = crop_to_patches(resize(image, *(max(1, round(side * scale)) for side in image.shape[:2])), patch)
    if not image.size:
        raise UserError(f"{path} is smaller than a patch of {patch} pixels: raise --config.size")
    return image


def image_paths(images: str) -> list[Path]:
    """Returns the files of a protocol's knob `images`: names separated by commas, or a folder. Raises UserError."""
    whole = Path(images.strip()).expanduser()
    if images.strip() and whole.is_dir():
        return [whole / path for path in folder.image_paths(whole, f"--config.images={images}", nested=False)]
    # A file's own name may have a comma.
    names = [images] if whole.is_file() else images.split(",")
    paths = [Path(name.strip()).expanduser() for name in names if name.strip()]
    if not paths:
        raise UserError("--config.images is empty: set it to a picture, several separated by commas, or a folder")
    for path in paths:
        if not path.is_file():
            raise UserError(f"--config.images: no such picture: {path}")
    return paths


# --- through a backbone -----------------------------------------------------------------------------------------------


def patch_size(backbone: Backbone) -> int:
    """Pixels of a patch's side; UserError for a convnet."""
    if backbone.patch_size is None:
        raise UserError(f"this needs a vision transformer, not {backbone.config['arch']}: see --checkpoint")
    return backbone.patch_size


def normalize_images(backbone: Backbone, images: np.ndarray) -> np.ndarray:
    """Normalizes pixels [B, H, W, C] to float32 as the backbone was trained."""
    as_trained = backbone.card["preprocessing"]
    return normalize(images, as_trained["mean"], as_trained["std"])


def map_images(
    images: Iterable[np.ndarray], function: Callable[..., Any], backbone: Backbone, batch_size: int = 1
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields each image with its row of the result of function(backbone, normalized images [B, H, W, C]).

    Batches are split over the devices of this process; `batch_size` is rounded up to a multiple of their number.

    images: pixels [H, W, C], all of one size; at most a batch of them is held in memory.
    """
    mesh, images = make_mesh().local_mesh, iter(images)
    backbone = dataclasses.replace(backbone, variables=replicate(jax.device_get(backbone.variables), mesh))
    size = -(-batch_size // mesh.size) * mesh.size
    while batch := list(itertools.islice(images, size)):
        # The last batch is padded, so that one compiled program serves all.
        filled = np.stack(batch + batch[-1:] * (size - len(batch)))
        rows = np.asarray(function(backbone, shard_batch(normalize_images(backbone, filled), mesh)))
        yield from zip(batch, rows, strict=False)


def patch_grid(backbone: Backbone, images: jax.Array | np.ndarray) -> jax.Array:
    """Normalized images [B, H, W, C] -> the last block's patch tokens [B, H/patch, W/patch, D].

    Raises UserError for a convnet.
    """
    patch_size(backbone)
    tokens = backbone(images)  # type: ignore[arg-type]
    return tokens.patches.reshape(len(images), *tokens.grid, -1)


# --- out -------------------------------------------------------------------------------------------------------------


def upsample(maps: np.ndarray, factor: int) -> np.ndarray:
    """Repeats each value: [..., h, w] -> [..., h * factor, w * factor]."""
    return maps.repeat(factor, axis=-2).repeat(factor, axis=-1)


def heatmap(values: np.ndarray) -> np.ndarray:
    """Colors float [h, w] from black at the smallest value to pale yellow at the largest, uint8 [h, w, 3]."""
    low, high = values.min(), values.max()
    at = (values - low) / max(high - low, 1e-12) * (len(HEAT) - 1)
    return np.stack([np.interp(at, np.arange(len(HEAT)), channel) for channel in HEAT.T], -1).astype(np.uint8)


def contact_sheet(rows: list[dict[str, np.ndarray]], path: Path, tile: int = 120) -> None:
    """Writes rows of images, {title: uint8 [H, W, 3]}, to one PNG; scales the longer sides to `tile` pixels."""
    atomic.write_picture(path, draw_sheet(rows, tile))


def draw_sheet(rows: list[dict[str, np.ndarray]], tile: int = 120) -> Image.Image:
    """Draws rows of images, {title: uint8 [H, W, 3]}, below the titles of the first row."""
    tiles = [{title: _fit(picture, tile) for title, picture in row.items()} for row in rows]
    widest = max(picture.width for row in tiles for picture in row.values())
    heights = [max(picture.height for picture in row.values()) for row in tiles]
    font, header = ImageFont.load_default(), 14
    size = (len(rows[0]) * (widest + GAP) + GAP, header + sum(heights) + (len(rows) + 1) * GAP)
    sheet = Image.new("RGB", size, "white")
    for column, title in enumerate(rows[0]):
        ImageDraw.Draw(sheet).text((GAP + column * (widest + GAP), 2), title, fill="black", font=font)
    y = header + GAP
    for row, height in zip(tiles, heights, strict=True):
        for column, picture in enumerate(row.values()):
            sheet.paste(picture, (GAP + column * (widest + GAP), y))
        y += height + GAP
    return sheet


def _fit(picture: np.ndarray, tile: int) -> Image.Image:
    height, width = picture.shape[:2]
    scale = tile / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    # Small images are enlarged as squares, because a blurred patch grid would hide how coarse it is.
    method = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BICUBIC
    return Image.fromarray(np.ascontiguousarray(picture)).resize(size, method)
