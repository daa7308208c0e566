"""A trained backbone as one file that JAX runs without this package."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import export

from dino_jax import atomic
from dino_jax.weights.backbone import Backbone

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")  # one program serves all of them


def write_stablehlo(path: str | Path, backbone: Backbone) -> None:
    """Writes the backbone's program, weights inside, to `path`, and its card beside it as `path`.json.

    Anyone with `jax` and `flatbuffers` runs it, on a CPU, GPU or TPU:

        features = jax.export.deserialize(bytearray(open(path, "rb").read())).call(images)

    images: float32 [B, S, S, C], normalized. Any B (each is compiled once); S is the card's `crop`, for another one
    see `load_backbone(image_size=...)`. features: {"cls": float32 [B, D], "patches": float32 [B, N, D]}, as `Tokens`
    has them.

    To hand on, not to archive: JAX promises to run it with releases up to three weeks older and six months newer than
    the one that wrote it (jax.export, "Compatibility guarantees"). Raises UserError if `path` can't be written.
    """
    path = Path(path)
    size, channels = backbone.card["preprocessing"]["crop"], backbone.config["in_channels"]
    images = jax.ShapeDtypeStruct(export.symbolic_shape(f"B, {size}, {size}, {channels}"), jnp.float32)
    with atomic.file(path, "give another path") as unfinished:
        unfinished.write_bytes(_without_source_paths(backbone, images))
    with atomic.file(path.with_name(path.name + ".json")) as unfinished:
        unfinished.write_text(json.dumps(backbone.card, indent=2) + "\n")


def _without_source_paths(backbone: Backbone, images: jax.ShapeDtypeStruct) -> bytes:
    """The serialized program. JAX would put the paths of all source files into it, which are nobody else's business."""

    def features(images: jax.Array) -> dict[str, jax.Array]:
        tokens = backbone(images)  # as a plain dict, because the reader of the file does not have Tokens
        return {"cls": tokens.cls, "patches": tokens.patches}

    limit = jax.config.values["jax_traceback_in_locations_limit"]
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        return bytes(export.export(jax.jit(features), platforms=PLATFORMS)(images).serialize())
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)
