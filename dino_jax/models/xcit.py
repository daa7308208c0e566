"""XCiT (El-Nouby et al., NeurIPS 2021): attention between channels instead of tokens, so its cost is linear in tokens.

A convolutional patch embedding, Fourier features as positions (for any image size), blocks of cross-covariance
attention, local patch interaction and an MLP, and then two class-attention blocks (CaiT, Touvron et al., 2021) in which
only CLS attends. Shapes: `B` images, `N` patches, `D` embedding, `h` heads, `d` = D / h channels of a head.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dino_jax.models.blocks import LayerScale, Mlp, Projection, normal_init
from dino_jax.models.head import l2_normalize
from dino_jax.models.layers import BatchNorm, gelu, torch_uniform
from dino_jax.models.tokens import Tokens

PATCH_SIZES = (8, 16)  # 3 or 4 convolutions of stride 2
FREQUENCIES = 32  # Fourier features of each axis

Axes = str | tuple[str, ...] | None


class CrossCovarianceAttention(nn.Module):
    """Attention whose weights are a softmax over the covariance of a head's channels; softmax in float32."""

    num_heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        B, N, D = x.shape
        temperature = self.param("temperature", nn.initializers.ones, (self.num_heads, 1, 1))
        qkv = Projection(3, self.dtype, name="qkv")(x).reshape(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.transpose(2, 0, 3, 4, 1)  # [B, h, d, N]
        q, k = (l2_normalize(part.astype(jnp.float32)) for part in (q, k))
        weights = jax.nn.softmax(q @ k.swapaxes(2, 3) * temperature, axis=-1)
        y = (weights.astype(self.dtype) @ v).transpose(0, 3, 1, 2).reshape(B, N, D)
        return Projection(1, self.dtype, name="proj")(y)


class LocalPatchInteraction(nn.Module):
    """Two 3x3 convolutions of each channel over the grid of patches."""

    axis_name: Axes
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, grid: tuple[int, int], train: bool) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        B, _, D = x.shape
        y = x.reshape(B, *grid, D)
        y = gelu(_depthwise(D, self.dtype, "conv1")(y))
        y = BatchNorm(self.axis_name, dtype=self.dtype, name="bn")(y, train)
        return _depthwise(D, self.dtype, "conv2")(y).reshape(x.shape)


def _depthwise(channels: int, dtype: jnp.dtype, name: str) -> nn.Conv:
    return nn.Conv(
        channels,
        (3, 3),
        padding=1,
        feature_group_count=channels,
        kernel_init=torch_uniform(),
        dtype=dtype,
        name=name,
    )


class XCiTBlock(nn.Module):
    """Cross-covariance attention, local patch interaction and an MLP, each in a scaled residual branch."""

    num_heads: int
    layer_scale: float
    axis_name: Axes
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, grid: tuple[int, int], train: bool) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        y = CrossCovarianceAttention(self.num_heads, self.dtype, name="attn")(_norm(self.dtype, "norm1")(x))
        x = x + LayerScale(self.layer_scale, self.dtype, name="gamma1")(y)
        y = LocalPatchInteraction(self.axis_name, self.dtype, name="local_mp")(
            _norm(self.dtype, "norm3")(x), grid, train
        )
        x = x + LayerScale(self.layer_scale, self.dtype, name="gamma3")(y)
        y = Mlp(4 * x.shape[-1], self.dtype, name="mlp")(_norm(self.dtype, "norm2")(x))
        return x + LayerScale(self.layer_scale, self.dtype, name="gamma2")(y)


