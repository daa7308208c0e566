"""Image retrieval on the revisited Oxford and Paris buildings (Radenovic et al., CVPR 2018): mAP without any training.

Layout, as the data sets are published: DATA/roxford5k/gnd_roxford5k.pkl and DATA/roxford5k/jpg/*.jpg; also rparis6k.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from ml_collections.config_dict import placeholder
from PIL import Image

from dino_jax.errors import UserError
from dino_jax.evals.common.extraction import cls_features, l2_normalize
from dino_jax.evals.common.feature_cache import FeatureCache, fingerprint
from dino_jax.evals.common.ground_truth import read_ground_truth
from dino_jax.evals.common.ranking import (
    ANSWERS,
    CORRECT,
    IGNORED,
    add_frame,
    answers_sheet,
    average_precision,
    check_at_least_one,
    extract_files,
    rate,
    thumbnail,
)
from dino_jax.limits import COUNT, COUNT_OR_NONE, PIXELS, Above
from dino_jax.weights.backbone import Backbone

# As in the reference: pixels of the longer side, and the scales at which features of an image are computed.
SIZES = {"roxford5k": (224, (1.0,)), "rparis6k": (512, (1.0, 1 / math.sqrt(2), 0.5))}
# The correct answers at each level, and those that are ignored.
LEVELS = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
KS = (1, 5, 10)  # of mean precision at k
CONVNET_STEP = 32  # sides of a convnet's images are cut to multiples of this, as a ViT's to its patch


class Photo(NamedTuple):
    """An image file, and the box of it that is used."""

    path: Path
    box: tuple[int, int, int, int] | None  # left, upper, right, lower in pixels; None for the whole image


LIMITS = {"imsize": PIXELS, "scales": Above(0, 100), "batch_size": COUNT, "workers": (0, 1_024), "sheet": COUNT_OR_NONE}


def default_config() -> ml_collections.ConfigDict:
    """Every knob of `dino-jax evaluate retrieval`."""
    return ml_collections.ConfigDict(
        {
            "data": "",  # parent folder of the data sets' folders
            "dataset": "roxford5k",  # or rparis6k
            "imsize": placeholder(int),  # pixels of the longer side; default: 224 for roxford5k, 512 for rparis6k
            "scales": placeholder(tuple),  # to average over; default: 1 (roxford5k), 1, 0.7071, 0.5 (rparis6k)
            "crop_queries": True,  # to their box, as the data sets require; the reference's code uses whole images
            "batch_size": 32,  # images of one shape, over all devices
            "workers": min(8, os.cpu_count() or 1),  # threads that read and decode images
            "sheet": 8,  # number of queries in the picture of answers
        }
    )


def run(backbone: Backbone, config: ml_collections.ConfigDict, out: Path) -> dict[str, Any]:
    """Ranks all images for each query; prints mAP and mean precision at 1, 5, 10; draws some queries with answers.

    A feature is the CLS token, averaged over the scales, then L2-normalized; images are ranked by cosine similarity.
    Images keep their aspect ratio. The longer side is `imsize` unless the image is smaller, and for a ViT, the right
    and lower edges beyond the last whole patch are cut off. A batch has images of one shape, and XLA compiles one
    program per shape. Only the number of patches matters for that: patches of 16 and an aspect ratio of up to 2:1 give
    at most 15 shapes (Oxford) or 53 (Paris), and queries smaller than `imsize` a few more. `out` caches features.

    Returns:
        The content of results.json: {"figures": {"easy": {"mAP", "mP@1", "mP@5", "mP@10"}, ...} in percent, "queries"
        (number of queries with correct answers, per level), "settings", "images", "seconds", "images_per_second" (of
        extraction; None if all features were cached), "pictures"}.

    Raises:
        UserError: a file is missing, damaged or refused, an image is smaller than a patch, or a box lies outside.
    """
    start, (imsize, scales) = time.monotonic(), _check(config)
    folder = Path(config.data).expanduser() / config.dataset
    truth = read_ground_truth(folder / f"gnd_{config.dataset}.pkl")
    database, queries = _photos(truth, folder / "jpg", config.crop_queries)
    photos, step = [*database, *queries], backbone.patch_size or CONVNET_STEP
    with ThreadPoolExecutor(config.workers) as pool:
        shapes = list(pool.map(lambda photo: _shape(photo, imsize, scales, step), photos))
    extraction = extract_files(
        backbone,
        multi_scale(cls_features(backbone.model), scales, step),
        batches_of_one_shape(shapes, config.batch_size),
        lambda batch: np.stack(
            [_load(photos[i], imsize, shapes[i], backbone.config["in_channels"]) for i in batch.tolist()]
        ),
        [f"{photo.path.name} {photo.path.stat().st_size} {photo.box}" for photo in photos],
        FeatureCache(out / "features", fingerprint(backbone, config.dataset, imsize, scales)),
        config.dataset,
        config.workers,
    )
    features = l2_normalize(extraction.features)
    similarity = features[: len(database)] @ features[len(database) :].T
    ranking = np.argsort(-similarity, axis=0, kind="stable")
    figures, counted = _score(ranking, truth["gnd"])
    _print_table(figures, counted, config.dataset, len(queries), len(database))
    sheet = out / "answers.png"
    _draw(database, queries, ranking, truth["gnd"], config.sheet, sheet)
    return {
        "figures": figures,
        "queries": counted,
        "settings": {**config.to_dict(), "imsize": imsize, "scales": scales},
        "images": {"database": len(database), "queries": len(queries)},
        "seconds": round(time.monotonic() - start, 1),
        "images_per_second": rate(extraction),
        "pictures": [str(sheet)],
    }


def _check(config: ml_collections.ConfigDict) -> tuple[int, tuple[float, ...]]:
    """Returns imsize and scales."""
    if not config.data:
        raise UserError("--config.data is empty: set it to the folder that holds roxford5k/ or rparis6k/")
    if config.dataset not in SIZES:
        raise UserError(f"--config.dataset={config.dataset}: set it to one of {', '.join(SIZES)}")
    usual = SIZES[config.dataset]
    imsize = usual[0] if config.imsize is None else config.imsize
    scales = usual[1] if config.scales is None else tuple(config.scales)
    if not scales or not all(0 < scale <= 1 for scale in scales):
        raise UserError(f"scales {scales}: set --config.scales to numbers above 0, at most 1")
    check_at_least_one(config, "batch_size", "workers", "sheet")
    return imsize, tuple(float(scale) for scale in scales)


def _photos(truth: dict[str, Any], folder: Path, crop_queries: bool) -> tuple[list[Photo], list[Photo]]:
    """Returns database and queries. Raises UserError if a file is missing."""
    boxes = [tuple(round(edge) for edge in query["bbx"]) if crop_queries else None for query in truth["gnd"]]
    database = [Photo(folder / f"{name}.jpg", None) for name in truth["imlist"]]
    queries = [Photo(folder / f"{name}.jpg", box) for name, box in zip(truth["qimlist"], boxes, strict=True)]
    paths = [photo.path for photo in (*database, *queries)]
    if missing := [path for path in paths if not path.is_file()]:
        raise UserError(f"--config.data: {len(missing):,} of {len(paths):,} images are missing, such as {missing[0]}")
    return database, queries


# --- images ----------------------------------------------------------------------------------------------------------


def _shape(photo: Photo, imsize: int, scales: tuple[float, ...], step: int) -> tuple[int, int]:
    """Returns height and width of the model's input for a photo, from the header of the file."""
    with _open(photo.path) as picture:
        width, height = picture.size
    if photo.box is not None:
        left, upper, right, lower = _within(photo.box, width, height)
        if left >= right or upper >= lower:
            raise UserError(f"box {photo.box} of query {photo.path} is outside the image of {width} x {height} pixels")
        width, height = right - left, lower - upper
    width, height = fit(width, height, imsize)
    cut = smallest_side(height, scales, step), smallest_side(width, scales, step)
    if not all(cut):
        raise UserError(
            f"{photo.path}, {width} x {height} pixels, is smaller than a patch of {step} at scale {min(scales):.2g}: "
            "raise --config.imsize or the smallest of --config.scales"
        )
    return cut


