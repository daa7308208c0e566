"""Vision transformer (Dosovitskiy et al., ICLR 2021) as the DINO and DINOv2 references build it.

Pre-norm blocks, LayerNorm eps 1e-6, exact GELU, qkv bias, a learned position embedding for each patch. DINOv2 adds
LayerScale, SwiGLU, a mask token, and register tokens (Darcet et al., 2023). Shapes: `B` images, `N` patches, `R`
registers, `D` embedding, `h` heads. The blocks are scanned: their parameters have a leading `depth` axis, so
tracing and compiling 24 blocks is as fast as one. `unroll` trades that for a faster and larger program.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dino_jax.models.blocks import Block, normal_init
from dino_jax.models.layers import torch_uniform
from dino_jax.models.positions import resize_pos_embed
from dino_jax.models.tokens import Tokens


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
    registers: int = 0  # tokens between CLS and the patches, without positions
    layer_scale: float = 0.0  # initial factors of the residual branches, as in DINOv2; 0: no LayerScale
    ffn: str = "mlp"  # or swiglu
    mask_token: bool = False  # has a token for masked patches
    antialias: bool = False  # see `resize_pos_embed`
    pos_offset: float | None = None  # see `resize_pos_embed`
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
        tiny = nn.initializers.normal(1e-6)  # DINOv2's initial CLS and registers
        self.cls_token = self.param("cls_token", tiny if self.layer_scale else normal_init, (1, 1, self.embed_dim))
        if self.registers:
            self.register_tokens = self.param("register_tokens", tiny, (1, self.registers, self.embed_dim))
        if self.mask_token:
            self.masked_patch = self.param("mask_token", nn.initializers.zeros, (1, self.embed_dim))
        self.pos_embed = self.param("pos_embed", normal_init, (1, 1 + grid * grid, self.embed_dim))
        scanned = nn.scan(
            self._block(),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=self.depth,
            unroll=self.depth if self.unroll else 1,
        )
        self.blocks = scanned(**self._block_settings())
        self.norm = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)

    def _block_settings(self) -> dict[str, Any]:
        return {
            "num_heads": self.num_heads,
            "hidden_dim": self.mlp_ratio * self.embed_dim,
            "dtype": self.dtype,
            "attention_kernel": self.attention,
            "layer_scale": self.layer_scale,
            "ffn": self.ffn,
        }

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

    def tokens(self, images: jax.Array, masks: jax.Array | None = None) -> jax.Array:
        """[B, H, W, C] -> [B, 1+R+N, D]: CLS, registers and patches, the input of the first block.

        Where `masks` (bool [B, N]) is True, the mask token takes the place of the patch. CLS and patches have position
        embeddings. If H or W is not a multiple of the patch size, the remainder is cropped, as in the DINO reference.
        """
        patches = self.patch_embed(images.astype(self.dtype))
        B, rows, columns, D = patches.shape
        patches = patches.reshape(B, rows * columns, D)
        if masks is not None:
            patches = jnp.where(masks[:, :, None], self.masked_patch.astype(self.dtype), patches)
        cls_token = jnp.broadcast_to(self.cls_token, (B, 1, D)).astype(self.dtype)
        tokens = jnp.concatenate([cls_token, patches], axis=1)
        square = images.shape[1] == images.shape[2]
        positions = resize_pos_embed(self.pos_embed, rows, columns, square, self.antialias, self.pos_offset)
        tokens = tokens + positions.astype(self.dtype)
        if not self.registers:
            return tokens
        registers = jnp.broadcast_to(self.register_tokens, (B, self.registers, D)).astype(self.dtype)
        return jnp.concatenate([tokens[:, :1], registers, tokens[:, 1:]], axis=1)

    def __call__(
        self,
        images: jax.Array,
        train: bool = False,
        drop_path: jax.Array | None = None,
        masks: jax.Array | None = None,
    ) -> Tokens:
        """[B, H, W, C] -> tokens of the last block after the final norm.

        drop_path [depth, 2, B] holds the factor of each residual branch for each image (see `drop_path_factors`).
        masks, bool [B, N], is True for patches that the mask token replaces; only with `mask_token`. `train` is
        ignored; convnets need it for batch norm.
        """
        x, _ = self.blocks(self.tokens(images, masks), drop_path, False)
        return self._normed(x, images)

    def last_blocks(self, images: jax.Array, n: int = 1) -> list[Tokens]:
        """[B, H, W, C] -> tokens after each of the last n blocks and the final norm, earliest block first."""
        x, every_block = self.blocks(self.tokens(images), None, n > 1)
        return [self._normed(x, images) for x in (every_block[-n:] if n > 1 else [x])]

    def _normed(self, x: jax.Array, images: jax.Array) -> Tokens:
        """A block's output [B, 1+R+N, D] -> tokens after the final norm.

        The norm is applied to each part separately, so that under `jax.jit` an unused part costs nothing.
        """
        grid = images.shape[1] // self.patch_size, images.shape[2] // self.patch_size
        registers, patches = x[:, 1 : 1 + self.registers], x[:, 1 + self.registers :]
        return Tokens(cls=self.norm(x[:, 0]), registers=self.norm(registers), patches=self.norm(patches), grid=grid)

    def last_attention(self, images: jax.Array) -> jax.Array:
        """[B, H, W, C] -> float32 [B, h, 1+R+N, 1+R+N], the last block's self-attention.

        Rows are queries; rows and columns are CLS, registers and patches.
        """
        x = self.tokens(images)
        if self.depth > 1:
            _, every_block = self.blocks(x, None, True)
            x = every_block[-2]
        last = jax.tree.map(lambda p: p[-1], self.variables["params"]["blocks"])
        block = Block(**self._block_settings(), parent=None)
        attention: jax.Array = block.apply({"params": last}, x, method=Block.attention)  # type: ignore[assignment]
        return attention
