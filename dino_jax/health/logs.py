"""Reads logs of training: our workdirs, and the logs of the official DINO, DINOv2 and lightly-train."""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from dino_jax.errors import UserError
from dino_jax.health.history import number
from dino_jax.json_files import WHOLE, read_object
from dino_jax.provenance import flat

SIGNALS = ("teacher_entropy", "kl", "mean_target_entropy", "teacher_spread", "prototypes_used", "update_ratio")
OFFICIAL_PROTOTYPES = 65_536  # out_dim of the official recipes, which their logs do not tell


class Log(NamedTuple):
    """What a log says of a run."""

    form: str
    settings: Mapping[str, Any]  # config by dotted name, as far as it is known
    total_steps: int
    images: int  # 0: unknown
    rows: list[dict[str, Any]]  # scalars, in order; each has "step"

    @property
    def missing(self) -> list[str]:
        """Signals that the log does not have."""
        logged = {name for row in self.rows for name in row}
        return [name for name in SIGNALS if name not in logged]


def read_log(path: Path) -> Log:
    """Reads a workdir or a file of JSON lines. Raises UserError if there is none, or its form is unknown."""
    if path.is_dir():
        names = ("metrics.jsonl", "log.txt", "training_metrics.json")
        found = next((path / name for name in names if (path / name).is_file()), None)
        if found is None:
            raise UserError(f"{path} holds no log: give a folder with {', '.join(names)}, or such a file")
        path = found
    rows = _objects(path)
    for form, fits, convert in FORMS:
        if any(fits(row) for row in rows):
            return convert(form, path, [row for row in rows if fits(row)])
    raise UserError(f"{path} is no log that is known here: give a metrics.jsonl, log.txt or training_metrics.json")


def _objects(path: Path) -> list[dict[str, Any]]:
    """Returns the JSON objects of a file with one a line; other lines are left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a workdir or the log of a run") from error
    rows = []
    for line in lines:
        with suppress(ValueError):
            if isinstance(row := json.loads(line), dict):
                rows.append(row)
    return rows


def _ours(form: str, path: Path, rows: list[dict[str, Any]]) -> Log:
    config, report = path.with_name("config.json"), path.with_name("health.json")
    settings = flat(read_object(config, {})) if config.is_file() else {}
    kinds = {"total_steps": WHOLE, "images": WHOLE}
    known = read_object(report, kinds, "delete it") if report.is_file() else {}
    return Log(form, settings, known.get("total_steps", int(rows[-1]["step"])), known.get("images", 0), rows)


def _official(form: str, path: Path, rows: list[dict[str, Any]]) -> Log:
    """log.txt has the means of an epoch a line, and no settings."""
    names = {"train_loss": "loss", "train_lr": "lr", "train_wd": "weight_decay"}
    converted = [_renamed(row, names, row["epoch"] + 1) for row in rows]
    return Log(form, {"head.out_dim": OFFICIAL_PROTOTYPES}, int(converted[-1]["step"]), 0, converted)


def _dinov2(form: str, path: Path, rows: list[dict[str, Any]]) -> Log:
    """The weights of the losses of local and global crops add up to 1, so uniform outputs give a sum of ln K."""
    names = {"lr": "lr", "wd": "weight_decay", "mom": "teacher_momentum", "teacher_temp": "teacher_temp"}
    converted = [
        _renamed(row, names, row["iteration"])
        | {"loss": number(row["dino_local_crops_loss"]) + number(row["dino_global_crops_loss"])}
        for row in rows
    ]
    return Log(form, {"head.out_dim": OFFICIAL_PROTOTYPES}, int(converted[-1]["step"]), 0, converted)


def _lightly(form: str, path: Path, rows: list[dict[str, Any]]) -> Log:
    names = {"train_loss": "loss", "lr": "lr", "weight_decay": "weight_decay"}
    converted = [_renamed(row, names, row["step"]) for row in rows]
    return Log(form, {"head.out_dim": OFFICIAL_PROTOTYPES}, int(converted[-1]["step"]), 0, converted)


def _renamed(row: Mapping[str, Any], names: Mapping[str, str], step: float) -> dict[str, Any]:
    return {"step": int(step), **{new: row[old] for old, new in names.items() if old in row}}


def _has(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    """Returns whether a row has numbers under these names."""
    return lambda row: all(isinstance(row.get(name), int | float) for name in names)


# (name, whether a row is of this form, reader); the first form that fits a row counts.
FORMS: tuple[tuple[str, Callable[..., bool], Callable[..., Log]], ...] = (
    ("DINOv2's training_metrics.json", _has("iteration", "dino_local_crops_loss", "dino_global_crops_loss"), _dinov2),
    ("the official DINO's log.txt", _has("epoch", "train_loss", "train_lr"), _official),
    ("lightly-train's metrics.jsonl", _has("step", "train_loss"), _lightly),
    ("metrics.jsonl", _has("step"), _ours),
)
