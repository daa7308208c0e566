"""What patches look alike to a backbone: their first three principal components as red, green and blue."""

import time
from pathlib import Path

import ml_collections
import numpy as np
from PIL import Image

from dino_jax.errors import UserError
from dino_jax.evals.common.pca import principal_components
from dino_jax.evals.common.pictures import (
    as_rgb,
    contact_sheet,
    fitted,
    heat,
    normalized,
    patch_grid,
    patch_size,
    picture_paths,
    read_picture,
    upsample,
)
from dino_jax.weights.backbone import Backbone


def default_config() -> ml_collections.ConfigDict:
    """Every knob of `python evaluate.py patch_pca`."""
    return ml_collections.ConfigDict(
        {
            "images": "",  # a picture, several with commas between, or a folder
            "size": 480,  # pixels of the longer side; 0 keeps the picture's own size
            "together": True,  # one set of components for all pictures: equal colors mean the same in each
            "tile": 240,  # pixels of a picture's longer side on the sheet
        }
    )


def run(backbone: Backbone, config: ml_collections.ConfigDict, out: Path) -> dict:
    """Draws pictures of any shape beside the components of their patch tokens, and each component by itself.

    Writes patch_pca.png, a row a picture, and NNN_NAME.png, the colors alone at the picture's size.

    Returns what belongs into results.json: {"figures": {"explained": [a list a set of components, of the shares of the
    variance]}, "pictures": [paths], "settings", "images", "seconds", "images_per_second"}. Raises UserError: no such
    picture, one that can't be read or is smaller than a patch, or a backbone without patches.
    """
    start, patch, channels = time.monotonic(), patch_size(backbone), backbone.config["in_channels"]
    if config.tile < 1:
        raise UserError(f"tile {config.tile}: set --config.tile to 1 or more pixels")
    paths = picture_paths(config.images)
    images = [fitted(read_picture(path, channels, "--config.images"), config.size, patch, path) for path in paths]
    tokens = [np.asarray(patch_grid(backbone, normalized(backbone, image[None])))[0] for image in images]
    sets = [tokens] if config.together else [[one] for one in tokens]
    found = [patch_components(one) for one in sets]
    pictures = [components for one, _ in found for components in one]
    explained = [[round(float(share), 4) for share in shares] for _, shares in found]
    rows: list[dict[str, np.ndarray]] = []
    written: list[str] = []
    for path, image, components in zip(paths, images, pictures, strict=True):
        enlarged = upsample(np.moveaxis(components, -1, 0), patch)
        colors = (255 * np.moveaxis(enlarged, 0, -1)).astype(np.uint8)
        single = {f"component {i + 1}": heat(one) for i, one in enumerate(enlarged)}
        rows.append({"image": as_rgb(image), "components 1-3": colors} | single)
        target = out / f"{len(written):03d}_{path.stem}.png"
        Image.fromarray(colors).save(target)
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
    """Patch tokens [h, w, D] of some images -> their components [h, w, 3], from 0 to 1, and shares of the variance [3].

    A component's range is that of all the images, without the 1% at either end, so that a few odd patches do not take
    the contrast from the others.
    """
    coordinates, shares = principal_components(np.concatenate([one.reshape(-1, one.shape[-1]) for one in tokens]), 3)
    low, high = np.percentile(coordinates, (1, 99), axis=0)
    scaled = np.clip((coordinates - low) / np.maximum(high - low, 1e-12), 0, 1)
    ends = np.cumsum([one.shape[0] * one.shape[1] for one in tokens])[:-1]
    parts = np.split(scaled, ends)
    return [part.reshape(*one.shape[:2], 3) for part, one in zip(parts, tokens, strict=True)], shares
