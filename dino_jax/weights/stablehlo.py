"""Exports a trained backbone as one file that JAX runs without this package."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import export

from dino_jax import atomic
from dino_jax.weights.backbone import Backbone

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")  # one program serves all of them


def write_stablehlo(path: str | Path, backbone: Backbone) -> None:
    """Writes the backbone's program, including its weights, to `path`, and its card to `path`.json.

    The program runs on CPU, GPU and TPU and only needs `jax` and `flatbuffers`:

        features = jax.export.deserialize(bytearray(open(path, "rb").read())).call(images)

    images: float32 [B, S, S, C], normalized. B is arbitrary (each value is compiled once). S is the card's `crop`; for
    another size, see `load_backbone(image_size=...)`. features: {"cls": float32 [B, D], "patches": float32 [B, N, D]},
    as in `Tokens`.

    The file is meant for deployment, not for archiving: JAX guarantees that releases up to three weeks older and six
    months newer than the one that wrote it can run it (jax.export, "Compatibility guarantees"). Raises UserError if
    `path` cannot be written.
    """
    path = Path(path)
    size, channels = backbone.card["preprocessing"]["crop"], backbone.config["in_channels"]
    images = jax.ShapeDtypeStruct(export.symbolic_shape(f"B, {size}, {size}, {channels}"), jnp.float32)
    with atomic.file(path, "give another path") as unfinished:
        unfinished.write_bytes(_without_source_paths(backbone, images))
    with atomic.file(path.with_name(path.name + ".json")) as unfinished:
        unfinished.write_text(json.dumps(backbone.card, indent=2) + "\n")


def _without_source_paths(backbone: Backbone, images: jax.ShapeDtypeStruct) -> bytes:
    """Serializes the program without the paths of source files, which JAX includes by default and may be private."""

    def features(images: jax.Array) -> dict[str, jax.Array]:
        tokens = backbone(images)  # returned as a plain dict, because users of the file do not have the Tokens class
        return {"cls": tokens.cls, "patches": tokens.patches}

    limit = jax.config.values["jax_traceback_in_locations_limit"]
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        return bytes(export.export(jax.jit(features), platforms=PLATFORMS)(images).serialize())
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)
