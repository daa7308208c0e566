"""Registry of backbones: how to build each architecture and what it supports.

To add an architecture, add a line to `ARCHITECTURES`. To add a kind of backbone, add a `Family` and its module, whose
`__call__(images, train, drop_path)` returns `Tokens` and whose `last_blocks(images, n)` returns a list of `Tokens`. A
ViT's call also takes `masks`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from dino_jax.errors import UserError
from dino_jax.models.blocks import FFNS
from dino_jax.models.resnet import ResNet
from dino_jax.models.vit import ViT
from dino_jax.models.xcit import PATCH_SIZES, XCiT

BackboneModule = ViT | ResNet | XCiT

# Keys of config.model, of a model card and of a ViT's constructor. They are only used for arch `vit`.
SIZES = ("embed_dim", "depth", "num_heads")
CHANNELS_A_HEAD = 64  # in all named ViTs of the papers

# What a ViT may have beyond its sizes: keys of a model card and of a ViT's constructor, with the values of DINO's ViT,
# which cards of earlier versions mean. Those of CONFIGURED are also keys of config.model.
CONFIGURED = {"registers": 0, "layer_scale": 0.0, "ffn": "mlp", "antialias": False}
VARIANT = CONFIGURED | {"pos_offset": None, "mask_token": False}


@dataclass(frozen=True)
class Family:
    """What the architectures of one kind have in common, for code that must not depend on their modules."""

    module: Callable[..., Any]
    arguments: tuple[str, ...]  # the arguments of `build_backbone` that the module takes
    settings: tuple[str, ...]  # the keys of config.model that the family has, besides arch, in_channels and sizes
    input_layer: str  # name of the layer whose kernel reads the images' channels
    square_patches: bool  # a patch token covers patch_size x patch_size pixels
    learned_positions: bool  # has `pos_embed`, learned for the grid of image_size
    block_tokens: bool  # `last_blocks` returns up to `depth` blocks of one width, not only the last feature map
    attention_maps: bool  # has `last_attention`
    masks: bool  # `__call__` takes masks of patches
    patch_sizes: tuple[int, ...] = ()  # the only patch sizes of the family; empty: any


VIT = Family(
    module=ViT,
    arguments=("patch_size", "image_size", *VARIANT, "remat", "unroll", "attention", "dtype", "gather"),
    settings=("patch_size", *CONFIGURED, "drop_path_rate", "remat", "unroll", "attention"),
    input_layer="patch_embed",
    square_patches=True,
    learned_positions=True,
    block_tokens=True,
    attention_maps=True,
    masks=True,
)
RESNET = Family(
    module=ResNet,
    arguments=("axis_name", "dtype"),
    settings=(),
    input_layer="conv1",
    square_patches=False,
    learned_positions=False,
    block_tokens=False,
    attention_maps=False,
    masks=False,
)
XCIT = Family(
    module=XCiT,
    arguments=("patch_size", "axis_name", "dtype"),
    settings=("patch_size",),
    input_layer="patch_embed_conv0",
    square_patches=True,
    learned_positions=False,
    block_tokens=False,
    attention_maps=False,
    masks=False,
    patch_sizes=PATCH_SIZES,
)


@dataclass(frozen=True)
class Architecture:
    """A family and the sizes of its module; without sizes, the caller gives them."""

    family: Family
    sizes: Mapping[str, Any]


def _vit(embed_dim: int, depth: int, num_heads: int) -> Architecture:
    return Architecture(VIT, {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads})


ARCHITECTURES = {
    "vit_nano": _vit(64, 3, 4),  # not from a paper: small enough to train on a laptop CPU in minutes
    "vit_tiny": _vit(192, 12, 3),
    "vit_small": _vit(384, 12, 6),
    "vit_base": _vit(768, 12, 12),
    "vit_large": _vit(1024, 24, 16),
    "vit_giant": _vit(1536, 40, 24),  # DINOv2's sizes; ViT-g/14 of DINOv2 also has ffn swiglu
    "vit": Architecture(VIT, {}),  # of any `SIZES`
    "xcit_small_12": Architecture(XCIT, {"embed_dim": 384, "depth": 12, "layer_scale": 1.0}),
    "xcit_medium_24": Architecture(XCIT, {"embed_dim": 512, "depth": 24, "layer_scale": 1e-5}),
    "resnet18": Architecture(RESNET, {"blocks": (2, 2, 2, 2), "kernels": (3, 3), "expansion": 1}),
    "resnet50": Architecture(RESNET, {"blocks": (3, 4, 6, 3), "kernels": (1, 3, 1), "expansion": 4}),
}


def find_architecture(arch: str) -> Architecture:
    """Returns the architecture with this name. Raises UserError if the name is unknown."""
    if arch not in ARCHITECTURES:
        raise UserError(f"unknown architecture {arch!r}: set --config.model.arch to one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[arch]


def family_of(arch: str) -> Family:
    """Returns the family of an architecture. Raises UserError if the name is unknown."""
    return find_architecture(arch).family


def sizes_of(arch: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the sizes of an architecture's module: those of its name, or the given `SIZES` for arch `vit`."""
    return find_architecture(arch).sizes or given


