"""Pictures of what a backbone learned, as rows of (caption, image): neighbors, attention, components of patches."""

from contextlib import suppress
from pathlib import Path

import numpy as np

from dino_jax.data.decoding import DecodeError, eval_image
from dino_jax.data.pixels import to_rgb
from dino_jax.data.sources import Source, read_example, spread
from dino_jax.distributed.sharding import make_mesh
from dino_jax.evals.attention import attention_maps, overlay
from dino_jax.evals.common.extraction import cls_features, extract_source
from dino_jax.evals.common.images import fit_to_patches, heatmap, normalize_images, patch_grid, upsample
from dino_jax.evals.common.neighbors import nearest
from dino_jax.evals.patch_pca import patch_components
from dino_jax.weights.backbone import Backbone

Row = list[tuple[str, np.ndarray]]  # captions and images, uint8 [H, W, 3]

BANK = 2_000  # images among which neighbors are looked up
QUERIES, NEIGHBORS = 12, 5
SHOWN = 6  # images with attention and components
SIDE = 160  # smallest longer side of an image for attention, so that there are enough patches to see something


def neighbors(backbone: Backbone, source: Source, queries: int = QUERIES, bank_size: int = BANK) -> list[Row]:
    """Returns a row for each of a dozen images: the image, and the five most similar of about 2,000 others."""
    bank = spread(source, bank_size)
    card = backbone.card["preprocessing"]
    table = extract_source(
        cls_features(backbone.model),
        backbone.variables,
        bank,
        "pictures",
        make_mesh(),
        batch_size=min(256, len(bank)),
        resize=card["resize"],
        crop=card["crop"],
        mean=card["mean"],
        std=card["std"],
        pixels=backbone.pixels,
    )
    chosen = np.linspace(0, len(table.records) - 1, min(queries, len(table.records))).astype(int)
    count = min(NEIGHBORS + 1, len(table.records))
    similarity, places = nearest(table.features, table.features[chosen], count)
    rows = []
    for query, cosines, found in zip(chosen, similarity, places, strict=True):
        others = [(float(c), int(place)) for c, place in zip(cosines, found, strict=True) if place != query][:NEIGHBORS]
        row = [("query", shown(backbone, bank, int(table.records[query])))]
        row += [(f"{cosine:.2f}", shown(backbone, bank, int(table.records[place]))) for cosine, place in others]
        rows.append(row)
    return rows


def attention(backbone: Backbone, source: Source) -> list[Row]:
    """Returns a row for each of six images: the image, the mean attention of CLS over it, and that of each head."""
    rows = []
    for image in _for_patches(backbone, source):
        maps = attention_maps(backbone, normalize_images(backbone, image[None]))[0]
        factor = len(image) // maps.shape[1]
        heads = [(f"head {i + 1}", heatmap(upsample(one, factor))) for i, one in enumerate(maps)]
        picture = to_rgb(image, backbone.pixels.shown)
        rows.append([("image", picture), ("mean", overlay(picture, maps)), *heads])
    return rows


def components(backbone: Backbone, source: Source) -> list[Row]:
    """Returns a row for each of six images: the image, and the first three components of its patches as colors."""
    images = _for_patches(backbone, source)
    tokens = [np.asarray(patch_grid(backbone, normalize_images(backbone, image[None])))[0] for image in images]
    rows: list[Row] = []
    for image, found in zip(images, patch_components(tokens)[0], strict=True):
        colors = upsample(np.moveaxis((255 * found).astype(np.uint8), -1, 0), len(image) // len(found))
        rows.append([("image", to_rgb(image, backbone.pixels.shown)), ("components", np.moveaxis(colors, 0, -1))])
    return rows


def shown(backbone: Backbone, source: Source, record: int) -> np.ndarray:
    """Returns an image as the network sees it for evaluation, uint8 [S, S, 3]."""
    return to_rgb(_read(backbone, source, record), backbone.pixels.shown)


def _read(backbone: Backbone, source: Source, record: int) -> np.ndarray:
    card = backbone.card["preprocessing"]
    image = read_example(source, record).image
    return eval_image(image, resize=card["resize"], crop=card["crop"], pixels=backbone.pixels)


def _for_patches(backbone: Backbone, source: Source) -> list[np.ndarray]:
    """Returns six images [H, W, C] whose sides are multiples of the patch size."""
    size, patch = max(SIDE, backbone.card["preprocessing"]["crop"]), backbone.patch_size or 1
    images, bank = [], spread(source, SHOWN)
    for record in range(len(bank)):
        with suppress(OSError, DecodeError):
            images.append(fit_to_patches(_read(backbone, bank, record), size, patch, Path(bank.name(record))))
    return images
