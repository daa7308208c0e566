"""Vision transformer (Dosovitskiy et al., ICLR 2021) as the DINO reference builds it.

Pre-norm blocks, LayerNorm eps 1e-6, exact GELU, qkv bias, a learned position embedding for each patch. Shapes: `B`
images, `N` patches, `D` embedding, `h` heads. The blocks are scanned: their parameters have a leading `depth` axis, so
tracing and compiling 24 blocks is as fast as one. `unroll` trades that for a faster and larger program.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dino_jax.models.layers import gelu, torch_uniform
from dino_jax.models.tokens import Tokens

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


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    num_heads: int
    hidden_dim: int
    dtype: jnp.dtype
    attention_kernel: str = "xla"

    def setup(self) -> None:
        """Declares the two residual branches."""
        self.norm1 = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)
        self.attn = Attention(self.num_heads, self.dtype, self.attention_kernel)
        self.norm2 = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)
        self.mlp = Mlp(self.hidden_dim, self.dtype)

    def attention(self, x: jax.Array) -> jax.Array:
        """[B, N, D] -> float32 [B, h, N, N], this block's attention probabilities."""
        return self.attn.probabilities(self.norm1(x))

    def __call__(self, x: jax.Array, drop_path: jax.Array | None, collect: bool) -> tuple[jax.Array, jax.Array | None]:
        """[B, N, D] -> ([B, N, D], the same if `collect` else None). drop_path [2, B]: factors per branch and image."""
        scale = (1, 1) if drop_path is None else drop_path.astype(self.dtype)[:, :, None, None]
        x = x + scale[0] * self.attn(self.norm1(x))
        x = x + scale[1] * self.mlp(self.norm2(x))
        return x, x if collect else None


class ViT(nn.Module):
    """The backbone. `image_size` only sets the grid of learned positions, which is interpolated for other sizes."""

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int = 16
    image_size: int = 224
    mlp_ratio: int = 4
    remat: bool = False
    unroll: bool = False
    attention: str = "xla"  # or cudnn: one fused kernel for NVIDIA GPUs, Ampere or newer, in bfloat16 or float16
    dtype: jnp.dtype = jnp.float32
    # If each device holds a part of the parameters: (a block's local part, dtype) -> its full parameters
    # (`fsdp.gather`).
    gather: Callable[..., Any] | None = None

    def setup(self) -> None:
        """Declares patch embedding, tokens, `depth` scanned blocks and the final norm."""
        grid = self.image_size // self.patch_size
        self.patch_embed = nn.Conv(
            self.embed_dim,
            (self.patch_size, self.patch_size),
            strides=self.patch_size,
            padding="VALID",
            dtype=self.dtype,
            kernel_init=torch_uniform(),
            bias_init=nn.initializers.zeros,
        )
        self.cls_token = self.param("cls_token", normal_init, (1, 1, self.embed_dim))
        self.pos_embed = self.param("pos_embed", normal_init, (1, 1 + grid * grid, self.embed_dim))
        scanned = nn.scan(
            self._block(),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=self.depth,
            unroll=self.depth if self.unroll else 1,
        )
        self.blocks = scanned(self.num_heads, self.mlp_ratio * self.embed_dim, self.dtype, self.attention)
        self.norm = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)

    def _block(self) -> Any:
        """Returns `Block` with its rematerialization policy.

        The policy saves the results of products with weights. Everything else (norms, attention, GELU, gathered
        parameters) is cheaper to recompute than to write and read back for each block. With `remat`, only the input of
        each block is saved. With `unroll`, XLA sees the forward and the recomputation in one program and may save more.
        """
        block = Block
        if self.gather is not None:
            gather = partial(self.gather, dtype=self.dtype)
            block = nn.map_variables(Block, "params", trans_in_fn=gather, init=self.is_initializing())
        policy = None if self.remat else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return nn.remat(block, prevent_cse=False, static_argnums=(3,), policy=policy)

    def tokens(self, images: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, 1+N, D]: CLS and patch tokens with position embeddings, the input of the first block.

        If H or W is not a multiple of the patch size, the remainder is cropped, as in the reference.
        """
        patches = self.patch_embed(images.astype(self.dtype))
        B, rows, columns, D = patches.shape
        cls_token = jnp.broadcast_to(self.cls_token, (B, 1, D)).astype(self.dtype)
        tokens = jnp.concatenate([cls_token, patches.reshape(B, rows * columns, D)], axis=1)
        square = images.shape[1] == images.shape[2]
        return tokens + resize_pos_embed(self.pos_embed, rows, columns, square).astype(self.dtype)

    def __call__(self, images: jax.Array, train: bool = False, drop_path: jax.Array | None = None) -> Tokens:
        """[B, H, W, C] -> tokens of the last block after the final norm.

        drop_path [depth, 2, B] holds the factor of each residual branch for each image (see `drop_path_factors`).
        `train` is ignored; convnets need it for batch norm.
        """
        x, _ = self.blocks(self.tokens(images), drop_path, False)
        return self._normed(x, images)

    def last_blocks(self, images: jax.Array, n: int = 1) -> list[Tokens]:
        """[B, H, W, C] -> tokens after each of the last n blocks and the final norm, earliest block first."""
        x, every_block = self.blocks(self.tokens(images), None, n > 1)
        return [self._normed(x, images) for x in (every_block[-n:] if n > 1 else [x])]

    def _normed(self, x: jax.Array, images: jax.Array) -> Tokens:
        """A block's output [B, 1+N, D] -> tokens after the final norm.

        The norm is applied to each part separately, so that under `jax.jit` an unused part costs nothing.
        """
        grid = images.shape[1] // self.patch_size, images.shape[2] // self.patch_size
        return Tokens(cls=self.norm(x[:, 0]), registers=x[:, 1:1], patches=self.norm(x[:, 1:]), grid=grid)

    def last_attention(self, images: jax.Array) -> jax.Array:
        """[B, H, W, C] -> float32 [B, h, 1+N, 1+N], the last block's self-attention: rows are queries, CLS is first."""
        x = self.tokens(images)
        if self.depth > 1:
            _, every_block = self.blocks(x, None, True)
            x = every_block[-2]
        last = jax.tree.map(lambda p: p[-1], self.variables["params"]["blocks"])
        block = Block(self.num_heads, self.mlp_ratio * self.embed_dim, self.dtype, parent=None)
        attention: jax.Array = block.apply({"params": last}, x, method=Block.attention)  # type: ignore[assignment]
        return attention