def names_of(family: Family) -> list[str]:
    """Returns the names of a family's architectures that fix their sizes (all but `vit`)."""
    return [name for name, one in ARCHITECTURES.items() if one.family == family and one.sizes]


def build_backbone(
    arch: str,
    *,
    embed_dim: int = 0,
    depth: int = 0,
    num_heads: int = 0,
    patch_size: int = 16,
    image_size: int = 224,
    registers: int = 0,
    layer_scale: float = 0.0,
    ffn: str = "mlp",
    antialias: bool = False,
    pos_offset: float | None = None,
    mask_token: bool = False,
    remat: bool = False,
    unroll: bool = False,
    attention: str = "xla",
    dtype: jnp.dtype = jnp.float32,
    axis_name: str | tuple[str, ...] | None = None,
    gather: Callable[..., Any] | None = None,
) -> BackboneModule:
    """Builds the module of an architecture: `apply(variables, images [B, H, W, C], train) -> Tokens`.

    The number of channels is that of the images at initialization. A family ignores arguments that it does not have.

    Args:
        arch: a name in `ARCHITECTURES`.
        embed_dim: channels of a token; only for arch `vit`.
        depth: number of blocks; only for arch `vit`.
        num_heads: attention heads of each block; only for arch `vit`.
        patch_size: side of a patch, pixels.
        image_size: side of the images that the learned grid of positions covers, pixels.
        registers: number of register tokens.
        layer_scale: initial factors of the residual branches; 0: no LayerScale.
        ffn: mlp or swiglu.
        antialias: how positions are resized to other image sizes (`positions.resize_pos_embed`).
        pos_offset: the same.
        mask_token: add a token for masked patches, as methods need that mask patches.
        remat: recompute blocks in the backward pass.
        unroll: unroll the loop over the blocks.
        attention: xla or cudnn.
        dtype: dtype of activations.
        axis_name: mesh axes that batch norm averages over.
        gather: gathers parameters that are split over devices (`fsdp.gather`).

    Raises:
        UserError: the name is unknown, or `check_sizes` or `check_patch_size` rejects the sizes.
    """
    if ffn not in FFNS:
        raise UserError(f"unknown feed-forward network {ffn!r}: set --config.model.ffn to one of {', '.join(FFNS)}")
    family = family_of(arch)
    given = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    check_sizes(arch, given)
    check_patch_size(arch, patch_size)
    arguments = {
        "patch_size": patch_size,
        "image_size": image_size,
        "registers": registers,
        "layer_scale": layer_scale,
        "ffn": ffn,
        "antialias": antialias,
        "pos_offset": pos_offset,
        "mask_token": mask_token,
        "remat": remat,
        "unroll": unroll,
        "attention": attention,
        "dtype": dtype,
        "axis_name": axis_name,
        "gather": gather,
    }
    accepted = {name: arguments[name] for name in family.arguments}
    return family.module(**sizes_of(arch, given), **accepted)


def check_sizes(arch: str, sizes: Mapping[str, int]) -> None:
    """Raises UserError if `SIZES` are missing for arch `vit`, set for another one, or inconsistent."""
    given = [name for name in SIZES if sizes[name]]
    if ARCHITECTURES[arch].sizes:
        if given:
            wrong = " and ".join(f"model.{name}={sizes[name]}" for name in given)
            raise UserError(
                f"model.arch={arch} has fixed sizes, but {wrong} is set: "
                f"set --config.model.arch=vit, or --config.model.{given[0]}=0"
            )
        return
    if missing := [name for name in SIZES if name not in given]:
        flags = " ".join(f"--config.model.{name}=N" for name in missing)
        raise UserError(
            f"model.arch={arch} needs {', '.join(f'model.{name}' for name in SIZES)}: set {flags}, "
            f"or --config.model.arch to one of {', '.join(names_of(VIT))}"
        )
    if sizes["embed_dim"] % sizes["num_heads"]:
        raise UserError(
            f"model.embed_dim {sizes['embed_dim']} is not a multiple of model.num_heads {sizes['num_heads']}: "
            f"set --config.model.num_heads to a divisor of {sizes['embed_dim']}"
        )


