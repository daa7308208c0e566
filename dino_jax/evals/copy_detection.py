"""Copy detection on Copydays (Douze et al., CIVR 2009): finds the original of a cropped, blurred or printed photo.

Layout: DATA/original/ and one folder for each kind of copy: DATA/strong/, DATA/crops/50/, DATA/jpegqual/3/, ... A copy
and its original share the first four characters of their file names (200001.jpg is a copy of 200000.jpg).
"""

import os
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from PIL import Image

from dino_jax.data.decoding import DecodeError, decode
from dino_jax.data.pixels import Pixels
from dino_jax.data.sources.folder import read_file
from dino_jax.errors import UserError
from dino_jax.evals.common.extraction import l2_normalize
from dino_jax.evals.common.feature_cache import FeatureCache, fingerprint
from dino_jax.evals.common.ranking import (
    ANSWERS,
    CORRECT,
    Extraction,
    add_frame,
    answers_sheet,
    average_precision,
    check_at_least_one,
    extract_files,
    image_files,
    rate,
    thumbnail,
)
from dino_jax.limits import COUNT, COUNT_OR_NONE, PIXELS
from dino_jax.models import Tokens
from dino_jax.weights.backbone import Backbone

TOP = 20  # number of answers that are scored
GEM_POWER, GEM_FLOOR = 4.0, 1e-6
EIGENVALUE_FLOOR = 1e-5  # of the largest


LIMITS = {"imsize": PIXELS, "batch_size": COUNT, "workers": (0, 1_024), "sheet": COUNT_OR_NONE}


def default_config() -> ml_collections.ConfigDict:
    """Every knob of `dino-jax evaluate copy_detection`."""
    return ml_collections.ConfigDict(
        {
            "data": "",  # folder with original/ and a folder for each kind of copy
            "queries": "strong",  # a kind of copies, several separated by commas: strong,crops/50,jpegqual/3
            "whitening": "",  # folder of other images to learn the whitening from; empty: no whitening
            "distractors": "",  # folder of other images to add to the database; empty: originals only
            "imsize": 320,  # pixels of each side: images are squeezed to a square
            "batch_size": 16,  # images, over all devices
            "workers": min(8, os.cpu_count() or 1),  # threads that read and decode images
            "sheet": 8,  # number of copies of each kind in the pictures of answers
        }
    )


def run(backbone: Backbone, config: ml_collections.ConfigDict, out: Path) -> dict[str, Any]:
    """Looks up each copy among originals and distractors, prints mAP for each kind, draws some copies with answers.

    Features (see `cls_and_gem`) are whitened, then L2-normalized, and compared by cosine similarity; the first 20
    answers are scored. The paper uses 20,000 images for the whitening and 10,000 distractors, both from YFCC100M.
    Features are cached in `out`.

    Returns:
        The content of results.json: {"figures": {"strong": {"mAP"}, ...} in percent, "settings", "images", "seconds",
        "images_per_second" (of extraction; None if all features were cached), "pictures"}.

    Raises:
        UserError: a folder is missing or empty, an image can't be decoded, a copy has no original, or the backbone is
            a convnet, which has no patch tokens.
    """
    start = time.monotonic()
    if backbone.patch_size is None:
        raise UserError(f"copy detection needs a vision transformer's patches, not {backbone.config['arch']}")
    kinds, data = _check(config, backbone.patch_size), Path(config.data).expanduser()
    originals = image_files(data / "original", "--config.data")
    copies = {kind: image_files(data / kind, "--config.queries") for kind in kinds}
    matches = {kind: find_originals(paths, originals) for kind, paths in copies.items()}
    others = {
        knob: image_files(Path(config[knob]).expanduser(), f"--config.{knob}") if config[knob] else []
        for knob in ("distractors", "whitening")
    }
    sets = {"original": originals, **copies, **{knob: paths for knob, paths in others.items() if paths}}
    extracted = _extract(backbone, sets, config, out)
    features = _ready_to_compare({what: extraction.features for what, extraction in extracted.items()})
    database = np.concatenate([features[what] for what in ("original", "distractors") if what in features])
    answers = {kind: nearest(features[kind], database, TOP) for kind in kinds}
    figures = {kind: {"mAP": 100 * mean_average_precision(answers[kind], matches[kind])} for kind in kinds}
    how = f"whitened by {len(others['whitening']):,} images" if others["whitening"] else "not whitened"
    print(f"{len(originals):,} originals, {len(others['distractors']):,} distractors, {how}, percent:")
    print(f"{'':16}{'copies':>8}{'mAP':>8}")
    for kind, figure in figures.items():
        print(f"{kind:16}{len(copies[kind]):>8,}{figure['mAP']:8.2f}")
    sheets = {kind: out / f"answers_{kind.replace('/', '_')}.png" for kind in kinds}
    for kind, sheet in sheets.items():
        _draw(copies[kind], [*originals, *others["distractors"]], answers[kind], matches[kind], config.sheet, sheet)
    return {
        "figures": figures,
        "settings": config.to_dict(),
        "images": {what: len(paths) for what, paths in sets.items()},
        "seconds": round(time.monotonic() - start, 1),
        "images_per_second": rate(*extracted.values()),
        "pictures": [str(sheet) for sheet in sheets.values()],
    }


def _check(config: ml_collections.ConfigDict, patch: int) -> list[str]:
    """Returns the kinds of copies."""
    if not config.data:
        raise UserError("--config.data is empty: set it to the folder that holds original/ and strong/")
    kinds = [kind.strip() for kind in config.queries.split(",") if kind.strip()]
    if not kinds or {"original", "distractors", "whitening"} & set(kinds):
        raise UserError(f"--config.queries={config.queries!r}: set it to folders of copies in --config.data: strong")
    if config.imsize < patch:
        raise UserError(f"imsize {config.imsize} is less than a patch: set --config.imsize to {patch} or more")
    check_at_least_one(config, "batch_size", "workers", "sheet")
    return kinds


