"""What a run remembers of its last steps.

It is part of the saved state. A resumed run therefore decides as the uninterrupted run would, and can say what it
changes. Outliers among the gradient norms are found by their quantile.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dino_jax.health import signals
from dino_jax.training.schedules import Values

WINDOW = 1_000  # last steps whose gradient norms determine the quantile
FEW = 100  # fewest norms for a meaningful limit

# Schedules whose last values are kept: changing these changes the checkpoints' layout.
SCHEDULED = ("lr", "weight_decay", "teacher_momentum", "teacher_temp", "last_layer_frozen")

Recent = dict[str, Any]


def init(prototypes: int) -> Recent:
    """Returns the memory of no step.

    "grad_norms" is float32 [WINDOW], where -1 stands for a missing norm; "scheduled" holds the float32 scalars of
    SCHEDULED at the last step; "winners" is float32 [prototypes], see `signals.remember_winners`.
    """
    scheduled = {name: jnp.float32(0) for name in SCHEDULED}
    norms, winners = jnp.full(WINDOW, -1, jnp.float32), jnp.zeros(prototypes, jnp.float32)
    return {"grad_norms": norms, "scheduled": scheduled, "winners": winners}


def add(
    recent: Recent, step: jax.Array, now: Values, grad_norm: jax.Array, skipped: jax.Array, winners: jax.Array
) -> Recent:
    """Remembers a step, int32 []: its norm replaces the oldest. A skipped step leaves none, so spikes do not count."""
    norms = recent["grad_norms"].at[step % WINDOW].set(jnp.where(skipped, -1, grad_norm))
    scheduled = {name: jnp.float32(getattr(now, name)) for name in SCHEDULED}
    before = recent["winners"]
    lately = jnp.where(skipped, before, signals.remember_winners(before, winners))
    return {"grad_norms": norms, "scheduled": scheduled, "winners": lately}


def quantile(recent: Recent) -> jax.Array:
    """Returns the 0.99 quantile of the norms of the last WINDOW steps that were not skipped; NaN if there are none."""
    norms = recent["grad_norms"]
    return jnp.nanquantile(jnp.where(norms < 0, jnp.nan, norms), 0.99)


def max_grad_norm(recent: Recent, times: float) -> jax.Array:
    """Returns the gradient norm above which a step is skipped: `times` the quantile.

    inf if `times` is 0 (config.optim.skip_above) or there are fewer than FEW norms.
    """
    known = (recent["grad_norms"] >= 0).sum()
    return jnp.where((known >= FEW) & (times > 0), times * quantile(recent), jnp.inf)
