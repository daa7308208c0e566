"""Resuming: what a run does differently from the one that saved its checkpoint is said."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dino_jax import checkpoints
from dino_jax.distributed.sharding import replicate
from dino_jax.provenance import flat, plain
from dino_jax.training import recent
from dino_jax.training.schedules import Schedules
from dino_jax.training.setup import Setup, State


def resumed(state: State, step: int, setup: Setup, mesh: Mesh, workdir: str | Path) -> tuple[tuple[State, int], str]:
    """Returns ((state, step), log lines): a restored state, and what changes from here on.

    `recent` is empty in checkpoints of earlier versions; the state then gets a fresh one.
    """
    folder = Path(workdir).resolve() / "checkpoints" / str(step)
    before = jax.device_get(state.recent.get("scheduled", {}))
    text = changes(checkpoints.read_metadata(folder)["config"], setup.config, step, before, setup.schedules)
    if not state.recent:
        state = state.replace(recent=replicate(recent.init(setup.config.head.out_dim), mesh))
    return (state, step), text


def changes(saved: Mapping[str, Any], config: ConfigDict, step: int, before: Mapping[str, Any], now: Schedules) -> str:
    """Returns a line with the changed settings and one with the schedules' jumps at `step`, each after a line break.

    Args:
        saved: the checkpoint's config, as `provenance.plain` gives it.
        config: this run's config.
        step: the last completed step.
        before: what the schedules gave at `step`, by name; empty if the checkpoint does not say.
        now: this run's schedules. They also jump if the number of images, and so of steps, has changed.
    """
    old, new = flat(saved), flat(plain(config))
    settings = [
        f"{name} {_short(old[name])} -> {_short(new[name])}" for name in new if name in old and old[name] != new[name]
    ]
    after = jax.device_get(now.at(jnp.int32(step - 1)))._asdict()
    jumps = [
        f"{name} {float(before[name]):.4g} -> {float(after[name]):.4g}"
        for name in before
        if not np.isclose(before[name], after[name], rtol=1e-4, atol=0)  # float32's rounding on other devices
    ]
    text = f"\nchanged since the checkpoint: {', '.join(settings)}" if settings else ""
    return text + (f"\nthe schedules jump at step {step:,}: {', '.join(jumps)}" if jumps else "")


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
