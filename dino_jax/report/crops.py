"""Crops as a recipe makes them of a source's images."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont

from dino_jax.data.multicrop import Crops, multicrop
from dino_jax.data.pipeline import Batch, train_batches
from dino_jax.data.sources import open_source
from dino_jax.errors import UserError
from dino_jax.training.config_checks import check_config
from dino_jax.training.step import image_keys

# Pixels: gap between tiles, height of the labels, and smallest side of a tile (labels need the width).
GAP, LABEL_HEIGHT, MIN_TILE = 4, 24, 96


def load_crops(config: ConfigDict, images: int) -> tuple[Batch, Crops]:
    """Returns the first `images` images of the config's first step as canvases, and their crops (float32)."""
    check_config(config, devices=1)
    source = open_source(config.data.source)
    if not 0 < images <= len(source):
        raise UserError(
            f"--images={images}: config.data.source has {len(source)} images, set --images to 1 or more, "
            f"at most {len(source)}"
        )
    with train_batches(
        source,
        batch_size=images,
        canvas_size=config.data.canvas_size,
        channels=config.model.in_channels,
        white=config.data.white,
        seed=config.seed,
    ) as batches:
        batch = next(batches)
    keys = image_keys(config.seed, jnp.int32(0), jnp.asarray(batch.position))[:, 0]
    data = config.data
    crop = jax.jit(partial(multicrop, crops=config.crops, mean=data.mean, std=data.std, dtype=jnp.float32))
    return batch, crop(keys, batch.canvas, batch.size)


def picture(canvas: np.ndarray, crops: Crops, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """Draws one row per image: canvas uint8 `[S, S, C]`, global crops, local crops, each as large as a global crop.

    Shows the first three channels of images with more than three, and the first channel of images with two.
    """
    side = max(crops.global_crops.shape[2], MIN_TILE)
    columns = [("canvas", canvas)]
    for name, group in (("global", crops.global_crops), ("local", crops.local_crops)):
        levels = np.clip(np.round((np.asarray(group) * std + mean) * 255.0), 0, 255).astype(np.uint8)
        columns += [(name, levels[:, view]) for view in range(levels.shape[1])]

    step = side + GAP
    sheet = Image.new("RGB", (GAP + step * len(columns), LABEL_HEIGHT + step * len(canvas)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(LABEL_HEIGHT // 2)
    for column, (name, images) in enumerate(columns):
        left = GAP + step * column
        draw.text((left, LABEL_HEIGHT // 2), f"{name} {images.shape[1]}", "black", font, anchor="lm")
        for row, image in enumerate(images):
            tile = image[..., :3] if image.shape[-1] >= 3 else image[..., 0]
            # Canvases are shrunk smoothly. Small crops are enlarged by repeating pixels, so that each pixel is visible.
            method = Image.Resampling.BICUBIC if tile.shape[0] > side else Image.Resampling.NEAREST
            sheet.paste(Image.fromarray(tile).resize((side, side), method), (left, LABEL_HEIGHT + step * row))
    return sheet