def find_originals(copies: list[Path], originals: list[Path]) -> list[list[int]]:
    """Returns the indices of the originals of each copy: the first four characters of their file names are equal.

    Raises UserError for a copy without an original.
    """
    places: dict[str, list[int]] = {}
    for place, path in enumerate(originals):
        places.setdefault(path.name[:4], []).append(place)
    for path in copies:
        if path.name[:4] not in places:
            raise UserError(f"{path} has no original: none in {originals[0].parent} begins with {path.name[:4]!r}")
    return [places[path.name[:4]] for path in copies]


def _extract(
    backbone: Backbone, sets: dict[str, list[Path]], config: ml_collections.ConfigDict, out: Path
) -> dict[str, Extraction]:
    """Returns the model's features of each set of files."""
    feature_cache = FeatureCache(out / "features", fingerprint(backbone, config.imsize))
    channels = backbone.config["in_channels"]

    def extract(paths: list[Path], what: str) -> Extraction:
        numbers = np.arange(len(paths))
        return extract_files(
            backbone,
            descriptor(backbone.model.apply),
            [numbers[i : i + config.batch_size] for i in range(0, len(paths), config.batch_size)],
            lambda batch: np.stack([_squeezed(paths[i], config.imsize, channels) for i in batch.tolist()]),
            [f"{path} {path.stat().st_size}" for path in paths],
            feature_cache,
            what,
            config.workers,
        )

    return {what: extract(paths, what) for what, paths in sets.items()}


def _ready_to_compare(features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the other sets whitened by the set "whitening", if there is one, and L2-normalized."""
    compared = {what: rows for what, rows in features.items() if what != "whitening"}
    if "whitening" in features:
        mean, whiten = learn_whitening(features["whitening"])
        compared = {what: (rows - mean) @ whiten for what, rows in compared.items()}
    return {what: l2_normalize(rows) for what, rows in compared.items()}


def _squeezed(path: Path, imsize: int, channels: int) -> np.ndarray:
    """Returns an image squeezed to uint8 [imsize, imsize, C], bicubic."""
    try:
        image = decode(read_file(path), Pixels(channels))
    except (DecodeError, OSError) as error:
        raise UserError(f"{path} can't be read as a picture ({error}): replace it, or leave it out") from error
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    return np.atleast_3d(np.asarray(picture.resize((imsize, imsize), Image.Resampling.BICUBIC)))


@cache  # the same object for the same model, so that a second call compiles nothing
def descriptor(apply_fn: Callable[..., Any]) -> Callable[..., Any]:
    """A ViT's `apply` -> (variables, normalized images [B, H, W, C]) -> [B, 2 D], see `cls_and_gem`."""
    return lambda variables, images: cls_and_gem(apply_fn(variables, images))


def cls_and_gem(tokens: Tokens) -> jax.Array:
    """Tokens after the final norm -> [B, 2 D]: CLS, then the generalized mean (power 4) of the patches.

    Values below 1e-6 count as 1e-6, as in the reference.
    """
    patches = jnp.maximum(tokens.patches, GEM_FLOOR) ** GEM_POWER
    return jnp.concatenate([tokens.cls, patches.mean(1) ** (1 / GEM_POWER)], axis=1)


def learn_whitening(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean [D] of features F [n, D], and a matrix W [D, D] such that (x - mean) @ W is whitened.

    As in the reference, W is computed from F^T F / n without subtracting the mean, and eigenvalues below 1e-5 of the
    largest are raised to that. Prints a warning to stderr if n < D.
    """
    n, dim = features.shape
    if n < dim:
        print(f"whitening: {n:,} images, fewer than the {dim:,} numbers of a feature: take more", file=sys.stderr)
    features = features.astype(np.float64)
    values, vectors = np.linalg.eigh(features.T @ features / n)
    return features.mean(0), vectors / np.sqrt(np.maximum(values, EIGENVALUE_FLOOR * values.max()))


def nearest(queries: np.ndarray, database: np.ndarray, k: int) -> np.ndarray:
    """Returns the rows of the database [N, D] with the largest dot products with each query [Q, D].

    The result is int [Q, min(k, N)], best first.
    """
    return np.argsort(-(queries @ database.T), axis=1, kind="stable")[:, :k]


def mean_average_precision(answers: np.ndarray, matches: list[list[int]]) -> float:
    """Returns the mean over queries, in 0..1, of the average precision of their first k answers [Q, k].

    A match beyond the first k counts as not found.
    """
    return float(
        np.mean(
            [
                average_precision(np.flatnonzero(np.isin(row, right)), len(right))
                for row, right in zip(answers, matches, strict=True)
            ]
        )
    )


def _draw(
    copies: list[Path], database: list[Path], answers: np.ndarray, matches: list[list[int]], rows: int, sheet: Path
) -> None:
    """Draws copies at equal intervals in the list, with the originals among their answers framed in green."""
    shown = np.unique(np.linspace(0, len(copies) - 1, rows).astype(int))
    pictures = []
    for copy in shown:
        row = [
            add_frame(thumbnail(database[i]), CORRECT if i in matches[copy] else None)
            for i in answers[copy, :ANSWERS].tolist()
        ]
        pictures.append((thumbnail(copies[copy]), row))
    answers_sheet(pictures, sheet)
