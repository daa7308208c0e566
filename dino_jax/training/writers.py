"""Where a run's scalars go: the console, metrics.jsonl, TensorBoard, Weights & Biases.

A writer has two methods (`Writer`). To add one, write the class and name it in `WRITERS`.
"""

import json
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from dino_jax import atomic
from dino_jax.distributed.processes import on_first
from dino_jax.errors import Collapsed, missing_extras
from dino_jax.health import monitor
from dino_jax.provenance import flat, plain

Scalars = Mapping[str, float]


class RunInfo(NamedTuple):
    """What writers need to know about a run."""

    workdir: Path
    config: ConfigDict
    total_steps: int
    steps_per_epoch: int
    start_step: int  # 0, or the step after which the run resumes: later log entries are stale
    images: int = 0  # in the training source; 0: unknown


class Writer(Protocol):
    """Receives the scalars of one step at a time, in order."""

    def write(self, step: int, scalars: Scalars) -> None:
        """Records the scalars. Raises OSError where the disk refuses."""

    def note(self, step: int, text: str) -> None:
        """Records a line about the run's health. Raises OSError where the disk refuses."""

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Records a picture, uint8 [H, W, 3]. Raises OSError where the disk refuses."""

    def close(self) -> None:
        """Flushes and releases what the writer holds."""


class ConsoleWriter:
    """Prints a line per step.

    With a `loss` among the scalars it is a progress line: position, loss, `images_per_second`, `data_wait` and the time
    left at the run's mean pace, evaluations and saves included. Without one it shows all scalars.
    """

    def __init__(self, run: RunInfo):
        self._run = run
        self._pace_from = (run.start_step, time.monotonic())
        self._first_line = True

    def write(self, step: int, scalars: Scalars) -> None:
        """Prints the line."""
        position = [f"step {step:,}/{self._run.total_steps:,}", f"epoch {step / self._run.steps_per_epoch:.1f}"]
        if "loss" in scalars:
            shown = [*_progress(scalars), f"ETA {self._time_left(step)}"]
        else:
            shown = [f"{name} {value:.4g}" for name, value in scalars.items()]
        print("  ".join([*position, *shown]), flush=True)

    def note(self, step: int, text: str) -> None:
        """Prints it."""
        print(text, flush=True)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Prints nothing."""

    def close(self) -> None:
        """Nothing to release."""

    def _time_left(self, step: int) -> str:
        now = time.monotonic()
        from_step, from_time = self._pace_from
        if self._first_line:  # the pace so far was mostly that of compilation
            self._first_line, self._pace_from = False, (step, now)
            return "?"
        return format_duration((now - from_time) / (step - from_step) * (self._run.total_steps - step))


class JsonlWriter:
    """Appends a JSON object per step to `workdir/metrics.jsonl`, with null for a value that is not finite."""

    def __init__(self, run: RunInfo):
        path = run.workdir / "metrics.jsonl"
        _drop_from(path, _first_step(run))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)

    def write(self, step: int, scalars: Scalars) -> None:
        """Appends the line and flushes it."""
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self._append({"step": step, **finite})

    def note(self, step: int, text: str) -> None:
        """Appends a line {"step", "health"}."""
        self._append({"step": step, "health": text})

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes nothing: the run keeps its pictures in files of their own."""

    def _append(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoardWriter:
    """Writes event files to `workdir/tensorboard`, and tells TensorBoard to drop steps beyond the one resumed from."""

    def __init__(self, run: RunInfo):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import image, scalar, text

        self._event, self._scalar, self._text, self._image = Event, scalar, text, image
        (run.workdir / "tensorboard").mkdir(parents=True, exist_ok=True)
        # Events are written at once: the thread of SummaryWriter would die of a full disk, and its queue then block the
        # run forever.
        self._events = EventsWriter(str(run.workdir / "tensorboard" / "events"))
        purge = SessionLog(status=SessionLog.START)  # of all steps from this one on
        self._events.write_event(Event(wall_time=time.time(), step=_first_step(run), session_log=purge))

    def write(self, step: int, scalars: Scalars) -> None:
        """Writes an event per scalar and flushes them."""
        for name, value in scalars.items():
            self._add(step, self._scalar(name, value))
        self._events.flush()

    def note(self, step: int, text: str) -> None:
        """Writes it as text, under `health`."""
        self._add(step, self._text("health", text))
        self._events.flush()

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes it under `pictures`."""
        self._add(step, self._image(f"pictures/{name}", image, dataformats="HWC"))
        self._events.flush()

    def close(self) -> None:
        """Closes the file."""
        self._events.close()

    def _add(self, step: int, summary: Any) -> None:
        self._events.write_event(self._event(wall_time=time.time(), step=step, summary=summary))


