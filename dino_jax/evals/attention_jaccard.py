"""How well the heads of the last block outline objects nobody showed them: the paper's probe on PASCAL VOC 2012.

The figure of the paper's Fig. 4. Its code was not released; its first author describes it in the reference's issue 54:
an object counts with the head that covers it best, an image with the mean of its objects, and images are averaged. What
is left open is set so: objects are the instances of SegmentationObject; pixels marked void belong to no object, but a
mask that holds them pays for them; images keep their own size, cut to whole patches (as do the objects).
"""

import time
from pathlib import Path

import ml_collections
import numpy as np

from dino_jax.errors import UserError
from dino_jax.evals.attention import attention_maps, best_heads, mass_masks, picture_row
from dino_jax.evals.common.label_maps import read_labels
from dino_jax.evals.common.pictures import contact_sheet, cut, normalized, patch_size, read_picture, upsample
from dino_jax.progress import progress
from dino_jax.weights.backbone import Backbone

VOID = 255  # the label of outlines and of what annotators left undecided


def default_config() -> ml_collections.ConfigDict:
    """Every knob of `python evaluate.py attention_jaccard`."""
    return ml_collections.ConfigDict(
        {
            "data": "",  # VOC's own folder, such as VOCdevkit/VOC2012
            "split": "val",  # a list in ImageSets/Segmentation
            "mass": 0.6,  # share of a head's attention that its mask keeps
            "rows": 12,  # images on the sheet
        }
    )


def run(backbone: Backbone, config: ml_collections.ConfigDict, out: Path) -> dict:
    """Scores the best head's mask of each object, prints a table and draws the first images on `out`/objects.png.

    Images are computed one by one; each new size is compiled once.

    Returns what belongs into results.json: {"figures": {"jaccard", "jaccard_objects"}, "settings", "images", "objects",
    "seconds", "images_per_second"}. Figures are means of the Jaccard index in percent: "jaccard" over images of the
    mean over an image's objects (the paper's), "jaccard_objects" over all objects alike. Images without an object are
    left out.

    Raises:
        UserError: the layout is not VOC's, a picture can't be read or is not of its annotation's size, no objects at
            all, or a backbone without attention.
    """
    start, patch, channels = time.monotonic(), patch_size(backbone), backbone.config["in_channels"]
    names = image_names(config.data, config.split)
    scores: list[np.ndarray] = []
    rows: list[dict[str, np.ndarray]] = []
    for name in progress(names, len(names), config.split):
        image, labels = read_example(Path(config.data), name, channels)
        image, labels = cut(image, patch), cut(labels[..., None], patch)[..., 0]
        objects = labels == np.setdiff1d(labels, [0, VOID])[:, None, None]
        if not len(objects):
            continue
        maps = attention_maps(backbone, normalized(backbone, image[None]))[0]
        masks = upsample(mass_masks(maps, config.mass), patch)
        heads, jaccard = best_heads(np.broadcast_to(masks, (len(objects), *masks.shape)), objects)
        scores.append(jaccard)
        if len(rows) < config.rows:
            rows.append(picture_row(image, maps, masks[heads[objects.sum((1, 2)).argmax()]]))
    if not scores:
        raise UserError(
            f"--config.split={config.split}: not one object in its {len(names):,} images: give another list"
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
    """The names in one of VOC's lists; UserError if it is empty or not VOC's layout, naming what is missing."""
    if not root:
        raise UserError("--config.data is empty: set it to VOC's own folder, such as VOCdevkit/VOC2012")
    listing = Path(root) / "ImageSets" / "Segmentation" / f"{split}.txt"
    for needed in (Path(root) / "JPEGImages", Path(root) / "SegmentationObject", listing):
        if not needed.exists():
            raise UserError(f"--config.data={root} is not VOC's folder: {needed.relative_to(root)} is missing there")
    if names := listing.read_text().split():
        return names
    raise UserError(f"--config.split={split}: {listing} is empty")


def read_example(root: Path, name: str, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """An image, uint8 [H, W, channels], and its instances, uint8 [H, W]: 0 background, 1.. objects, 255 void."""
    image = read_picture(root / "JPEGImages" / f"{name}.jpg", channels, "--config.data")
    path = root / "SegmentationObject" / f"{name}.png"
    labels = read_labels(path, "--config.data")
    if labels.shape != image.shape[:2]:
        sizes = " instead of ".join(f"{width} x {height}" for height, width in (labels.shape, image.shape[:2]))
        raise UserError(f"--config.data: {path} has {sizes} pixels, its image's size: copy both again")
    return image, labels