def check_patch_size(arch: str, patch_size: int) -> None:
    """Raises UserError if the architecture does not have this patch size."""
    if (known := family_of(arch).patch_sizes) and patch_size not in known:
        options = " or ".join(map(str, known))
        raise UserError(f"model.arch={arch} has no patch size {patch_size}: set --config.model.patch_size to {options}")


def given_sizes(model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `SIZES` of a config's `model` section, or 0 for keys that a config of an earlier version lacks."""
    return {name: model.get(name, 0) for name in SIZES}


def given_variant(model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `CONFIGURED` part of `VARIANT` in a config's `model` section, which earlier versions lack."""
    return {name: model.get(name, plain) for name, plain in CONFIGURED.items()}


# --- model cards -----------------------------------------------------------------------------------------------------


def architecture_card(
    arch: str,
    *,
    patch_size: int = 16,
    in_channels: int,
    image_size: int,
    sizes: Mapping[str, Any] | None = None,
    **variant: Any,
) -> dict[str, Any]:
    """Returns the "architecture" section of a model card as plain JSON, from which `from_card` builds the module.

    The keys are arch, patch_size (None for a family without square patches), in_channels, image_size and embed_dim;
    for arch `vit` also depth and num_heads; for all ViTs also those of `VARIANT`. `sizes` holds `SIZES` and is only
    used for arch `vit`.
    """
    family = family_of(arch)
    module = build_backbone(arch, patch_size=patch_size, **(sizes or {}), **variant)
    return {
        "arch": arch,
        "patch_size": patch_size if family.square_patches else None,
        "in_channels": in_channels,
        "image_size": image_size,
        "embed_dim": module.embed_dim,
        **sizes_on_card({"arch": arch} | dict(sizes or {})),
        **variant_on_card({"arch": arch} | variant),
    }


def sizes_on_card(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `SIZES` of a card's architecture if it is `vit`, {} if its name determines them."""
    named = find_architecture(architecture["arch"]).sizes
    return {} if named else {name: architecture[name] for name in SIZES}


def variant_on_card(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `VARIANT` of a card's architecture, {} if it is no ViT."""
    known = VARIANT if family_of(architecture["arch"]) is VIT else {}
    return {name: architecture.get(name, default) for name, default in known.items()}


def from_card(architecture: Mapping[str, Any]) -> BackboneModule:
    """Builds the float32 module of a card's "architecture" section."""
    arch, sizes, variant = architecture["arch"], sizes_on_card(architecture), variant_on_card(architecture)
    patch = {"patch_size": architecture["patch_size"]} if family_of(arch).square_patches else {}
    return build_backbone(arch, image_size=architecture["image_size"], **patch, **sizes, **variant)


def num_heads_of(architecture: Mapping[str, Any]) -> int | None:
    """Returns the attention heads per block of a card's architecture; None for a family without attention."""
    sizes = sizes_of(architecture["arch"], architecture)
    return sizes["num_heads"] if family_of(architecture["arch"]).attention_maps else None


# --- architectures of files ------------------------------------------------------------------------------------------


def vit_heads(embed_dim: int, depth: int) -> int | None:
    """Returns the heads of the named ViT with this width and depth; None if there is none."""
    for name in names_of(VIT):
        sizes = ARCHITECTURES[name].sizes
        if (sizes["embed_dim"], sizes["depth"]) == (embed_dim, depth):
            return sizes["num_heads"]
    return None


def vit_name(sizes: Mapping[str, int]) -> str:
    """Returns the name of the ViT with exactly these `SIZES`, or `vit`."""
    return next((name for name in names_of(VIT) if ARCHITECTURES[name].sizes == sizes), "vit")


def xcit_name(embed_dim: int, depth: int) -> str | None:
    """Returns the XCiT with this width and depth; None if there is none."""
    for name in names_of(XCIT):
        sizes = ARCHITECTURES[name].sizes
        if (sizes["embed_dim"], sizes["depth"]) == (embed_dim, depth):
            return name
    return None


def resnet_name(blocks: tuple[int, ...], convolutions: int) -> str | None:
    """Returns the ResNet with these blocks per stage and convolutions per block; None if there is none."""
    for name in names_of(RESNET):
        sizes = ARCHITECTURES[name].sizes
        if (sizes["blocks"], len(sizes["kernels"])) == (blocks, convolutions):
            return name
    return None
