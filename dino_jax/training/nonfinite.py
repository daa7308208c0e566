"""Skips steps with a non-finite loss or gradient: counts them, and ends the run after too many in a row.

The step itself then leaves the state unchanged (`step.train_step`). Here the host acts on what it reports.
"""

import json
import math
from collections import deque
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from dino_jax import provenance
from dino_jax.data.sources import Source
from dino_jax.errors import NotFiniteError, UserError

WINDOW = 1_000  # steps whose gradient norms give the quantile
FEW = 100  # norms that make a quantile
NAMED = 8  # images that a message lists


class StepGuard:
    """Checks each step's metrics, in order.

    The caller keeps `last_saved` up to date: the step of the last checkpoint, 0 if the run has none.
    """

    def __init__(self, config: ConfigDict, workdir: str | Path, source: Source, last_saved: int):
        self.last_saved = last_saved
        self._config, self._workdir, self._source = config, workdir, source
        self._skipped: list[int] = []  # steps
        self._in_a_row = 0
        self._norms: deque[float] = deque(maxlen=WINDOW)

    def check(self, step: int, values: dict[str, float], index: np.ndarray) -> dict[str, float]:
        """Returns scalars to log beside the step's own `values`: skipped_steps and grad_norm_q99.

        skipped_steps counts since the process started. grad_norm_q99 is the 0.99 quantile of the gradient norms of the
        last `WINDOW` steps that were not skipped. index: int32 [b], this process's records of the step, as in
        `pipeline.Batch`. Raises NotFiniteError, after writing a file for `dino-jax replay`, if the parameters are not
        finite, which nothing repairs, or if more than config.optim.max_skipped steps in a row were skipped.
        """
        if values["skipped"]:
            self._skipped.append(step)
            self._in_a_row += 1
        else:
            self._in_a_row = 0
            self._norms.append(values["grad_norm"])
        if not math.isfinite(values["param_norm"]) or self._in_a_row > self._config.optim.max_skipped:
            self._give_up(step, values, index)
        if values["skipped"] and jax.process_index() == 0:
            said = f"loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g}"
            print(
                f"step {step:,} is skipped ({said}): {self._in_a_row} in a row, {len(self._skipped)} in all", flush=True
            )
        quantile = {"grad_norm_q99": float(np.quantile(self._norms, 0.99))} if self._norms else {}
        return {"skipped_steps": float(len(self._skipped))} | quantile

    def max_grad_norm(self) -> np.float32:
        """The gradient norm above which the next step is skipped: config.optim.skip_above times the quantile."""
        times = self._config.optim.skip_above
        if not times or len(self._norms) < FEW:
            return np.float32(np.inf)
        return np.float32(times * np.quantile(self._norms, 0.99))

    def _give_up(self, step: int, values: dict[str, float], index: np.ndarray) -> None:
        before = [other for other in self._skipped if self.last_saved < other < step]
        file = write_replay_file(self._workdir, self._config, self._source, step, self.last_saved, before, index)
        names = ", ".join(self._source.name(int(record)) for record in index[:NAMED])
        what = next(
            (name for name in ("loss", "grad_norm", "param_norm") if not math.isfinite(values[name])), "grad_norm"
        )
        row = f", after {self._in_a_row - 1} others in a row that were skipped" if self._in_a_row > 1 else ""
        raise NotFiniteError(
            f"{what} is {values[what]} at step {step:,} (loss {values['loss']:.4g}, gradient norm "
            f"{values['grad_norm']:.3g}){row}: the last checkpoint is kept; try a lower --config.optim.lr or "
            f"--config.dtype=float32, or look: dino-jax replay {file}; its images: {names}"
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

    saved: the step of the last checkpoint, 0 for none. skipped: the steps since then that changed nothing. index: int32
    [b], this process's records of `step`.
    """
    path = Path(workdir) / f"replay-{step}.json"
    if jax.process_count() > 1:  # process p has the places p, p + n, ... of the batch
        index = np.asarray(multihost_utils.process_allgather(np.asarray(index))).T.reshape(-1)
    told = {
        "step": step,
        "seed": config.seed,
        "checkpoint": saved,
        "skipped": skipped,
        "images": [{"record": int(record), "name": source.name(int(record))} for record in index],
        "versions": provenance.versions(),
        "config": provenance.plain(config),
    }
    if jax.process_index() == 0:
        path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return path


def read_replay_file(file: str | Path) -> dict[str, Any]:
    """What `write_replay_file` wrote. Raises UserError if the file is something else."""
    try:
        told = json.loads(Path(file).read_text(encoding="utf-8"))
        return {name: told[name] for name in ("step", "seed", "checkpoint", "skipped", "images", "versions", "config")}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} is no replay file ({type(error).__name__}): give WORKDIR/replay-STEP.json") from error