def _within(box: tuple[int, int, int, int], width: int, height: int) -> tuple[int, int, int, int]:
    """Clips a box to the image, as the data sets' own tools do."""
    left, upper, right, lower = box
    return max(left, 0), max(upper, 0), min(right, width), min(lower, height)


def fit(width: int, height: int, imsize: int) -> tuple[int, int]:
    """Returns the size that Pillow's `thumbnail` gives: the longer side is at most imsize, the aspect ratio is kept."""
    if max(width, height) <= imsize:
        return width, height
    aspect = width / height
    exact = imsize / aspect if aspect > 1 else imsize * aspect
    candidates = max(math.floor(exact), 1), max(math.ceil(exact), 1)
    if aspect > 1:
        return imsize, min(candidates, key=lambda side: abs(aspect - imsize / side))
    return min(candidates, key=lambda side: abs(aspect - side / imsize)), imsize


@cache
def smallest_side(side: int, scales: tuple[float, ...], step: int) -> int:
    """Returns the smallest side, in pixels, that has the same number of patches of `step` pixels at each scale.

    Images are cut to it. This removes only pixels that the model would ignore, and makes many shapes equal. The result
    is 0 if the side is less than a patch at one of the scales.
    """

    def patches(pixels: int) -> list[int]:
        return [int(pixels * scale) // step for scale in scales]

    wanted = patches(side)
    return next(pixels for pixels in range(side + 1) if patches(pixels) == wanted) if all(wanted) else 0


def batches_of_one_shape(shapes: Sequence[tuple[int, int]], batch_size: int) -> list[np.ndarray]:
    """Splits the image numbers 0..N-1 into batches of one shape each, rare shapes first.

    Rare shapes cost little this way, because a batch is padded to the largest so far (`extraction.extract_batches`).
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for number, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(number)
    return [
        np.array(group[i : i + batch_size])
        for group in sorted(groups.values(), key=len)
        for i in range(0, len(group), batch_size)
    ]


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path, formats=("JPEG",))
    except Exception as error:  # damaged files can make Pillow raise anything
        raise UserError(f"{path} can't be read as a JPEG ({type(error).__name__}): download it again") from error


def _load(photo: Photo, imsize: int, shape: tuple[int, int], channels: int) -> np.ndarray:
    """Returns uint8 [height, width, C]. EXIF orientation is not applied, because the boxes are for pixels as stored."""
    if channels not in (1, 3):
        raise UserError(f"the backbone takes images of {channels} channels, these have 1 (gray) or 3 (RGB)")
    with _open(photo.path) as picture:
        try:
            image = picture.convert("L" if channels == 1 else "RGB")
        except Exception as error:
            raise UserError(f"{photo.path} can't be decoded ({error}): download it again") from error
    if photo.box is not None:
        image = image.crop(_within(photo.box, *image.size))
    image.thumbnail((imsize, imsize), Image.Resampling.LANCZOS)
    return np.atleast_3d(np.asarray(image))[: shape[0], : shape[1]]


@cache  # the same object for the same model, so that a second call compiles nothing
def multi_scale(apply_fn: Callable[..., Any], scales: tuple[float, ...], step: int) -> Callable[..., Any]:
    """Wraps apply_fn(variables, images [b, H, W, C]) -> [b, D] to return its mean over scaled versions of the images.

    These are bilinear without antialiasing, as in the reference, and cut to multiples of `step` pixels.
    """

    def seen(images: jax.Array, scale: float) -> jax.Array:
        b, H, W, C = images.shape
        shape = b, int(H * scale) // step * step, int(W * scale) // step * step, C
        # Pixel positions come from the scale itself, not from the rounded sizes.
        factors, shift = np.full(2, scale, np.float32), np.zeros(2, np.float32)
        return jax.image.scale_and_translate(images, shape, (1, 2), factors, shift, "linear", antialias=False)

    def averaged(variables: Any, images: jax.Array) -> jax.Array:
        return jnp.mean(jnp.stack([apply_fn(variables, seen(images, scale)) for scale in scales]), 0)

    return averaged


# --- figures ---------------------------------------------------------------------------------------------------------


def score_queries(
    ranking: np.ndarray, positives: Sequence[Sequence[int]], ignored: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns average precision [Q] and precision at each of KS [Q, 3], in 0..1; NaN for queries without positives.

    As in the data sets' own evaluation, precision at k uses no ranks beyond the last positive.

    Args:
        ranking: int [N, Q], the images of the database for each query, best first.
        positives: the correct answers of each query.
        ignored: answers of each query to remove from the ranking first.
    """
    precision, at_k = np.full(len(positives), np.nan), np.full((len(positives), len(KS)), np.nan)
    for query, (right, left_out) in enumerate(zip(positives, ignored, strict=True)):
        if not len(right):
            continue
        answers = ranking[:, query]
        answers = answers[~np.isin(answers, left_out)]
        ranks = np.flatnonzero(np.isin(answers, right))
        precision[query] = average_precision(ranks, len(right))
        depths = np.minimum(KS, ranks[-1] + 1)
        at_k[query] = [(ranks < depth).sum() / depth for depth in depths]
    return precision, at_k


def _score(ranking: np.ndarray, gnd: list[dict[str, Any]]) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """Returns figures in percent and the number of queries they are averaged over, for each level that has any."""
    figures, counted = {}, {}
    for level, kinds in LEVELS.items():
        positives, ignored = ([[i for kind in some for i in query[kind]] for query in gnd] for some in kinds)
        precision, at_k = score_queries(ranking, positives, ignored)
        if count := int(np.isfinite(precision).sum()):
            mean = [100 * float(x) for x in (np.nanmean(precision), *np.nanmean(at_k, axis=0))]
            figures[level] = dict(zip(("mAP", *(f"mP@{k}" for k in KS)), mean, strict=True))
            counted[level] = count
    return figures, counted


def _print_table(figures: dict[str, Any], counted: dict[str, Any], dataset: str, queries: int, images: int) -> None:
    print(f"{dataset}: {queries} queries of {images:,} images, percent:")
    print(f"{'':8}{'queries':>8}{'mAP':>8}" + "".join(f"{f'mP@{k}':>8}" for k in KS))
    for level, values in figures.items():
        print(f"{level:8}{counted[level]:>8}" + "".join(f"{value:8.2f}" for value in values.values()))


def _draw(
    database: list[Photo], queries: list[Photo], ranking: np.ndarray, gnd: list[dict[str, Any]], rows: int, sheet: Path
) -> None:
    """Draws queries at equal intervals in the list, with easy and hard answers framed in green and junk in gray."""
    shown = np.unique(np.linspace(0, len(queries) - 1, rows).astype(int))
    pictures = []
    for query in shown:
        right, junk = {*gnd[query]["easy"], *gnd[query]["hard"]}, set(gnd[query]["junk"])
        answers = [
            add_frame(thumbnail(database[i].path), CORRECT if i in right else IGNORED if i in junk else None)
            for i in ranking[:ANSWERS, query].tolist()
        ]
        pictures.append((thumbnail(*queries[query]), answers))
    answers_sheet(pictures, sheet)
