"""Self-attention of the CLS token in the last block: pictures, masks of each head, overlap with objects."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from PIL import Image

from dino_jax import atomic
from dino_jax.data.decoding import decode
from dino_jax.data.pixels import to_rgb
from dino_jax.errors import UserError
from dino_jax.evals.common.images import (
    contact_sheet,
    crop_to_patches,
    fit_to_patches,
    heatmap,
    image_paths,
    map_images,
    normalize_images,
    patch_size,
    read_image,
    resize,
    upsample,
)
from dino_jax.evals.common.video import read_video, write_video
from dino_jax.limits import COUNT, Above
from dino_jax.progress import progress
from dino_jax.weights.backbone import Backbone

MASK_COLOR = np.array((255, 60, 60), np.uint8)


LIMITS = {"size": (0, 16_384), "mass": Above(0, 1), "batch_size": COUNT}


def default_config() -> ml_collections.ConfigDict:
    """Every knob of `dino-jax evaluate attention`."""
    return ml_collections.ConfigDict(
        {
            "images": "",  # an image file, several separated by commas, or a folder
            "video": "",  # or a video file (pip install 'dino_jax[video]')
            "size": 480,  # pixels of the longer side; 0 keeps the size of the image
            "mass": 0.6,  # share of the attention that the masks keep
            "batch_size": 4,  # frames of a video in a batch
        }
    )


def run(backbone: Backbone, config: ml_collections.ConfigDict, out: Path) -> dict[str, Any]:
    """Draws the attention for images of any shape, or for a video.

    Writes NNN_NAME.png for each image, with the image, the mean attention, the attention of each head, and the mask.
    The folder NNN_NAME has the same tiles as single files in full size. For a video, writes NAME_attention.mp4 with the
    mean attention blended over the frames.

    Returns:
        The content of results.json: {"pictures": [paths], "settings", "images", "seconds", "images_per_second"}.

    Raises:
        UserError: an image or video is missing, unreadable or smaller than a patch, or the backbone has no attention.
    """
    start = time.monotonic()
    if config.images and config.video:
        raise UserError("--config.images and --config.video are both set: give one of them")
    pictures, images = (_draw_video if config.video else _draw_pictures)(backbone, config, out)
    seconds = time.monotonic() - start
    return {
        "pictures": pictures,
        "settings": config.to_dict(),
        "images": images,
        "seconds": round(seconds, 1),
        "images_per_second": round(images / seconds, 2),
    }


def _draw_pictures(backbone: Backbone, config: ml_collections.ConfigDict, out: Path) -> tuple[list[str], int]:
    """Returns the paths of the sheets and the number of images."""
    patch, pixels = patch_size(backbone), backbone.pixels
    written: list[str] = []
    for path in image_paths(config.images):
        image = fit_to_patches(read_image(path, pixels, "--config.images"), config.size, patch, path)
        maps = attention_maps(backbone, normalize_images(backbone, image[None]))[0]
        tiles = sheet_row(to_rgb(image, pixels.shown), maps, upsample(mass_masks(maps.mean(0), config.mass), patch))
        folder = out / f"{len(written):03d}_{path.stem}"
        for title, tile in tiles.items():
            picture = Image.fromarray(np.ascontiguousarray(tile))
            atomic.write_picture(folder / f"{title.replace(' ', '')}.png", picture)
        target = out / f"{folder.name}.png"  # not with_suffix, because a name may contain dots
        contact_sheet([tiles], target, tile=240)
        print(f"{path} -> {target}")
        written.append(str(target))
    return written, len(written)


def _draw_video(backbone: Backbone, config: ml_collections.ConfigDict, out: Path) -> tuple[list[str], int]:
    """Returns the path of the video and the number of its frames. Holds only a few frames in memory."""
    if config.batch_size < 1:
        raise UserError(f"batch_size {config.batch_size}: set --config.batch_size to 1 or more")
    patch, pixels, path = patch_size(backbone), backbone.pixels, Path(config.video)
    video, target, done = read_video(path), out / f"{path.stem}_attention.mp4", 0
    frames = progress(video.frames, video.length, path.name, "frames")
    images = (fit_to_patches(decode(frame, pixels), config.size, patch, path) for frame in frames)
    with write_video(target, video.rate) as write:
        for image, maps in map_images(images, attention_maps, backbone, config.batch_size):
            write(overlay(to_rgb(image, pixels.shown), maps))
            done += 1
    print(f"{path} -> {target}")
    return [str(target)], done


def attention_maps(backbone: Backbone, images: jax.Array | np.ndarray) -> np.ndarray:
    """Returns the attention of CLS to the patches in the last block, float32 [B, heads, H/patch, W/patch].

    Takes normalized images [B, H, W, C] whose sides are multiples of the patch size. A map sums to a little less than
    1, because the attention of CLS to itself and to registers is left out.

    Raises:
        UserError: the backbone has no attention between patches.
    """
    patch = patch_size(backbone)
    if not backbone.family.attention_maps:
        raise UserError(f"{backbone.config['arch']} has no attention between patches: use a vision transformer")
    rows, columns = images.shape[1] // patch, images.shape[2] // patch
    attention = np.asarray(_cls_attention(backbone.model.apply, backbone.variables, images, rows * columns))
    return attention.reshape(*attention.shape[:2], rows, columns)


@partial(jax.jit, static_argnums=(0, 3))
def _cls_attention(apply_fn: Callable[..., Any], variables: Any, images: jax.Array, patches: int) -> jax.Array:
    return apply_fn(variables, images, method="last_attention")[:, :, 0, -patches:]


def mass_masks(maps: np.ndarray, mass: float = 0.6) -> np.ndarray:
    """Returns the patches with the given share of the mass of each map, float [..., h, w] -> bool [..., h, w].

    As in the reference, the weakest patches are removed as long as their sum is at most 1 - mass.
    """
    flat = maps.reshape(*maps.shape[:-2], -1).astype(np.float64)
    order = np.argsort(flat, axis=-1, kind="stable")
    ascending = np.take_along_axis(flat, order, -1)
    keep = np.cumsum(ascending, -1) > (1 - mass) * ascending.sum(-1, keepdims=True)
    masks = np.empty_like(keep)
    np.put_along_axis(masks, order, keep, -1)
    return masks.reshape(maps.shape)


def best_heads(masks: np.ndarray, objects: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the head whose mask matches each object best, int [B], and its Jaccard index [B].

    The Jaccard index is intersection / union of the pixels, 0 if both are empty.

    Args:
        masks: bool [B, heads, H, W].
        objects: bool [B, H, W].
    """
    objects = objects[:, None]
    shared = (masks & objects).sum((2, 3))
    scores = shared / np.maximum((masks | objects).sum((2, 3)), 1)
    return scores.argmax(1), scores.max(1)


