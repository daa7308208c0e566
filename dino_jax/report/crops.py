"""Crops as a recipe makes them of a source's images."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont

from dino_jax.data.multicrop import Crops, multicrop
from dino_jax.data.pipeline import Batch, train_batches
from dino_jax.data.pixels import Pixels, to_rgb
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
        pixels=Pixels.of_config(config),
        seed=config.seed,
    ) as batches:
        batch = next(batches)
    keys = image_keys(config.seed, jnp.int32(0), jnp.asarray(batch.position))[:, 0]
    data = config.data
    crop = jax.jit(partial(multicrop, crops=config.crops, mean=data.mean, std=data.std, dtype=jnp.float32))
    return batch, crop(keys, batch.canvas, batch.size)


def picture(batch: Batch, crops: Crops, data: ConfigDict) -> Image.Image:
    """Draws one row per image: canvas, global crops, local crops, each as large as a global crop.

    data: the section `config.data`. Deep images and those with other than 1 or 3 channels are drawn as by `to_rgb`.
    """
    side = max(crops.global_crops.shape[2], MIN_TILE)
    columns = [("canvas", batch.canvas)]
    for name, group in (("global", crops.global_crops), ("local", crops.local_crops)):
        unit = np.clip(np.asarray(group) * data.std + data.mean, 0, 1).astype(np.float32)
        levels = unit if data.dtype != "uint8" else np.round(unit * 255).astype(np.uint8)
        columns += [(name, levels[:, view]) for view in range(levels.shape[1])]

    used = [canvas[: int(h), : int(w)] for canvas, (h, w) in zip(batch.canvas, batch.size, strict=True)]
    step = side + GAP
    sheet = Image.new("RGB", (GAP + step * len(columns), LABEL_HEIGHT + step * len(batch.canvas)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(LABEL_HEIGHT // 2)
    for column, (name, images) in enumerate(columns):
        left = GAP + step * column
        draw.text((left, LABEL_HEIGHT // 2), f"{name} {images.shape[1]}", "black", font, anchor="lm")
        for row, image in enumerate(images):
            tile = np.ascontiguousarray(to_rgb(image, tuple(data.shown), used[row]))
            # Canvases are shrunk smoothly. Small crops are enlarged by repeating pixels, so that each pixel is visible.
            method = Image.Resampling.BICUBIC if tile.shape[0] > side else Image.Resampling.NEAREST
            sheet.paste(Image.fromarray(tile).resize((side, side), method), (left, LABEL_HEIGHT + step * row))
    return sheet
