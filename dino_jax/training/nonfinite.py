"""Skips steps with a non-finite loss or gradient: counts them, and ends the run after too many in a row.

The step itself leaves the state unchanged (`step.train_step`). This module is the host's part: it acts on the metrics.
"""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from dino_jax import atomic, provenance
from dino_jax.data.sources import Source
from dino_jax.errors import NotFiniteError, UserError
from dino_jax.json_files import OBJECT, SIZE, WHOLE, Kind, read_object

NAMED = 8  # images that a message lists
STEPS = Kind("a list of steps", lambda value: isinstance(value, list) and all(map(WHOLE.fits, value)))
IMAGES = Kind(
    "a list of images",
    lambda value: isinstance(value, list) and all(isinstance(one, dict) and "name" in one for one in value),
)


class StepGuard:
    """Checks each step's metrics, in order.

    The caller updates `last_saved`, the step of the last checkpoint (0 if the run has none).
    """

    def __init__(self, config: ConfigDict, workdir: str | Path, source: Source, last_saved: int):
        self.last_saved = last_saved
        self._config, self._workdir, self._source = config, workdir, source
        self._skipped: list[int] = []  # steps
        self._in_a_row = 0

    def check(self, step: int, values: dict[str, float], index: np.ndarray) -> dict[str, float]:
        """Checks a step and returns a further scalar to log: skipped_steps, those since the process started.

        Args:
            step: number of the step.
            values: the step's metrics.
            index: int32 [b], this process's records of the step, as in `pipeline.Batch`.

        Raises:
            NotFiniteError: the parameters are not finite, from which a run cannot recover, or more than
                config.optim.max_skipped steps in a row were skipped. A file for `dino-jax replay` is written first.
        """
        if values["skipped"]:
            self._skipped.append(step)
            self._in_a_row += 1
        else:
            self._in_a_row = 0
        if not math.isfinite(values["param_norm"]) or self._in_a_row > self._config.optim.max_skipped:
            self._give_up(step, values, index)
        if values["skipped"] and jax.process_index() == 0:
            reason = f"loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g}"
            counts = f"{self._in_a_row} in a row, {len(self._skipped)} in total"
            print(f"step {step:,} is skipped ({reason}): {counts}", flush=True)
        return {"skipped_steps": float(len(self._skipped))}

    def finish(self, step: int) -> None:
        """Raises NotFiniteError if the last steps were all skipped: the run would pass for a trained model."""
        if self._in_a_row > 1:
            raise NotFiniteError(
                f"the last {self._in_a_row} of {step:,} steps were all skipped, so the run is not finished: the last "
                "checkpoint is kept; try a lower --config.optim.lr or --config.dtype=float32"
            )

    def _give_up(self, step: int, values: dict[str, float], index: np.ndarray) -> None:
        before = [other for other in self._skipped if self.last_saved < other < step]
        try:
            file = write_replay_file(self._workdir, self._config, self._source, step, self.last_saved, before, index)
            replay = f"find the cause with: dino-jax replay {file}"
        except UserError as error:
            replay = f"the file for dino-jax replay is missing ({error})"
        names = ", ".join(self._source.name(int(record)) for record in index[:NAMED])
        what = next(
            (name for name in ("loss", "grad_norm", "param_norm") if not math.isfinite(values[name])), "grad_norm"
        )
        row = f", after {self._in_a_row - 1} other skipped steps in a row" if self._in_a_row > 1 else ""
        raise NotFiniteError(
            f"{what} is {values[what]} at step {step:,} (loss {values['loss']:.4g}, gradient norm "
            f"{values['grad_norm']:.3g}){row}: the last checkpoint is kept; try a lower --config.optim.lr or "
            f"--config.dtype=float32; {replay}; its images: {names}"
            f"{', ...' if len(index) > NAMED else ''}"
        )


def write_replay_file(
    workdir: str | Path,
    config: ConfigDict,
    source: Source,
    step: int,
    saved: int,
    skipped: list[int],
    index: np.ndarray,
) -> Path:
    """Writes `workdir/replay-STEP.json` on process 0 and returns its path. All processes must call it.

    Args:
        workdir: the run's folder.
        config: the run's config.
        source: the training images.
        step: the step to replay.
        saved: step of the last checkpoint, 0 for none.
        skipped: the steps since then that were skipped.
        index: int32 [b], this process's records of `step`.
    """
    path = Path(workdir) / f"replay-{step}.json"
    if jax.process_count() > 1:  # process p has the rows p, p + n, ... of the batch
        index = np.asarray(multihost_utils.process_allgather(np.asarray(index))).T.reshape(-1)
    contents = {
        "step": step,
        "seed": config.seed,
        "checkpoint": saved,
        "skipped": skipped,
        "images": [{"record": int(record), "name": source.name(int(record))} for record in index],
        "versions": provenance.versions(),
        "config": provenance.plain(config),
    }
    if jax.process_index() == 0:
        atomic.write_json(path, contents)
    return path


def read_replay_file(file: str | Path) -> dict[str, Any]:
    """Reads a file of `write_replay_file`. Raises UserError if it is missing or something else."""
    kinds = {"step": SIZE, "seed": WHOLE, "checkpoint": WHOLE, "skipped": STEPS, "images": IMAGES, "config": OBJECT}
    return read_object(file, kinds, "give WORKDIR/replay-STEP.json")
