"""Exports the teacher's backbone with its model card, for use without the trainer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from dino_jax import atomic
from dino_jax.checkpoints.integrity import write_manifest
from dino_jax.models.registry import architecture_card, given_sizes, given_variant
from dino_jax.provenance import plain, versions


def model_card(config: Any, step: int, backbone: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the model card of an exported backbone: architecture, preprocessing and provenance, as plain JSON.

    backbone: the parameters (or their names), which show whether the run's method added a mask token.
    """
    config = plain(config)
    model, data = config["model"], config["data"]
    return {
        "architecture": architecture_card(
            model["arch"],
            patch_size=model["patch_size"],
            in_channels=model["in_channels"],
            image_size=config["crops"]["global_size"],
            sizes=given_sizes(model),
            mask_token="mask_token" in (backbone or {}),
            **given_variant(model),
        ),
        "preprocessing": {
            "resize": config["eval"]["resize"],
            "crop": config["eval"]["crop"],
            "dtype": data.get("dtype", "uint8"),  # version 0.1.0 wrote none of the three
            "range": list(data.get("range", (0.0, data.get("white", 0.0)))),
            "shown": list(data.get("shown", (0, 1, 2))),
            "mean": data["mean"],
            "std": data["std"],
            "interpolation": "bicubic",
        },
        "provenance": {
            "step": int(step),
            "data_source": data["source"],
            "versions": versions(),
            "config": config,
        },
    }


def write_export(folder: str | Path, trees: Mapping[str, Any], card: Mapping[str, Any]) -> Path:
    """Writes trees of arrays and a `model_card` to `folder`, and returns its path.

    Each tree goes to a subfolder with its name. Previous content stays in place until the new export is complete.
    Raises UserError if the folder cannot be written.
    """
    final = Path(folder).resolve()
    unfinished = atomic.unfinished_folder(final)
    with atomic.disk_errors(final):
        if jax.process_index() == 0:
            atomic.begin_folder(final)
        multihost_utils.sync_global_devices("export_begin")
        with ocp.StandardCheckpointer() as checkpointer:
            for name, tree in trees.items():
                checkpointer.save(unfinished / name, tree)
        if jax.process_index() == 0:
            atomic.write_json(unfinished / "card.json", card)
            write_manifest(unfinished)
            atomic.finish_folder(final)
        multihost_utils.sync_global_devices("export_end")
    return final
