"""Checkpoint of a linear probe: one file, written atomically."""

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dino_jax import atomic
from dino_jax.data.sources import Source
from dino_jax.errors import UserError
from dino_jax.evals.common.feature_cache import WAY_OUT
from dino_jax.evals.common.linear_heads import Probe, ProbeState
from dino_jax.provenance import plain

FREE = ("workers", "val_every")  # settings that may change between a run and its continuation


class Record(NamedTuple):
    """Measurements after an epoch, for K kinds of features and L learning rates."""

    epoch: int  # number of completed epochs
    images: int  # number of test images
    loss: np.ndarray  # float32 [K, L], mean over the training images of the epoch
    figures: np.ndarray  # float64 [M, K, L], `Probe.measures` in percent


def fingerprint(probe: Probe, variables: dict[str, Any], train: Source, test: Source) -> dict[str, Any]:
    """Returns everything that must be equal for a run to resume from another's state, as plain JSON."""
    backbone = hashlib.sha256()
    for leaf in jax.tree.leaves(variables):
        backbone.update(np.asarray(leaf).tobytes())
    settings = {key: value for key, value in plain(probe.config).items() if key not in FREE}
    return settings | {"images": [len(train), len(test)], "backbone": backbone.hexdigest()}


def save_state(file: Path, settings: dict[str, Any], state: ProbeState, history: list[Record]) -> None:
    """Writes heads, momentum, step, measurements and settings atomically, on process 0."""
    if jax.process_index() > 0:
        return
    arrays = flatten_dict({"step": state.step, "heads": state.heads, "momentum": state.momentum}, sep="/")
    columns = zip(*history, strict=True)
    measured: dict[str, Any] = {f"history/{key}": np.stack(x) for key, x in zip(Record._fields, columns, strict=False)}
    with atomic.file(file, WAY_OUT) as unfinished, unfinished.open("wb") as stream:
        np.savez(stream, settings=json.dumps(settings), **(measured | jax.device_get(arrays)))


def load_state(file: Path, settings: dict[str, Any]) -> tuple[dict[str, Any], list[Record]]:
    """Returns {"step", "heads", "momentum"} and the measurements so far; both empty if there is nothing to resume.

    Raises UserError if the file is damaged or has the state of an unfinished run with other settings.
    """
    if not file.is_file():
        return {}, []
    try:
        with np.load(file) as stored:
            arrays = dict(stored)
        theirs, saved = json.loads(str(arrays.pop("settings"))), unflatten_dict(arrays, sep="/")
        columns = saved.pop("history", dict.fromkeys(Record._fields, ()))
        rows = zip(*(columns[key] for key in Record._fields), strict=True)
        history = [Record(int(epoch), int(images), *measured) for epoch, images, *measured in rows]
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} is damaged ({error}): delete it to start over") from error
    other = [key for key in settings if theirs.get(key) != settings[key]]
    if not other:
        return saved, history
    if history and history[-1].epoch == theirs["epochs"]:
        return {}, []  # that run is finished, so this one may replace it
    raise UserError(
        f"{file} is of an unfinished run with another {', '.join(other)}: finish that one, delete the file, or set "
        "--out to another folder"
    )
