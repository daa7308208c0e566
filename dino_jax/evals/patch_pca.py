"""Principal components of patch tokens: the first three as red, green and blue."""

import time
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from PIL import Image

from dino_jax import atomic
from dino_jax.data.pixels import to_rgb
from dino_jax.errors import UserError
from dino_jax.evals.common.images import (
    contact_sheet,
    fit_to_patches,
    heatmap,
    image_paths,
    normalize_images,
    patch_grid,
    patch_size,
    read_image,
    upsample,
)
from dino_jax.evals.common.pca import principal_components
from dino_jax.limits import PIXELS
from dino_jax.weights.backbone import Backbone

LIMITS = {"size": (0, 16_384), "tile": PIXELS}


def default_config() -> ml_collections.ConfigDict:
    """Every knob of `dino-jax evaluate patch_pca`."""
    return ml_collections.ConfigDict(
        {
            "images": "",  # an image file, several separated by commas, or a folder
            "size": 480,  # pixels of the longer side; 0 keeps the size of the image
            "together": True,  # compute the components over all images, so that colors are comparable between them
            "tile": 240,  # pixels of the longer side of an image in the overview
        }
    )


def run(backbone: Backbone, config: ml_collections.ConfigDict, out: Path) -> dict[str, Any]:
    """Draws images of any shape beside the components of their patch tokens, together and one by one.

    Writes patch_pca.png, with a row per image, and NNN_NAME.png for each image, with the colors alone at its size.

    Returns:
        The content of results.json: {"figures": {"explained": shares of the variance, a list for each set of
        components}, "pictures": [paths], "settings", "images", "seconds", "images_per_second"}.

    Raises:
        UserError: an image is missing, unreadable or smaller than a patch, or the backbone has no patches.
    """
    start, patch, pixels = time.monotonic(), patch_size(backbone), backbone.pixels
    if config.tile < 1:
        raise UserError(f"tile {config.tile}: set --config.tile to 1 or more pixels")
    paths = image_paths(config.images)
    images = [fit_to_patches(read_image(path, pixels, "--config.images"), config.size, patch, path) for path in paths]
    tokens = [np.asarray(patch_grid(backbone, normalize_images(backbone, image[None])))[0] for image in images]
    sets = [tokens] if config.together else [[one] for one in tokens]
    found = [patch_components(one) for one in sets]
    pictures = [components for one, _ in found for components in one]
    explained = [[round(float(share), 4) for share in shares] for _, shares in found]
    rows: list[dict[str, np.ndarray]] = []
    written: list[str] = []
    for path, image, components in zip(paths, images, pictures, strict=True):
        enlarged = upsample(np.moveaxis(components, -1, 0), patch)
        colors = (255 * np.moveaxis(enlarged, 0, -1)).astype(np.uint8)
        single = {f"component {i + 1}": heatmap(one) for i, one in enumerate(enlarged)}
        rows.append({"image": to_rgb(image, pixels.shown), "components 1-3": colors} | single)
        target = out / f"{len(written):03d}_{path.stem}.png"
        atomic.write_picture(target, Image.fromarray(colors))
        written.append(str(target))
    sheet = out / "patch_pca.png"
    contact_sheet(rows, sheet, tile=config.tile)
    print(f"{'components of':>30} {'1':>6} {'2':>6} {'3':>6}  percent of the variance")
    names = ["all pictures"] if config.together else [path.name for path in paths]
    for name, of_all in zip(names, explained, strict=True):
        print(f"{name:>30} " + " ".join(f"{100 * share:6.1f}" for share in of_all))
    return {
        "figures": {"explained": explained},
        "pictures": [str(sheet), *written],
        "settings": config.to_dict(),
        "images": len(images),
        "seconds": round(time.monotonic() - start, 1),
        "images_per_second": round(len(images) / (time.monotonic() - start), 2),
    }


def patch_components(tokens: list[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """Computes the components of each image, [h, w, 3] in 0..1, from its patch tokens [h, w, D].

    Returns them with the shares of the variance that they explain [3]. A component is scaled by its 1st and 99th
    percentile over all images, so that a few outliers do not reduce the contrast of the other patches.
    """
    coordinates, shares = principal_components(np.concatenate([one.reshape(-1, one.shape[-1]) for one in tokens]), 3)
    low, high = np.percentile(coordinates, (1, 99), axis=0)
    scaled = np.clip((coordinates - low) / np.maximum(high - low, 1e-12), 0, 1)
    ends = np.cumsum([one.shape[0] * one.shape[1] for one in tokens])[:-1]
    parts = np.split(scaled, ends)
    return [part.reshape(*one.shape[:2], 3) for part, one in zip(parts, tokens, strict=True)], shares