def evaluate_masks(
    backbone: Backbone,
    images: np.ndarray,
    objects: np.ndarray,
    sheet: Path | None = None,
    *,
    upscale: int = 1,
    mass: float = 0.6,
    rows: int = 12,
    batch_size: int = 64,
) -> float:
    """Evaluates the attention as a segmentation: returns the mean Jaccard index of the best head, in 0..1.

    Args:
        backbone: a vision transformer.
        images: uint8 [B, H, W, C].
        objects: bool [B, H, W], the true masks.
        sheet: path of a picture of the first images with attention and the best head's mask; not written if None.
        upscale: factor by which images are enlarged (bicubic) first, for a finer grid of patches.
        mass: share of the attention that a mask keeps.
        rows: number of images in the picture.
        batch_size: images in a batch.
    """
    patch = patch_size(backbone)
    H, W = images.shape[1] * upscale, images.shape[2] * upscale
    enlarged = crop_to_patches(np.stack([resize(image, H, W) for image in images]), patch)
    objects = upsample(objects, upscale)[:, : enlarged.shape[1], : enlarged.shape[2]]
    maps = np.stack([one for _, one in map_images(enlarged, attention_maps, backbone, batch_size)])
    masks = upsample(mass_masks(maps, mass), patch)
    best, scores = best_heads(masks, objects)
    if sheet is not None:
        shown = range(min(rows, len(images)))
        contact_sheet(
            [sheet_row(to_rgb(enlarged[i], backbone.pixels.shown), maps[i], masks[i, best[i]]) for i in shown], sheet
        )
    return float(scores.mean())


def sheet_row(image: np.ndarray, maps: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Returns a row of a sheet, {title: uint8 [H, W, 3]}: image, mean attention, attention of each head, and mask.

    Args:
        image: uint8 [H, W, 3].
        maps: float [heads, h, w], where H and W are multiples of h and w.
        mask: bool [H, W].
    """
    factor = len(mask) // maps.shape[1]
    heads = {f"head {i + 1}": heatmap(upsample(one, factor)) for i, one in enumerate(maps)}
    # Tinted rather than cut out, so that a mask over a black background is visible too.
    tinted = np.where(mask[..., None], image // 2 + MASK_COLOR // 2, image)
    return {"image": image, "mean": overlay(image, maps), **heads, "mask": tinted}


def overlay(image: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Blends the mean of the maps, float [heads, h, w], over the image, uint8 [H, W, 3] -> uint8 [H, W, 3]."""
    warm = heatmap(upsample(maps.mean(0), len(image) // maps.shape[1]))
    return (0.4 * image + 0.6 * warm).astype(np.uint8)