class ClassAttention(nn.Module):
    """Self-attention whose only query is CLS, softmax in float32."""

    num_heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, 1+N, D] -> [B, 1, D]."""
        B, tokens, D = x.shape
        qkv = Projection(3, self.dtype, name="qkv")(x).reshape(B, tokens, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # [B, h, 1+N, d]
        q = q[:, :, :1] * q.shape[-1] ** -0.5
        scores = jnp.matmul(q, k.swapaxes(2, 3), preferred_element_type=jnp.float32)
        y = jax.nn.softmax(scores, axis=-1).astype(self.dtype) @ v
        return Projection(1, self.dtype, name="proj")(y.swapaxes(1, 2).reshape(B, 1, D))


class ClassAttentionBlock(nn.Module):
    """Class attention and an MLP for CLS. As in the reference, patches receive their own norms as residuals."""

    num_heads: int
    layer_scale: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, 1+N, D] -> [B, 1+N, D]."""
        y = _norm(self.dtype, "norm1")(x)
        y = jnp.concatenate([ClassAttention(self.num_heads, self.dtype, name="attn")(y), y[:, 1:]], axis=1)
        x = x + LayerScale(self.layer_scale, self.dtype, name="gamma1")(y)
        x = _norm(self.dtype, "norm2")(x)
        y = Mlp(4 * x.shape[-1], self.dtype, name="mlp")(x[:, :1])
        y = LayerScale(self.layer_scale, self.dtype, name="gamma2")(y)
        return x + jnp.concatenate([y, x[:, 1:]], axis=1)


class XCiT(nn.Module):
    """The backbone, for images of any size. Has no attention maps of patches, because channels attend."""

    embed_dim: int
    depth: int
    layer_scale: float
    num_heads: int = 8
    patch_size: int = 16
    axis_name: Axes = None  # mesh axes over which batch norm averages
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, drop_path: None = None) -> Tokens:
        """[B, H, W, C] -> tokens after class attention and the final norm. Ignores `drop_path`."""
        x = self._patches(images, train)
        B, rows, columns, D = x.shape
        projection = nn.Conv(D, (1, 1), kernel_init=torch_uniform(), dtype=self.dtype, name="pos_embedder")
        x = x + projection(jnp.asarray(fourier_features(rows, columns))[None])
        x = x.reshape(B, rows * columns, D)
        for i in range(self.depth):
            block = XCiTBlock(self.num_heads, self.layer_scale, self.axis_name, self.dtype, name=f"block{i}")
            x = block(x, (rows, columns), train)
        cls_token = self.param("cls_token", normal_init, (1, 1, D))
        x = jnp.concatenate([jnp.broadcast_to(cls_token, (B, 1, D)).astype(self.dtype), x], axis=1)
        for i in range(2):
            x = ClassAttentionBlock(self.num_heads, self.layer_scale, self.dtype, name=f"cls_attn_block{i}")(x)
        x = _norm(self.dtype, "norm")(x)
        return Tokens(cls=x[:, 0], registers=x[:, 1:1], patches=x[:, 1:], grid=(rows, columns))

    def last_blocks(self, images: jax.Array, n: int = 1) -> list[Tokens]:
        """[B, H, W, C] -> tokens of the last block. n must be 1, because CLS only enters after the blocks."""
        if n != 1:
            raise ValueError(f"an XCiT returns the tokens of its last block, not of {n}")
        return [self(images)]

    def _patches(self, images: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, C] -> [B, rows, columns, D]: strided 3x3 convolutions that double the channels each time."""
        count = int(math.log2(self.patch_size))
        x = images.astype(self.dtype)
        for i in range(count):
            width = self.embed_dim // 2 ** (count - 1 - i)
            x = nn.Conv(
                width,
                (3, 3),
                2,
                padding=1,
                use_bias=False,
                kernel_init=torch_uniform(),
                dtype=self.dtype,
                name=f"patch_embed_conv{i}",
            )(x)
            x = BatchNorm(self.axis_name, dtype=self.dtype, name=f"patch_embed_bn{i}")(x, train)
            x = gelu(x) if i < count - 1 else x
        return x


def _norm(dtype: jnp.dtype, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-6, dtype=dtype, name=name)


def fourier_features(rows: int, columns: int) -> np.ndarray:
    """Returns sines and cosines of row and column, in (0, 2 pi] over the image, float32 [rows, columns, 64]."""
    period = 10_000 ** (2 * (np.arange(FREQUENCIES) // 2) / FREQUENCIES)

    def axis(size: int) -> np.ndarray:
        angles = np.arange(1, size + 1)[:, None] / (size + 1e-6) * 2 * math.pi / period
        return np.where(np.arange(FREQUENCIES) % 2 == 0, np.sin(angles), np.cos(angles))

    y = np.broadcast_to(axis(rows)[:, None], (rows, columns, FREQUENCIES))
    x = np.broadcast_to(axis(columns)[None], (rows, columns, FREQUENCIES))
    return np.concatenate([y, x], axis=-1).astype(np.float32)
