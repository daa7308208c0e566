"""The block of a vision transformer: attention and a feed-forward network, each in a residual branch.

Shapes: `B` images, `N` tokens, `D` embedding, `h` heads.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dino_jax.models.layers import gelu

normal_init = nn.initializers.normal(0.02)


class Attention(nn.Module):
    """Multi-head self-attention, softmax in float32."""

    num_heads: int
    dtype: jnp.dtype
    kernel: str

    def setup(self) -> None:
        """Declares the projections; their widths depend on the input."""
        self.qkv = Projection(3, self.dtype)
        self.proj = Projection(1, self.dtype)

    def _heads(self, x: jax.Array) -> list[jax.Array]:
        """[B, N, D] -> queries, keys and values [B, N, h, D/h]."""
        B, N, D = x.shape
        parts = jnp.split(self.qkv(x), 3, axis=-1)
        return [part.reshape(B, N, self.num_heads, D // self.num_heads) for part in parts]

    def probabilities(self, x: jax.Array) -> jax.Array:
        """[B, N, D] -> float32 [B, h, N, N]: attention weights of each token (row) over all tokens."""
        q, k, _ = self._heads(x)
        return _probabilities(q.swapaxes(1, 2), k.swapaxes(1, 2))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        q, k, v = self._heads(x)
        if self.kernel == "cudnn":
            y = _fused_attention(q, k, v)
        else:
            # Heads before tokens, so that both products are plain batched matmuls, three times faster on a CPU.
            q, k, v = (part.swapaxes(1, 2) for part in (q, k, v))
            y = (_probabilities(q, k).astype(self.dtype) @ v).swapaxes(1, 2)
        return self.proj(y.reshape(x.shape))


def _probabilities(q: jax.Array, k: jax.Array) -> jax.Array:
    """Queries and keys [B, h, N, d] -> float32 [B, h, N, N]."""
    scores = jnp.matmul(q * q.shape[-1] ** -0.5, k.swapaxes(2, 3), preferred_element_type=jnp.float32)
    return jax.nn.softmax(scores, axis=-1)


def _fused_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Queries, keys and values [B, N, h, d] -> [B, N, h, d], computed by one fused cuDNN kernel.

    JAX does not support its gradient for an odd number of tokens, and 1 + N is usually odd. An odd number is padded
    with one token, which the sequence lengths mask out.
    """
    B, N = q.shape[:2]
    q, k, v = (jnp.pad(part, ((0, 0), (0, N % 2), (0, 0), (0, 0))) for part in (q, k, v))
    length = jnp.full(B, N, jnp.int32)
    return jax.nn.dot_product_attention(
        q, k, v, query_seq_lengths=length, key_value_seq_lengths=length, implementation="cudnn"
    )[:, :N]


class Projection(nn.Module):
    """Linear map from D to `multiple` * D."""

    multiple: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., multiple * D]."""
        kernel = self.param("kernel", normal_init, (x.shape[-1], self.multiple * x.shape[-1]))
        bias = self.param("bias", nn.initializers.zeros, (self.multiple * x.shape[-1],))
        return x.astype(self.dtype) @ kernel.astype(self.dtype) + bias.astype(self.dtype)


class Mlp(nn.Module):
    """Two linear layers around an exact (erf) GELU."""

    hidden_dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        y = nn.Dense(self.hidden_dim, kernel_init=normal_init, dtype=self.dtype, name="fc1")(x)
        y = gelu(y)
        return nn.Dense(x.shape[-1], kernel_init=normal_init, dtype=self.dtype, name="fc2")(y)


class SwiGLU(nn.Module):
    """Gated linear unit with SiLU (Shazeer, 2020): w3(silu(gate) * value), where w12 computes gate and value.

    Has about as many parameters as an MLP of `hidden_dim`, as in DINOv2.
    """

    hidden_dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        width = 8 * math.ceil(int(self.hidden_dim * 2 / 3) / 8)
        y = nn.Dense(2 * width, kernel_init=normal_init, dtype=self.dtype, name="w12")(x)
        gate, value = jnp.split(y, 2, axis=-1)
        return nn.Dense(x.shape[-1], kernel_init=normal_init, dtype=self.dtype, name="w3")(jax.nn.silu(gate) * value)


FFNS: dict[str, Callable[..., Any]] = {"mlp": Mlp, "swiglu": SwiGLU}  # feed-forward networks


class LayerScale(nn.Module):
    """Multiplies each channel by a learned factor (Touvron et al., CaiT, 2021)."""

    initial: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        gamma = self.param("gamma", nn.initializers.constant(self.initial), (x.shape[-1],))
        return x * gamma.astype(self.dtype)


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)). With `layer_scale`, each branch is scaled by learned factors."""

    num_heads: int
    hidden_dim: int
    dtype: jnp.dtype
    attention_kernel: str = "xla"
    layer_scale: float = 0.0
    ffn: str = "mlp"

    def setup(self) -> None:
        """Declares the two residual branches."""
        self.norm1 = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)
        self.attn = Attention(self.num_heads, self.dtype, self.attention_kernel)
        self.norm2 = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)
        self.mlp = FFNS[self.ffn](self.hidden_dim, self.dtype)
        if self.layer_scale:
            self.ls1 = LayerScale(self.layer_scale, self.dtype)
            self.ls2 = LayerScale(self.layer_scale, self.dtype)

    def attention(self, x: jax.Array) -> jax.Array:
        """[B, N, D] -> float32 [B, h, N, N], this block's attention probabilities."""
        return self.attn.probabilities(self.norm1(x))

    def __call__(self, x: jax.Array, drop_path: jax.Array | None, collect: bool) -> tuple[jax.Array, jax.Array | None]:
        """[B, N, D] -> ([B, N, D], the same if `collect` else None). drop_path [2, B]: factors per branch and image."""
        scale = (1, 1) if drop_path is None else drop_path.astype(self.dtype)[:, :, None, None]
        branch = self.attn(self.norm1(x))
        x = x + scale[0] * (self.ls1(branch) if self.layer_scale else branch)
        branch = self.mlp(self.norm2(x))
        x = x + scale[1] * (self.ls2(branch) if self.layer_scale else branch)
        return x, x if collect else None
