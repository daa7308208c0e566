"""Overlap of attention heads with objects: the paper's probe on PASCAL VOC 2012 (figure 4).

The code of the figure was not released. The first author describes it in issue 54 of the reference: each object counts
with the head that covers it best, each image with the mean of its objects, and images are averaged. We chose the rest:
objects are the instances of SegmentationObject; pixels marked void belong to no object, but reduce the score of a mask
that covers them; images keep their size, cut to whole patches, and so do the objects.
"""

import time
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from dino_jax.data.pixels import Pixels, to_rgb
from dino_jax.errors import UserError
from dino_jax.evals.attention import attention_maps, best_heads, mass_masks, sheet_row
from dino_jax.evals.common.images import (
    contact_sheet,
    crop_to_patches,
    normalize_images,
    patch_size,
    read_image,
    upsample,
)
from dino_jax.evals.common.label_maps import read_labels
from dino_jax.limits import COUNT_OR_NONE, Above
from dino_jax.progress import progress
from dino_jax.weights.backbone import Backbone

VOID = 255  # label of outlines and of undecided pixels


LIMITS = {"mass": Above(0, 1), "rows": COUNT_OR_NONE}


def default_config() -> ml_collections.ConfigDict:
    """Every knob of `dino-jax evaluate attention_jaccard`."""
    return ml_collections.ConfigDict(
        {
            "data": "",  # the folder of VOC, such as VOCdevkit/VOC2012
            "split": "val",  # a list in ImageSets/Segmentation
            "mass": 0.6,  # share of a head's attention that its mask keeps
            "rows": 12,  # number of images in the picture
        }
    )


def run(backbone: Backbone, config: ml_collections.ConfigDict, out: Path) -> dict[str, Any]:
    """Scores the best head's mask of each object, prints a table and draws the first images to `out`/objects.png.

    Images are processed one by one; each new size is compiled once.

    Returns:
        The content of results.json: {"figures": {"jaccard", "jaccard_objects"}, "settings", "images", "objects",
        "seconds", "images_per_second"}. Figures are means of the Jaccard index in percent: "jaccard" is averaged over
        the objects of an image, then over images, as in the paper; "jaccard_objects" over all objects. Images without
        an object are skipped.

    Raises:
        UserError: the layout is not that of VOC, an image is unreadable or has another size than its annotation, there
            are no objects, or the backbone has no attention.
    """
    start, patch, pixels = time.monotonic(), patch_size(backbone), backbone.pixels
    names = image_names(config.data, config.split)
    scores: list[np.ndarray] = []
    rows: list[dict[str, np.ndarray]] = []
    for name in progress(names, len(names), config.split):
        image, labels = read_example(Path(config.data), name, pixels)
        image, labels = crop_to_patches(image, patch), crop_to_patches(labels[..., None], patch)[..., 0]
        objects = labels == np.setdiff1d(labels, [0, VOID])[:, None, None]
        if not len(objects):
            continue
        maps = attention_maps(backbone, normalize_images(backbone, image[None]))[0]
        masks = upsample(mass_masks(maps, config.mass), patch)
        heads, jaccard = best_heads(np.broadcast_to(masks, (len(objects), *masks.shape)), objects)
        scores.append(jaccard)
        if len(rows) < config.rows:
            rows.append(sheet_row(to_rgb(image, pixels.shown), maps, masks[heads[objects.sum((1, 2)).argmax()]]))
    if not scores:
        raise UserError(
            f"--config.split={config.split}: no object in any of its {len(names):,} images: give another list"
        )
    if rows:
        contact_sheet(rows, out / "objects.png")
    figures = {
        "jaccard": 100 * float(np.mean([one.mean() for one in scores])),
        "jaccard_objects": 100 * float(np.concatenate(scores).mean()),
    }
    objects_seen, seconds = sum(map(len, scores)), time.monotonic() - start
    print(f"{len(scores):,} images, {objects_seen:,} objects: Jaccard index of the best head, percent")
    print(f"{'mean over images (the paper)':<30} {figures['jaccard']:6.2f}")
    print(f"{'mean over objects':<30} {figures['jaccard_objects']:6.2f}")
    return {
        "figures": figures,
        "settings": config.to_dict(),
        "images": len(scores),
        "objects": objects_seen,
        "seconds": round(seconds, 1),
        "images_per_second": round(len(scores) / seconds, 2),
    }


def image_names(root: str, split: str) -> list[str]:
    """Returns the names in one of VOC's lists. Raises UserError if it is empty or a part of the layout is missing."""
    if not root:
        raise UserError("--config.data is empty: set it to VOC's own folder, such as VOCdevkit/VOC2012")
    listing = Path(root) / "ImageSets" / "Segmentation" / f"{split}.txt"
    for needed in (Path(root) / "JPEGImages", Path(root) / "SegmentationObject", listing):
        if not needed.exists():
            raise UserError(f"--config.data={root} is not VOC's folder: {needed.relative_to(root)} is missing there")
    if names := listing.read_text().split():
        return names
    raise UserError(f"--config.split={split}: {listing} is empty")


def read_example(root: Path, name: str, pixels: Pixels) -> tuple[np.ndarray, np.ndarray]:
    """Reads an image [H, W, channels], and its instances, uint8 [H, W]: 0 background, 1.. objects, 255 void."""
    image = read_image(root / "JPEGImages" / f"{name}.jpg", pixels, "--config.data")
    path = root / "SegmentationObject" / f"{name}.png"
    labels = read_labels(path, "--config.data")
    if labels.shape != image.shape[:2]:
        sizes = " instead of ".join(f"{width} x {height}" for height, width in (labels.shape, image.shape[:2]))
        raise UserError(f"--config.data: {path} has {sizes} pixels, the size of its image: copy both again")
    return image, labels
