"""Measures without labels on fixed crops: do features tell images apart, and keep crops of an image together?"""

import itertools
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from dino_jax import recipes
from dino_jax.data.multicrop import multicrop
from dino_jax.data.pipeline import train_batches
from dino_jax.data.pixels import Pixels
from dino_jax.data.sources import Source, open_source, spread
from dino_jax.distributed.processes import on_every_process
from dino_jax.distributed.sharding import make_mesh, replicate, shard_batch
from dino_jax.errors import UserError
from dino_jax.evals.common import label_free
from dino_jax.evals.common.extraction import FeatureTable, gather
from dino_jax.limits import COUNT, PIXELS, SEED
from dino_jax.progress import progress
from dino_jax.weights.backbone import Backbone

LIMITS = {
    "images": (2, 1_000_000),
    "pairs": (1, 32),
    "seed": SEED,
    "canvas_size": PIXELS,
    "batch_size": COUNT,
    "workers": (0, 1_024),
}


def default_config() -> ml_collections.ConfigDict:
    """Every knob of `dino-jax evaluate probe`."""
    return ml_collections.ConfigDict(
        {
            "source": "",  # images (data/sources), with or without labels
            "images": 2_048,  # number of images, spread evenly over the source
            "pairs": 2,  # pairs of augmented global crops of each image
            "seed": 0,  # of the crops
            "canvas_size": 512,  # pixels, as data.canvas_size in training
            "batch_size": 256,  # images, over all devices
            "workers": min(8, os.cpu_count() or 1),  # processes that read and decode images
        }
    )


class Reading(NamedTuple):
    """How `crop_features` reads images."""

    images: int
    pairs: int  # of crops of each image
    seed: int
    canvas_size: int
    pixels: Pixels
    batch_size: int
    workers: int


class CropFeatures(NamedTuple):
    """Features of c crops of each of n images, float32."""

    cls: np.ndarray  # [n, c, D]
    patch: np.ndarray  # [n, c, D], of the patch at the center


def run(backbone: Backbone, config: ml_collections.ConfigDict, out: Path) -> dict[str, Any]:
    """Computes `measures` of the backbone and of an untrained one of the same architecture, and prints a table.

    Crops are the global crops of the default recipe, at the size of the checkpoint's card.

    Returns:
        The content of results.json: {"figures", "untrained" (both by name), "settings", "seconds"}.

    Raises:
        UserError: the source is missing or has fewer than two images.
    """
    if not config.source:
        raise UserError("--config.source is empty: set it to the images, such as folder:/data/photos")
    start, trained = time.monotonic(), backbone.card["preprocessing"]
    source = on_every_process(lambda: open_source(config.source), size=len)
    settings = recipes.get_config().crops
    settings.global_size = trained["crop"]
    augment = global_crops(settings, trained["mean"], trained["std"])
    reading = Reading(
        images=config.images,
        pairs=config.pairs,
        seed=config.seed,
        canvas_size=config.canvas_size,
        pixels=backbone.pixels,
        batch_size=config.batch_size,
        workers=config.workers,
    )
    image = jnp.zeros((1, trained["crop"], trained["crop"], reading.pixels.channels))
    untrained = jax.jit(backbone.model.init)(jax.random.key(config.seed), image)
    figures, before = (
        measures(crop_features(backbone.model.apply, variables, augment, source, make_mesh(), reading))
        for variables in (backbone.variables, untrained)
    )
    print(f"{'':<16} {'checkpoint':>12} {'untrained':>12}")
    print("\n".join(f"{name:<16} {value:>12.3f} {before[name]:>12.3f}" for name, value in figures.items()))
    return {
        "figures": figures,
        "untrained": before,
        "settings": config.to_dict(),
        "seconds": round(time.monotonic() - start, 1),
    }


