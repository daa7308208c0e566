"""What a run remembers of its last steps.

It is part of the saved state, so that a resumed run decides as the uninterrupted run would. Outliers among the gradient
norms are found by their quantile.
"""

import jax
import jax.numpy as jnp

WINDOW = 1_000  # last steps whose gradient norms determine the quantile
FEW = 100  # fewest norms for a meaningful limit

Recent = dict[str, jax.Array]


def init() -> Recent:
    """Returns {"grad_norms": float32 [WINDOW]}, with -1 in place of a norm: no step yet."""
    return {"grad_norms": jnp.full(WINDOW, -1, jnp.float32)}


def add(recent: Recent, step: jax.Array, grad_norm: jax.Array, skipped: jax.Array) -> Recent:
    """Replaces the oldest norm by that of `step`, int32 []. A skipped step leaves none: no spike raises the limit."""
    norm = jnp.where(skipped, -1, grad_norm)
    return recent | {"grad_norms": recent["grad_norms"].at[step % WINDOW].set(norm)}


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
