"""What a run says about itself: a progress line, metrics.jsonl, TensorBoard."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from dino_jax import atomic


class Logger:
    """Appends scalars to `workdir/metrics.jsonl` and `workdir/tensorboard`, and prints a progress line.

    Only process 0 writes; on the others every method does nothing. A run that resumes at `start_step` first drops what
    an earlier run logged beyond that step, so that no step is there twice.
    """

    def __init__(self, workdir: str | Path, total_steps: int, steps_per_epoch: int, start_step: int = 0):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        self._total_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._pace_from = (start_step, time.monotonic())
        self._first_line = True
        workdir = Path(workdir)
        self._workdir = workdir
        (workdir / "tensorboard").mkdir(parents=True, exist_ok=True)
        _drop_after(workdir / "metrics.jsonl", start_step if start_step else -1)  # a fresh run logs step 0 itself
        self._jsonl = open(workdir / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)
        # Written at once: SummaryWriter's thread would die of a full disk, and its queue then block the run for ever.
        self._tensorboard = EventsWriter(str(workdir / "tensorboard" / "events"))
        purge_later = SessionLog(status=SessionLog.START)
        self._tensorboard.write_event(Event(wall_time=time.time(), step=start_step + 1, session_log=purge_later))

    def log(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Records the scalars (whatever `float` takes) of one step; JSON holds null for a value that is not finite.

        With a `loss` among them the line on the console is the progress line, which also shows `images_per_second` and
        `data_wait` (see `Rate`); without one it shows all the scalars.
        """
        if not self._active:
            return
        step, values = int(step), {name: float(value) for name, value in scalars.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with atomic.disk_errors(self._workdir):
            self._jsonl.write(json.dumps({"step": step, **finite}) + "\n")
            self._jsonl.flush()
            for name, value in values.items():
                self._tensorboard.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
            self._tensorboard.flush()
        position = [f"step {step:,}/{self._total_steps:,}", f"epoch {step / self._steps_per_epoch:.1f}"]
        if "loss" in values:
            self.info("  ".join([*position, *_progress(values), f"ETA {self._time_left(step)}"]))
        else:
            self.info("  ".join([*position, *(f"{name} {value:.4g}" for name, value in values.items())]))

    def info(self, text: str) -> None:
        """Prints one line on the same console."""
        if self._active:
            print(text, flush=True)

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._active:
            self._jsonl.close()
            self._tensorboard.close()

    def _time_left(self, step: int) -> str:
        """h:mm:ss at the run's mean pace, evaluations and saves included."""
        now = time.monotonic()
        from_step, from_time = self._pace_from
        if self._first_line:  # until here the pace was mostly that of compilation
            self._first_line, self._pace_from = False, (step, now)
            return "?"
        return format_duration((now - from_time) / (step - from_step) * (self._total_steps - step))


def _progress(values: Mapping[str, float]) -> Iterator[str]:
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


def _drop_after(path: Path, last_step: int) -> None:
    """Rewrites the JSON lines without those of later steps and without a line that was cut off half-written."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            continue
    with atomic.file(path) as rewritten:
        rewritten.write_text("".join(kept), encoding="utf-8")


class Rate:
    """Images, seconds and seconds lost waiting for data between two readings.

        with rate.waiting(busy):
            batch = next(batches)
        rate.add(batch_size)
        ...
        logger.log(step, {"loss": loss, **rate.read()})

    Steps are dispatched asynchronously: read it after something has waited for the device, as `float(loss)` does.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        """Starts a new interval; call it after what is not training (an evaluation), which would spoil the rate."""
        self._start, self._waited, self._images = self._clock(), 0.0, 0

    @contextmanager
    def waiting(self, busy: Callable[[], bool]) -> Iterator[None]:
        """Counts the time of its block as lost, unless at its end the devices are busy() still with the step before."""
        start = self._clock()
        try:
            yield
        finally:
            if not busy():
                self._waited += self._clock() - start

    def add(self, images: int) -> None:
        """Counts the images of one step (of the global batch)."""
        self._images += images

    def read(self) -> dict[str, float]:
        """images_per_second and data_wait (a fraction of the time) since the last reading, then starts anew."""
        seconds = max(self._clock() - self._start, 1e-9)
        rates = {"images_per_second": self._images / seconds, "data_wait": self._waited / seconds}
        self.reset()
        return rates
