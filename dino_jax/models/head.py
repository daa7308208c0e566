"""The projection head (Caron et al., 2021, section 3.1): MLP, bottleneck, weight-normalized prototypes."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dino_jax.models.layers import BatchNorm, gelu, torch_uniform


class PrototypeLayer(nn.Module):
    """Weight-normalized linear layer without bias: one unit vector per prototype, times a gain.

    If `trainable_gain` is False, the gain is fixed at 1 (the reference's `norm_last_layer`) and is not a parameter.
    """

    out_dim: int
    trainable_gain: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        """[..., bottleneck] -> float32 logits [..., K]."""
        direction = self.param("weight_v", torch_uniform(in_axis=-1, out_axis=-2), (self.out_dim, z.shape[-1]))
        gain = self.param("weight_g", nn.initializers.ones, (self.out_dim,)) if self.trainable_gain else 1.0
        # The norm is applied to the logits, not to the [K, bottleneck] weights, which writes less memory and keeps the
        # norm exact in bfloat16.
        scale = gain / jnp.linalg.norm(direction, axis=-1)
        z, direction = z.astype(self.dtype), direction.astype(self.dtype)
        return scale * jnp.einsum("...d,kd->...k", z, direction, preferred_element_type=jnp.float32)


class DINOHead(nn.Module):
    """`layers`-layer MLP to a normalized bottleneck, then the prototypes.

    The two parts are separate methods, because batch norm must see all crops together, while logits are best computed
    for a few prototypes at a time (`[B, V, K]` at K = 65,536 would be the largest array of the whole step).
    """

    out_dim: int = 65_536
    hidden_dim: int = 2_048
    bottleneck_dim: int = 256
    layers: int = 3
    use_bn: bool = False
    norm_last_layer: bool = True
    axis_name: str | tuple[str, ...] | None = None
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Declares `layers` linear layers (batch norm after all but the last) and the prototypes."""
        widths = [self.hidden_dim] * (self.layers - 1) + [self.bottleneck_dim]
        self.mlp = [nn.Dense(width, kernel_init=nn.initializers.normal(0.02), dtype=self.dtype) for width in widths]
        if self.use_bn:
            self.bn = [BatchNorm(self.axis_name, dtype=self.dtype) for _ in widths[:-1]]
        self.last_layer = PrototypeLayer(self.out_dim, not self.norm_last_layer, self.dtype)

    def bottleneck(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Backbone features [..., D] -> float32 [..., bottleneck] of length 1."""
        for i, dense in enumerate(self.mlp):
            x = dense(x)
            if i < self.layers - 1:
                x = self.bn[i](x, train) if self.use_bn else x
                x = gelu(x)
        return l2_normalize(x.astype(jnp.float32))

    def prototypes(self, z: jax.Array) -> jax.Array:
        """[..., bottleneck] -> float32 logits [..., K]."""
        return self.last_layer(z)

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Backbone features [..., D] -> float32 logits [..., K]."""
        return self.prototypes(self.bottleneck(x, train))


def prototype_logits(head: Any, last_layer: dict[str, Any], z: jax.Array) -> jax.Array:
    """Unit vectors [..., bottleneck] -> logits float32 [..., K], for all the prototypes of last_layer or a part."""
    part: Any = head.clone(out_dim=last_layer["weight_v"].shape[0])
    return part.apply({"params": {"last_layer": last_layer}}, z, method="prototypes")


def l2_normalize(x: jax.Array, epsilon: float = 1e-12) -> jax.Array:
    """x / max(|x|, epsilon) along the last axis, with a zero (not NaN) gradient at 0."""
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared, epsilon**2))