def measures(features: CropFeatures) -> dict[str, float]:
    """Returns the measures of `label_free` by name, see docs/health.md.

    crop_retrieval, alignment and lidar compare crops of an image with those of others; rankme, alpha_req and uniformity
    take one crop of each image; rankme_patch is that of the patches at the center.
    """
    one = features.cls[:, 0]
    return {
        "crop_retrieval": label_free.crop_retrieval(features.cls),
        "rankme": label_free.rankme(one),
        "rankme_patch": label_free.rankme(features.patch[:, 0]),
        "lidar": label_free.lidar(features.cls),
        "alpha_req": label_free.alpha_req(one),
        "uniformity": label_free.uniformity(one),
        "alignment": label_free.alignment(features.cls),
    }


def global_crops(settings: Any, mean: Any, std: Any) -> Callable[..., jax.Array]:
    """Returns augment(keys [B], canvas, size) -> normalized crops float32 [B, 2, S, S, C].

    settings: the section `config.crops`, of which the local crops are left out.
    """
    crops = settings.copy_and_resolve_references()
    crops.local_number = 0
    return lambda keys, canvas, size: multicrop(keys, canvas, size, crops, mean, std, jnp.float32).global_crops


def crop_features(
    apply: Callable[..., Any],
    variables: Any,
    augment: Callable[..., jax.Array],
    source: Source,
    mesh: Mesh,
    reading: Reading,
) -> CropFeatures:
    """Extracts the features of the same crops of the same images each time, a function of source and `reading.seed`.

    Each process computes its share of the images on its own devices; all get the complete result. All must call it.

    Args:
        apply: (variables, images [b, H, W, C]) -> `Tokens`.
        variables: parameters and statistics, on the host or replicated.
        augment: see `global_crops`.
        source: the images; `reading.images` of them are used, spread evenly, less a remainder of the batch size.
        mesh: all devices.
        reading: which images and crops.

    Raises:
        UserError: the source has fewer than two images.
    """
    wanted = min(reading.images, len(source))
    if wanted < 2:
        raise UserError(
            f"the probe compares images, but the source has {len(source)} of them and images is {reading.images}"
        )
    parts = jax.process_count() * mesh.local_mesh.size  # a batch divides over all devices
    batch_size = max(min(reading.batch_size, wanted) // parts, 1) * parts
    steps = max(wanted // batch_size, 1)
    chosen = spread(source, min(wanted, steps * batch_size))
    local = mesh.local_mesh
    variables = replicate(jax.device_get(variables), local)
    tables = []
    with train_batches(
        chosen,
        batch_size=batch_size,
        canvas_size=reading.canvas_size,
        pixels=reading.pixels,
        seed=reading.seed,
        workers=reading.workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    ) as batches:
        share = batch_size // jax.process_count()
        steps_done = progress(itertools.islice(batches, steps), steps * share, "probe", size=lambda one: len(one.index))
        for batch in steps_done:
            rows = shard_batch((batch.canvas, batch.size, batch.index), local)
            found = np.asarray(_encode(apply, augment, reading.pairs, variables, rows, reading.seed))
            tables.append(FeatureTable(found, np.array(batch.label), np.array(batch.index)))
    table = gather(FeatureTable(*(np.concatenate(x) for x in zip(*tables, strict=True))))
    _, first = np.unique(table.records, return_index=True)  # a source smaller than a batch is repeated
    cls, patch = np.split(table.features[first].reshape(len(first), 2 * reading.pairs, -1), 2, axis=-1)
    return CropFeatures(cls, patch)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _encode(apply: Any, augment: Any, pairs: int, variables: Any, rows: Any, seed: int | jax.Array) -> jax.Array:
    """Canvases, sizes and records of b images -> cls and central patch of each crop, [b, 2 * pairs * 2 * D]."""
    canvas, size, record = rows
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(jax.random.key(seed), i), pairs))(record)
    crops = jnp.concatenate([augment(keys[:, pair], canvas, size) for pair in range(pairs)], axis=1)
    tokens = apply(variables, crops.reshape(-1, *crops.shape[2:]))
    center = tokens.patches[:, tokens.patches.shape[1] // 2]
    return jnp.concatenate([tokens.cls, center], axis=-1).astype(jnp.float32).reshape(len(canvas), -1)