def drop_path_factors(keys: jax.Array, rate: float, depth: int, views: int) -> jax.Array:
    """Stochastic depth (Huang et al., 2016): factors float32 [depth, 2, B * views], 0 or 1 / keep.

    `keys` [B] has one key per image, so the factors do not depend on how the images are sharded. The rate grows
    linearly from 0 at the first block to `rate` at the last.
    """
    keep = 1 - jnp.linspace(0, rate, depth)[:, None, None]
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (views, depth, 2)))(keys)
    uniform = uniform.reshape(-1, depth, 2).transpose(1, 2, 0)
    return (uniform < keep) / keep


def resize_pos_embed(pos_embed: jax.Array, rows: int, columns: int, square: bool) -> jax.Array:
    """Interpolates position embeddings of a square grid: [1, 1+n, D] -> [1, 1+rows*columns, D].

    As in the reference, they stay as they are only for a `square` image (in pixels, before the rest of a patch is cut
    off) of n patches. An image of 32 x 36 pixels has the learned grid of 32 x 32, but resized positions.

    Uses torch's bicubic interpolation (a = -0.75, no antialiasing) with the reference's scale factor (side + 0.1) /
    sqrt(n), which shifts every sample slightly. Published weights expect that shift (dino `interpolate_pos_encoding`).
    """
    side = int((pos_embed.shape[1] - 1) ** 0.5)
    if square and rows * columns == side * side:
        return pos_embed
    grid = pos_embed[0, 1:].reshape(side, side, -1)
    down, across = (jnp.asarray(_bicubic(side, n, (n + 0.1) / side)) for n in (rows, columns))
    resized = jnp.einsum("yi,xj,ijd->yxd", down, across, grid, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([pos_embed[:, :1], resized.reshape(1, rows * columns, -1)], axis=1)


def _bicubic(n_in: int, n_out: int, scale: float, a: float = -0.75) -> np.ndarray:
    """Returns torch's bicubic interpolation as a matrix, float32 [n_out, n_in], with edge padding."""
    source = (np.arange(n_out) + 0.5) / scale - 0.5
    first = np.floor(source).astype(int) - 1
    weights = np.zeros((n_out, n_in), np.float32)
    for tap in range(4):
        d = np.abs(source - (first + tap))
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        column = np.clip(first + tap, 0, n_in - 1)
        np.add.at(weights, (np.arange(n_out), column), np.where(d <= 1, near, far).astype(np.float32))
    return weights
