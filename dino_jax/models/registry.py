"""The backbones by name: how each is built and what it can do.

A new architecture is a line in `ARCHITECTURES`. A new kind of backbone is a `Family` and its module, whose
`__call__(images, train, drop_path)` returns `Tokens` and whose `last_blocks(images, n)` returns a list of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from dino_jax.errors import UserError
from dino_jax.models.resnet import ResNet
from dino_jax.models.vit import ViT

BackboneModule = ViT | ResNet

# Keys of config.model, of a model card and of a ViT's constructor. They describe arch `vit`, and only that.
SIZES = ("embed_dim", "depth", "num_heads")
CHANNELS_A_HEAD = 64  # in all ViTs that papers name


@dataclass(frozen=True)
class Family:
    """What the architectures of one kind have in common, for code that must not depend on their modules."""

    module: Callable[..., Any]
    arguments: tuple[str, ...]  # of `build_backbone`, those that the module takes
    settings: tuple[str, ...]  # of config.model, those that the family has beside arch, in_channels and sizes
    input_layer: str  # name of the layer whose kernel reads the images' channels
    square_patches: bool  # a patch token covers patch_size x patch_size pixels, and positions are learned for a grid
    block_tokens: bool  # `last_blocks` returns up to `depth` blocks of one width, not only the last feature map
    attention_maps: bool  # has `last_attention`


VIT = Family(
    module=ViT,
    arguments=("patch_size", "image_size", "remat", "unroll", "attention", "dtype", "gather"),
    settings=("patch_size", "drop_path_rate", "remat", "unroll", "attention"),
    input_layer="patch_embed",
    square_patches=True,
    block_tokens=True,
    attention_maps=True,
)
RESNET = Family(
    module=ResNet,
    arguments=("axis_name", "dtype"),
    settings=(),
    input_layer="conv1",
    square_patches=False,
    block_tokens=False,
    attention_maps=False,
)


@dataclass(frozen=True)
class Architecture:
    """A family and the sizes that its module is built with; no sizes: the caller gives them."""

    family: Family
    sizes: Mapping[str, Any]


def _vit(embed_dim: int, depth: int, num_heads: int) -> Architecture:
    return Architecture(VIT, {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads})


ARCHITECTURES = {
    "vit_nano": _vit(64, 3, 4),  # not from a paper: small enough that a laptop's CPU learns something in minutes
    "vit_tiny": _vit(192, 12, 3),
    "vit_small": _vit(384, 12, 6),
    "vit_base": _vit(768, 12, 12),
    "vit_large": _vit(1024, 24, 16),
    "vit_giant": _vit(1536, 40, 24),  # DINOv2's sizes, with a plain MLP
    "vit": Architecture(VIT, {}),  # of any `SIZES`
    "resnet18": Architecture(RESNET, {"blocks": (2, 2, 2, 2), "kernels": (3, 3), "expansion": 1}),
    "resnet50": Architecture(RESNET, {"blocks": (3, 4, 6, 3), "kernels": (1, 3, 1), "expansion": 4}),
}


def find_architecture(arch: str) -> Architecture:
    """The architecture of a name. Raises UserError for an unknown one."""
    if arch not in ARCHITECTURES:
        raise UserError(f"unknown architecture {arch!r}: set --config.model.arch to one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[arch]


def family_of(arch: str) -> Family:
    """The family of an architecture. Raises UserError for an unknown one."""
    return find_architecture(arch).family


def sizes_of(arch: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an architecture's module is built with: the sizes of its name, or for arch `vit` the given `SIZES`."""
    return find_architecture(arch).sizes or given


def names_of(family: Family) -> list[str]:
    """The architectures of a family that have a name for their sizes."""
    return [name for name, one in ARCHITECTURES.items() if one.family == family and one.sizes]


