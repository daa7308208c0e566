"""Images with a label for each pixel: layouts of data sets, their classes, reading, and random crops."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from dino_jax.data.pixels import Pixels
from dino_jax.data.sources import folder
from dino_jax.errors import UserError
from dino_jax.evals.common.images import read_image, resize
from dino_jax.evals.common.label_maps import read_labels
from dino_jax.progress import progress

VOID = -1  # class of pixels that do not count
VOC_LISTS = Path("ImageSets") / "Segmentation"

T = TypeVar("T")
S = TypeVar("S")


class Pair(NamedTuple):
    """An image and its label map, a PNG."""

    image: Path
    mask: Path


class Splits(NamedTuple):
    """A data set."""

    train: list[Pair]
    val: list[Pair]
    ignored: int  # label of pixels that do not count, unless the user names another


class Classes(NamedTuple):
    """The classes of a data set."""

    labels: np.ndarray  # uint8 [C], their numbers in the label maps, ascending
    class_of: np.ndarray  # int16 [256], label -> class in 0..C-1, or VOID


class Example(NamedTuple):
    """An image in memory."""

    image: np.ndarray  # pixels [H, W, channels]
    classes: np.ndarray  # int16 [H, W], class of each pixel, or VOID


# --- layouts ---------------------------------------------------------------------------------------------------------


def find_pairs(data: str, val_share: float, seed: int) -> Splits:
    """Finds the images of a data set in the layout of VOC 2012, of ADE20K, or in two folders `images` and `masks`.

    If these two have no folders `train` and `val` in them, `val_share` of the images, drawn with `seed`, are for
    validation.

    Raises UserError for another layout, a missing part of it, or an image without a mask.
    """
    if not data:
        raise UserError(
            "--config.data is empty: set it to a folder of images and label maps, such as VOCdevkit/VOC2012"
        )
    root = Path(data).expanduser()
    if (root / "SegmentationClass").is_dir():
        return Splits(_listed(root, "train"), _listed(root, "val"), 255)
    if (root / "annotations").is_dir():
        return Splits(_pairs(root, "annotations", "training"), _pairs(root, "annotations", "validation"), 0)
    if (root / "masks" / "train").is_dir():
        return Splits(_pairs(root, "masks", "train"), _pairs(root, "masks", "val"), 255)
    if (root / "masks").is_dir():
        return Splits(*_divide(_pairs(root, "masks", ""), val_share, seed), 255)
    raise UserError(
        f"--config.data={data} has none of the folders SegmentationClass (VOC 2012), annotations (ADE20K) and masks "
        "(beside images): give a folder with one of them"
    )


def _listed(root: Path, split: str) -> list[Pair]:
    """Returns the pairs of one of VOC's lists."""
    listing = root / VOC_LISTS / f"{split}.txt"
    for needed in (root / "JPEGImages", listing):
        if not needed.exists():
            raise UserError(f"--config.data={root} is not VOC's folder: {needed.relative_to(root)} is missing there")
    names = listing.read_text().split()
    if not names:
        raise UserError(f"--config.data: {listing} is empty: list the names of its images there")
    pairs = [Pair(root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClass" / f"{name}.png") for name in names]
    return _with_masks(pairs)


def _pairs(root: Path, masks: str, split: str) -> list[Pair]:
    """Returns the images in `root`/images/`split`, with the PNGs of the same names in `root`/`masks`/`split`."""
    images, labels = root / "images" / split, root / masks / split
    found = folder.image_paths(images, f"--config.data: {images}")
    return _with_masks([Pair(images / path, (labels / path).with_suffix(".png")) for path in found])


def _with_masks(pairs: list[Pair]) -> list[Pair]:
    missing = [pair for pair in pairs if not pair.mask.is_file()]
    if missing:
        raise UserError(
            f"--config.data: {len(missing):,} of {len(pairs):,} images have no mask, such as {missing[0].image}: add "
            f"{missing[0].mask}, or remove the image"
        )
    return pairs


def _divide(pairs: list[Pair], val_share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    count = round(val_share * len(pairs))
    if not 0 < count < len(pairs):
        raise UserError(
            f"val_share {val_share} of {len(pairs)} images leaves none for training or validation: set "
            "--config.val_share to another share, or add images"
        )
    chosen = set(np.random.default_rng(seed).permutation(len(pairs))[:count].tolist())
    return [pair for i, pair in enumerate(pairs) if i not in chosen], [pairs[i] for i in sorted(chosen)]


# --- classes ---------------------------------------------------------------------------------------------------------


def find_classes(splits: Splits, ignored: int, pixels: Pixels, workers: int) -> Classes:
    """Reads all images and masks once; the classes are the labels that occur, without the `ignored` one.

    Raises UserError if a file is unreadable, a mask has another size than its image, there are fewer than two labels,
    or labels of palette and gray masks differ.
    """
    pairs = [*splits.train, *splits.val]
    examined = read_ahead(partial(_labels_in, pixels=pixels), pairs, workers)
    modes, rows = zip(*progress(examined, len(pairs), "masks"), strict=True)
    present, gray = np.stack(rows), np.array(modes) == "L"
    if not gray.all() and (present[gray].any(0) & ~present[~gray].any(0)).any():
        raise UserError(
            f"--config.data: {pairs[gray.argmin()].mask} has a palette and {pairs[gray.argmax()].mask} is gray, and "
            "gray masks have other labels: a conversion to gray changes labels, so give the original masks"
        )
    for split, part in (("training", present[: len(splits.train)]), ("validation", present[len(splits.train) :])):
        if not len(_without(ignored, part)):
            raise UserError(
                f"--config.data: no {split} mask has a label beside {ignored}, which does not count: set "
                "--config.ignore to the label of pixels that do not count (-1: all count), or give other masks"
            )
    labels = _without(ignored, present)
    if len(labels) < 2:
        raise UserError(
            f"--config.data: {labels[0]} is the only label of the masks beside {ignored}, which does not count: set "
            "--config.ignore to the label of pixels that do not count (-1: all count), or give other masks"
        )
    class_of = np.full(256, VOID, np.int16)
    class_of[labels] = np.arange(len(labels))
    return Classes(labels.astype(np.uint8), class_of)


def _without(ignored: int, present: np.ndarray) -> np.ndarray:
    """Returns the labels in any row of bool [n, 256], but not the ignored one."""
    return np.setdiff1d(np.flatnonzero(present.any(0)), [ignored])


def _labels_in(pair: Pair, pixels: Pixels) -> tuple[str, np.ndarray]:
    """Returns the mode of a mask, P or L, and which labels it has, bool [256]."""
    labels = _read(pair, pixels)[1]
    with Image.open(pair.mask) as picture:
        return picture.mode, np.bincount(labels.ravel(), minlength=256) > 0


def _read(pair: Pair, pixels: Pixels) -> tuple[np.ndarray, np.ndarray]:
    image, labels = read_image(pair.image, pixels, "--config.data"), read_labels(pair.mask, "--config.data")
    if labels.shape != image.shape[:2]:
        sizes = " and ".join(f"{width} x {height}" for height, width in (labels.shape, image.shape[:2]))
        raise UserError(
            f"--config.data: {pair.mask} and its image have {sizes} pixels: give a mask of the image's size"
        )
    return image, labels


# --- reading ---------------------------------------------------------------------------------------------------------


def read_example(pair: Pair, pixels: Pixels, classes: Classes) -> Example:
    """Reads an image and its mask. Raises UserError if one is unreadable or their sizes differ."""
    image, labels = _read(pair, pixels)
    return Example(image, classes.class_of[labels])


def read_ahead(function: Callable[[S], T], items: Iterable[S], workers: int) -> Iterator[T]:
    """Yields function(item) for each item, in order; `workers` threads compute the next ones."""
    workers = max(1, workers)
    pending: deque[Any] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def random_crop(
    example: Example, crop: int, scale: tuple[float, float], flip: float, rng: np.random.Generator
) -> Example:
    """Scales an image so that its shorter side is `crop` times a draw from `scale`, and takes a square of `crop`.

    The square may reach beyond an image that is scaled down: there the border is repeated, and no pixel counts. It is
    mirrored with probability `flip`.
    """
    height, width = example.classes.shape
    side = max(1, round(min(height, width) / rng.uniform(*scale)))  # of the square, in pixels of the image
    missing = [(0, max(0, side - length)) for length in (height, width)]
    image = np.pad(example.image, [*missing, (0, 0)], mode="edge")
    classes = np.pad(example.classes, missing, constant_values=VOID)
    top, left = (int(rng.integers(0, length - side + 1)) for length in classes.shape)
    inside = slice(top, top + side), slice(left, left + side)
    found = Example(resize(image[inside], crop, crop), resize_classes(classes[inside], crop, crop))
    return Example(*(x[:, ::-1] for x in found)) if rng.random() < flip else found


def resize_classes(classes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes int16 [H, W] to [height, width], to the nearest pixels."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int)
        for new, old in zip((height, width), classes.shape, strict=True)
    )
    return classes[rows][:, columns]


def drawn(position: int, count: int, seed: int) -> tuple[int, np.random.Generator]:
    """Returns the record at a position of the shuffled endless order, and a generator for its crop."""
    return int(_shuffled(position // count, count, seed)[position % count]), np.random.default_rng((seed, 1, position))


@lru_cache(maxsize=4)
def _shuffled(epoch: int, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(count)
