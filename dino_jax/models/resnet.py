"""ResNet-18 and -50 (He et al., 2016) as torchvision builds them: stride in the 3x3 convolution, symmetric padding."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from dino_jax.models.layers import BatchNorm
from dino_jax.models.tokens import Tokens

kaiming_normal = nn.initializers.variance_scaling(2, "fan_out", "normal")


def conv(features: int, kernel: int, stride: int, dtype: jnp.dtype, name: str) -> nn.Conv:
    """Convolution without bias, padded symmetrically like torch ("SAME" would shift strided convolutions)."""
    return nn.Conv(
        features,
        (kernel, kernel),
        stride,
        padding=kernel // 2,
        use_bias=False,
        kernel_init=kaiming_normal,
        dtype=dtype,
        name=name,
    )


class ResidualBlock(nn.Module):
    """Convolutions with batch norm, added to the (projected) input. `kernels`: (3, 3) basic, (1, 3, 1) bottleneck."""

    width: int
    stride: int
    kernels: tuple[int, ...]
    expansion: int
    axis_name: str | tuple[str, ...] | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, C] -> [B, H/stride, W/stride, width * expansion]; the first 3x3 convolution has the stride."""
        strided, last = self.kernels.index(3), len(self.kernels) - 1
        norm = partial(BatchNorm, self.axis_name, dtype=self.dtype)
        y = x
        for i, kernel in enumerate(self.kernels):
            width = self.width * (self.expansion if i == last else 1)
            y = conv(width, kernel, self.stride if i == strided else 1, self.dtype, name=f"conv{i + 1}")(y)
            y = norm(name=f"bn{i + 1}")(y, train)
            y = jax.nn.relu(y) if i < last else y
        if x.shape != y.shape:
            x = conv(y.shape[-1], 1, self.stride, self.dtype, name="downsample_conv")(x)
            x = norm(name="downsample_bn")(x, train)
        return jax.nn.relu(x + y)


class ResNet(nn.Module):
    """Stem, four stages, global average pooling; no classifier."""

    blocks: tuple[int, ...]
    kernels: tuple[int, ...]
    expansion: int
    axis_name: str | tuple[str, ...] | None = None
    dtype: jnp.dtype = jnp.float32

    @property
    def embed_dim(self) -> int:
        """Channels of the pooled features."""
        return 64 * 2 ** (len(self.blocks) - 1) * self.expansion

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, drop_path: None = None) -> Tokens:
        """[B, H, W, C] -> cells of the last feature map as patches, their float32 mean as cls. Ignores `drop_path`."""
        x = conv(64, 7, 2, self.dtype, name="conv1")(images.astype(self.dtype))
        x = jax.nn.relu(BatchNorm(self.axis_name, dtype=self.dtype, name="bn1")(x, train))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage, depth in enumerate(self.blocks):
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                x = ResidualBlock(
                    64 * 2**stage,
                    stride,
                    self.kernels,
                    self.expansion,
                    self.axis_name,
                    self.dtype,
                    name=f"layer{stage + 1}_{i}",
                )(x, train)
        B, rows, columns, D = x.shape
        return Tokens(
            cls=x.astype(jnp.float32).mean(axis=(1, 2)),
            registers=jnp.zeros((B, 0, D), x.dtype),
            patches=x.reshape(B, rows * columns, D),
            grid=(rows, columns),
        )

    def last_blocks(self, images: jax.Array, n: int = 1) -> list[Tokens]:
        """[B, H, W, C] -> tokens of the last feature map. n must be 1, because earlier maps have other widths."""
        if n != 1:
            raise ValueError(f"a ResNet returns one feature map, not {n}")
        return [self(images)]
