"""What the last block's CLS token looks at, head by head: pictures, masks, and how well they cover known objects."""

import time
from functools import partial
from pathlib import Path

import jax
import ml_collections
import numpy as np
from PIL import Image

from dino_jax.data.decoding import decode
from dino_jax.errors import UserError
from dino_jax.evals.common.pictures import (
    as_rgb,
    contact_sheet,
    cut,
    each_of,
    fitted,
    heat,
    normalized,
    patch_size,
    picture_paths,
    read_picture,
    resized,
    upsample,
)
from dino_jax.evals.common.video import read_video, write_video
from dino_jax.progress import progress
from dino_jax.weights.backbone import Backbone

MASK_COLOR = np.array((255, 60, 60), np.uint8)


def default_config() -> ml_collections.ConfigDict:
    """Every knob of `python evaluate.py attention`."""
    return ml_collections.ConfigDict(
        {
            "images": "",  # a picture, several with commas between, or a folder
            "video": "",  # or a video file (needs PyAV: pip install av)
            "size": 480,  # pixels of the longer side; 0 keeps the picture's own size
            "mass": 0.6,  # share of the attention that the masks keep
            "batch_size": 4,  # frames of a video at a time
        }
    )


def run(backbone: Backbone, config: ml_collections.ConfigDict, out: Path) -> dict:
    """Draws the attention of pictures of any shape, or of a video.

    Writes NNN_NAME.png for each picture: the image, its mean attention, each head's, and the mask; and the same tiles
    one by one, in full size, to the folder NNN_NAME. A video gives NAME_attention.mp4, the mean attention over it.

    Returns what belongs into results.json: {"pictures": [paths], "settings", "images", "seconds", "images_per_second"}.
    Raises UserError: no such picture or video, one that can't be read or is smaller than a patch, or a backbone without
    attention.
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
    """The sheets written, and the number of images."""
    patch, channels = patch_size(backbone), backbone.config["in_channels"]
    written: list[str] = []
    for path in picture_paths(config.images):
        image = fitted(read_picture(path, channels, "--config.images"), config.size, patch, path)
        maps = attention_maps(backbone, normalized(backbone, image[None]))[0]
        tiles = picture_row(image, maps, upsample(mass_masks(maps.mean(0), config.mass), patch))
        folder = out / f"{len(written):03d}_{path.stem}"
        folder.mkdir(parents=True, exist_ok=True)
        for title, tile in tiles.items():
            Image.fromarray(np.ascontiguousarray(tile)).save(folder / f"{title.replace(' ', '')}.png")
        target = out / f"{folder.name}.png"  # not with_suffix: names may hold dots
        contact_sheet([tiles], target, tile=240)
        print(f"{path} -> {target}")
        written.append(str(target))
    return written, len(written)


def _draw_video(backbone: Backbone, config: ml_collections.ConfigDict, out: Path) -> tuple[list[str], int]:
    """The video written, and the number of its frames. A few frames are in memory at a time."""
    if config.batch_size < 1:
        raise UserError(f"batch_size {config.batch_size}: set --config.batch_size to 1 or more")
    patch, channels, path = patch_size(backbone), backbone.config["in_channels"], Path(config.video)
    video, target, done = read_video(path), out / f"{path.stem}_attention.mp4", 0
    frames = progress(video.frames, video.length, path.name, "frames")
    images = (fitted(decode(frame, channels), config.size, patch, path) for frame in frames)
    with write_video(target, video.rate) as write:
        for image, maps in each_of(images, attention_maps, backbone, config.batch_size):
            write(overlay(image, maps))
            done += 1
    print(f"{path} -> {target}")
    return [str(target)], done


def attention_maps(backbone: Backbone, images: jax.Array | np.ndarray) -> np.ndarray:
    """Normalized images [B, H, W, C], sides multiples of the patch -> float32 [B, heads, H/patch, W/patch].

    Row 0 of the last block's self-attention without CLS to itself, so that a map's sum is a little below 1.

    Raises:
        UserError: the backbone is a convnet.
    """
    patch = patch_size(backbone)
    attention = np.asarray(_cls_attention(backbone.model.apply, backbone.variables, images))
    return attention.reshape(*attention.shape[:2], images.shape[1] // patch, images.shape[2] // patch)


@partial(jax.jit, static_argnums=0)
def _cls_attention(apply_fn, variables, images):
    return apply_fn(variables, images, method="last_attention")[:, :, 0, 1:]


def mass_masks(maps: np.ndarray, mass: float = 0.6) -> np.ndarray:
    """Float [..., h, w] -> bool [..., h, w]: the patches that hold the given share of each map's mass.

    As the reference: the weakest patches go while their sum stays within 1 - mass, so at least `mass` is kept.
    """
    flat = maps.reshape(*maps.shape[:-2], -1).astype(np.float64)
    order = np.argsort(flat, axis=-1, kind="stable")
    ascending = np.take_along_axis(flat, order, -1)
    keep = np.cumsum(ascending, -1) > (1 - mass) * ascending.sum(-1, keepdims=True)
    masks = np.empty_like(keep)
    np.put_along_axis(masks, order, keep, -1)
    return masks.reshape(maps.shape)


def best_heads(masks: np.ndarray, objects: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which head's mask [B, heads, H, W] covers each object [B, H, W] best -> head int [B], Jaccard index [B].

    The Jaccard index is intersection / union of the pixels (0 where both are empty). Both inputs are bool.
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
    """How well the attention segments images whose objects are known: mean Jaccard index of the best head, in 0..1.

    Args:
        backbone: a vision transformer.
        images: uint8 [B, H, W, C].
        objects: bool [B, H, W], the exact masks.
        sheet: where to write a picture of the first images: image, attention, best head's mask; none by default.
        upscale: images are enlarged this many times (bicubic) first, so that the grid of patches is finer.
        mass: share of the attention that a mask keeps.
        rows: number of images on the sheet.
        batch_size: images at a time.
    """
    patch = patch_size(backbone)
    H, W = images.shape[1] * upscale, images.shape[2] * upscale
    enlarged = cut(np.stack([resized(image, H, W) for image in images]), patch)
    objects = upsample(objects, upscale)[:, : enlarged.shape[1], : enlarged.shape[2]]
    maps = np.stack([one for _, one in each_of(enlarged, attention_maps, backbone, batch_size)])
    masks = upsample(mass_masks(maps, mass), patch)
    best, scores = best_heads(masks, objects)
    if sheet is not None:
        shown = range(min(rows, len(images)))
        contact_sheet([picture_row(enlarged[i], maps[i], masks[i, best[i]]) for i in shown], sheet)
    return float(scores.mean())


def picture_row(image: np.ndarray, maps: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """A sheet's row, {title: uint8 [H, W, 3]}: image, mean attention over it, each head's map, what the mask keeps.

    Args:
        image: uint8 [H, W, C], shown by `as_rgb`.
        maps: float [heads, h, w], with H and W multiples of h and w.
        mask: bool [H, W].
    """
    shown, factor = as_rgb(image), len(mask) // maps.shape[1]
    heads = {f"head {i + 1}": heat(upsample(one, factor)) for i, one in enumerate(maps)}
    # Colored rather than cut out: what is kept of a black background shows too.
    kept = np.where(mask[..., None], shown // 2 + MASK_COLOR // 2, shown)
    return {"image": shown, "mean": overlay(image, maps), **heads, "mask": kept}


def overlay(image: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Uint8 [H, W, C] and float [heads, h, w] -> uint8 [H, W, 3]: the image under the mean of its maps."""
    warm = heat(upsample(maps.mean(0), len(image) // maps.shape[1]))
    return (0.4 * as_rgb(image) + 0.6 * warm).astype(np.uint8)
