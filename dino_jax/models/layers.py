"""Layers that several models share: GELU, torch's initialization, batch norm over the global batch."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

# torch's default initialization of linear and convolution layers, which the reference uses in a few places: uniform in
# +-1/sqrt(fan_in), which has variance 1 / (3 fan_in).
torch_uniform = partial(nn.initializers.variance_scaling, 1 / 3, "fan_in", "uniform")


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU (Hendrycks and Gimpel, 2016), x (1 + erf(x / sqrt 2)) / 2, computed in float32, returned in x's dtype.

    In bfloat16, 1 + erf would lose all digits to cancellation. `jax.nn.gelu` uses erfc, which keeps a few more digits
    where the result is nearly 0, but costs several times as much: a tenth of a ViT-T step on a CPU.
    """
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


class BatchNorm(nn.Module):
    """Normalizes each channel over all other axes and over the devices of `axis_name`.

    Statistics are float32. This matches torch's (Synchronized) BatchNorm and differs from Flax's in three ways: the
    running variance is unbiased, momentum is the weight of the *new* value (0.1), and the mean is subtracted before
    squaring.
    """

    axis_name: str | tuple[str, ...] | None = None
    momentum: float = 0.1
    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[..., C] -> [..., C]. With `train`, uses the batch's statistics and updates the running ones."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))

        x = x.astype(jnp.float32)
        if not train:
            mean, var = running_mean.value, running_var.value
        else:
            axes = tuple(range(x.ndim - 1))
            mean = self._over_devices(x.mean(axes))
            var = self._over_devices(jnp.square(x - mean).mean(axes))
            count = x.size // channels * (jax.lax.axis_size(self.axis_name) if self.axis_name else 1)
            new = {"mean": mean, "var": var * count / max(count - 1, 1)}
            for running, value in ((running_mean, new["mean"]), (running_var, new["var"])):
                running.value += self.momentum * (jax.lax.stop_gradient(value) - running.value)
        y = (x - mean) * jax.lax.rsqrt(var + self.epsilon) * scale + bias
        return y.astype(self.dtype)

    def _over_devices(self, value: jax.Array) -> jax.Array:
        return jax.lax.pmean(value, self.axis_name) if self.axis_name else value


def apply_in_training(
    module: nn.Module, params: dict[str, Any], stats: dict[str, Any], x: jax.Array, *args: Any, **kwargs: Any
) -> Any:
    """Runs module(x, train=True, *args) and returns its output and the new batch norm statistics."""
    variables = {"params": params, "batch_stats": stats}
    y, mutated = module.apply(variables, x, True, *args, mutable=["batch_stats"], **kwargs)
    return y, mutated.get("batch_stats", stats)