class WandbWriter:
    """Logs to Weights & Biases: offline, to `workdir/wandb`, unless WANDB_MODE says otherwise.

    A resumed run keeps its id (`workdir/wandb/id`), so that `wandb sync` joins its parts.
    """

    def __init__(self, run: RunInfo):
        with missing_extras():
            import wandb
        id_file = run.workdir / "wandb" / "id"
        if not id_file.is_file():
            with atomic.file(id_file) as unfinished:
                unfinished.write_text(secrets.token_hex(4), encoding="utf-8")
        os.environ.setdefault("WANDB_MODE", "offline")
        self._run = wandb.init(
            project="dino_jax",
            id=id_file.read_text(encoding="utf-8"),
            dir=run.workdir,
            config=plain(run.config),
            resume="allow",
            # The console and the machine's load are not part of what was asked to be logged.
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True, x_disable_meta=True),
        )

    def write(self, step: int, scalars: Scalars) -> None:
        """Logs the scalars under their step."""
        self._run.log(dict(scalars), step=step)

    def note(self, step: int, text: str) -> None:
        """Keeps the last one in the run's summary."""
        self._run.summary["health"] = text

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Logs it under `pictures`."""
        import wandb

        self._run.log({f"pictures/{name}": wandb.Image(image)}, step=step)

    def close(self) -> None:
        """Ends the run, which flushes it."""
        self._run.finish()


WRITERS: dict[str, Callable[[RunInfo], Writer]] = {
    "console": ConsoleWriter,
    "jsonl": JsonlWriter,
    "tensorboard": TensorBoardWriter,
    "wandb": WandbWriter,
}


class Logger:
    """Hands scalars to the writers that config.writers names. Only process 0 writes; elsewhere all methods do nothing.

    When a run resumes, JSON and TensorBoard drop what an earlier process logged after that step. It is a context
    manager that closes its writers. Raises UserError where the disk refuses.

    A `Monitor` reads along. Its notes go to the writers and its report to WORKDIR/health.json.
    """

    def __init__(self, run: RunInfo):
        self._workdir = run.workdir
        self._active = jax.process_index() == 0
        self._writers: list[Writer] = []
        if self._active:
            with atomic.disk_errors(run.workdir):
                run.workdir.mkdir(parents=True, exist_ok=True)
                self._writers = [WRITERS[name](run) for name in run.config.writers.split(",") if name]
        earlier = on_first(lambda: _logged_before(run))
        self._monitor = monitor.of_log(flat(plain(run.config)), run.total_steps, run.images, earlier)
        self._stop = run.config.get("health", {}).get("stop", "never")

    def log(self, step: int, results: Mapping[str, Any]) -> None:
        """Records scalars (anything that `float` takes) and pictures (uint8 [H, W, 3]) of one step.

        All processes must call it. Pictures also become files, WORKDIR/pictures/NAME-STEP.png.

        Raises:
            UserError: the disk refuses.
            Collapsed: the run has collapsed, and config.health.stop is `collapse`.
        """
        pictures = {name: value for name, value in results.items() if np.ndim(value) == 3}
        values = {name: float(value) for name, value in results.items() if name not in pictures}
        step = int(step)
        for name, picture in pictures.items():
            self._picture(step, name, picture)
        if not values:
            return
        notes = self._monitor.update(step, values)
        if self._active:
            with atomic.disk_errors(self._workdir):
                for writer in self._writers:
                    writer.write(step, values)
                    for note in notes:
                        writer.note(step, note)
                atomic.rewrite_json(self._workdir / "health.json", self._monitor.report())
        if self._stop == "collapse" and (evidence := self._monitor.collapse):
            raise Collapsed(f"the run has collapsed at step {step:,}: {evidence}; see {self._workdir}/health.json")

    def _picture(self, step: int, name: str, picture: np.ndarray) -> None:
        if self._active:
            path = self._workdir / "pictures" / f"{name}-{step:09}.png"
            atomic.write_picture(path, Image.fromarray(picture))
            with atomic.disk_errors(self._workdir):
                for writer in self._writers:
                    writer.picture(step, name, picture)

    def summary(self) -> str:
        """One line on the health of the run so far."""
        return self._monitor.summary()

    def info(self, text: str) -> None:
        """Prints a line."""
        if self._active:
            print(text, flush=True)

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, *error: object) -> None:
        for writer in self._writers:
            writer.close()


def _progress(values: Scalars) -> Iterator[str]:
    yield f"loss {values['loss']:.3f}"
    if "images_per_second" in values:
        yield f"{values['images_per_second']:,.0f} images/s"
    if "data_wait" in values:
        yield f"data wait {values['data_wait']:.1%}"


def format_duration(seconds: float) -> str:
    """7:12 for 432 seconds, 1:00:05 for 3605."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _logged_before(run: RunInfo) -> list[dict[str, Any]]:
    """Returns what earlier processes of a resumed run logged."""
    path = run.workdir / "metrics.jsonl"
    rows = read_metrics(path) if run.start_step and path.exists() else []
    return [row for row in rows if row["step"] < _first_step(run)]


def _first_step(run: RunInfo) -> int:
    """Returns the first step that this process logs. A run from the start evaluates before step 1, as step 0."""
    return run.start_step + 1 if run.start_step else 0


def _drop_from(path: Path, step: int) -> None:
    """Rewrites the JSON lines without those from `step` on and without a half-written line."""
    if path.exists():
        kept = [json.dumps(row) + "\n" for row in read_metrics(path) if row["step"] < step]
        with atomic.file(path) as rewritten:
            rewritten.write_text("".join(kept), encoding="utf-8")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a metrics.jsonl that have a step. Other lines are cut off or not a run's: left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int | float):
                rows.append(row)
    return rows