def build_backbone(
    arch: str,
    *,
    embed_dim: int = 0,
    depth: int = 0,
    num_heads: int = 0,
    patch_size: int = 16,
    image_size: int = 224,
    remat: bool = False,
    unroll: bool = False,
    attention: str = "xla",
    dtype: jnp.dtype = jnp.float32,
    axis_name: str | tuple[str, ...] | None = None,
    gather: Callable[..., Any] | None = None,
) -> BackboneModule:
    """The module of an architecture: `apply(variables, images [B, H, W, C], train) -> Tokens`.

    Channels follow the images that it is initialized with. A family ignores the arguments that it does not have.

    Args:
        arch: a name in `ARCHITECTURES`.
        embed_dim: channels of a token; for arch `vit`, as are the next two.
        depth: number of blocks.
        num_heads: attention heads of each block.
        patch_size: pixels of a side of a patch.
        image_size: pixels of a side of the images whose grid of positions is learned.
        remat: computes blocks again in the backward pass.
        unroll: no loop over the blocks.
        attention: xla or cudnn.
        dtype: of activations.
        axis_name: mesh axes that batch norm averages over.
        gather: for parameters that are split over devices (`fsdp.gather`).

    Raises:
        UserError: for an unknown name and for sizes that `check_sizes` refuses.
    """
    family = family_of(arch)
    given = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    check_sizes(arch, given)
    arguments = {
        "patch_size": patch_size,
        "image_size": image_size,
        "remat": remat,
        "unroll": unroll,
        "attention": attention,
        "dtype": dtype,
        "axis_name": axis_name,
        "gather": gather,
    }
    of_family = {name: arguments[name] for name in family.arguments}
    return family.module(**sizes_of(arch, given), **of_family)


def check_sizes(arch: str, sizes: Mapping[str, int]) -> None:
    """Raises UserError where `SIZES` are missing for arch `vit`, given for another one, or do not go together."""
    given = [name for name in SIZES if sizes[name]]
    if ARCHITECTURES[arch].sizes:
        if given:
            wrong = " and ".join(f"model.{name}={sizes[name]}" for name in given)
            raise UserError(
                f"model.arch={arch} has sizes of its own, but {wrong} is set: "
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
            "set --config.model.num_heads to a divisor of it"
        )


def given_sizes(model: Mapping[str, Any]) -> dict[str, Any]:
    """`SIZES` of a config's `model` section, 0 where a config of an earlier version does not have them."""
    return {name: model.get(name, 0) for name in SIZES}


# --- model cards -----------------------------------------------------------------------------------------------------


def architecture_card(
    arch: str, *, patch_size: int = 16, in_channels: int, image_size: int, sizes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The "architecture" section of a model card, as plain JSON: everything that `from_card` builds the module from.

    arch, patch_size (None for a family without square patches), in_channels, image_size and embed_dim; for arch `vit`
    also depth and num_heads.

    sizes: `SIZES`, for arch `vit`.
    """
    family = family_of(arch)
    module = build_backbone(arch, patch_size=patch_size, **(sizes or {}))
    return {
        "arch": arch,
        "patch_size": patch_size if family.square_patches else None,
        "in_channels": in_channels,
        "image_size": image_size,
        "embed_dim": module.embed_dim,
    } | sizes_on_card({"arch": arch} | dict(sizes or {}))


def sizes_on_card(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """`SIZES` of a card's architecture if it is `vit`, none if its name says them."""
    named = find_architecture(architecture["arch"]).sizes
    return {} if named else {name: architecture[name] for name in SIZES}


def from_card(architecture: Mapping[str, Any]) -> BackboneModule:
    """The float32 module of a card's "architecture" section."""
    arch, sizes = architecture["arch"], sizes_on_card(architecture)
    patch = {"patch_size": architecture["patch_size"]} if family_of(arch).square_patches else {}
    return build_backbone(arch, image_size=architecture["image_size"], **patch, **sizes)


def num_heads_of(architecture: Mapping[str, Any]) -> int | None:
    """Attention heads in each block of a card's architecture; None for a family without attention."""
    sizes = sizes_of(architecture["arch"], architecture)
    return sizes["num_heads"] if family_of(architecture["arch"]).attention_maps else None


# --- architectures of files ------------------------------------------------------------------------------------------


def vit_heads(embed_dim: int, depth: int) -> int | None:
    """Heads of the named ViT of this width and depth; None if none has them."""
    for name in names_of(VIT):
        sizes = ARCHITECTURES[name].sizes
        if (sizes["embed_dim"], sizes["depth"]) == (embed_dim, depth):
            return sizes["num_heads"]
    return None


def vit_name(sizes: Mapping[str, int]) -> str:
    """The name of the ViT of exactly these `SIZES`, or `vit`."""
    return next((name for name in names_of(VIT) if ARCHITECTURES[name].sizes == sizes), "vit")


def resnet_name(blocks: tuple[int, ...], convolutions: int) -> str | None:
    """The ResNet with so many blocks in each stage and convolutions in each block; None if there is none."""
    for name in names_of(RESNET):
        sizes = ARCHITECTURES[name].sizes
        if (sizes["blocks"], len(sizes["kernels"])) == (blocks, convolutions):
            return name
    return None
