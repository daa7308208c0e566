"""Flax modules: backbones and the projection head. Nothing of training lives here."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn

from dino_jax.errors import UserError
from dino_jax.models import resnet, vit
from dino_jax.models.head import DINOHead

VITS = {
    "vit_nano": vit.vit_nano,
    "vit_tiny": vit.vit_tiny,
    "vit_small": vit.vit_small,
    "vit_base": vit.vit_base,
    "vit_large": vit.vit_large,
    "vit_giant": vit.vit_giant,
}
RESNETS = {"resnet18": resnet.resnet18, "resnet50": resnet.resnet50}

__all__ = ["RESNETS", "VITS", "DINOHead", "build_backbone"]


def build_backbone(
    arch: str,
    *,
    patch_size: int = 16,
    image_size: int = 224,
    remat: bool = False,
    unroll: bool = False,
    attention: str = "xla",
    dtype: jnp.dtype = jnp.float32,
    axis_name: str | tuple[str, ...] | None = None,
    gather: Callable | None = None,
) -> nn.Module:
    """The backbone named `arch`: `apply(variables, images [B, H, W, C], train) -> [B, embed_dim]`.

    Channels follow the images that it is initialized with. axis_name is the convnets', for batch norm over devices; all
    else is the ViTs': image_size is the grid of learnt positions, gather is for parameters that devices hold in parts
    (`fsdp.gather`).

    Raises UserError for an unknown name.
    """
    if arch in VITS:
        return VITS[arch](
            patch_size=patch_size,
            image_size=image_size,
            remat=remat,
            unroll=unroll,
            attention=attention,
            dtype=dtype,
            gather=gather,
        )
    if arch in RESNETS:
        return RESNETS[arch](axis_name=axis_name, dtype=dtype)
    raise UserError(f"unknown architecture {arch!r}: set --config.model.arch to one of {', '.join([*VITS, *RESNETS])}")
