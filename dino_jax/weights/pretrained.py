"""Loaded weights, and their adaptation to another image size or number of channels."""

from typing import Any, NamedTuple

import numpy as np

from dino_jax.errors import UserError
from dino_jax.models import family_of
from dino_jax.models.positions import resize_pos_embed
from dino_jax.models.registry import variant_on_card


class Weights(NamedTuple):
    """One network, student or teacher, as trees of NumPy arrays: {"backbone": ...} and its heads.

    "head" is that of CLS, "patch_head" that of patches in DINOv2's training, if patches have their own.
    """

    params: dict[str, Any]
    stats: dict[str, Any]  # running statistics of batch norm; {} for a part without batch norm


class Pretrained(NamedTuple):
    """Loaded weights. The teacher's backbone is always there; heads, student and center are optional, for training."""

    card: dict[str, Any]  # see `checkpoints.model_card`
    teacher: Weights
    student: Weights | None = None
    center: np.ndarray | None = None  # float32 [K]
    patch_center: np.ndarray | None = None  # float32 [K'], of DINOv2's patches


def resized(pretrained: Pretrained, image_size: int) -> Pretrained:
    """Adapts the network to another image size."""
    architecture, trained = pretrained.card["architecture"], pretrained.card["preprocessing"]
    patch = architecture["patch_size"]  # None for a convnet, which has no positions either
    if image_size < 1 or (patch and image_size % patch):
        raise UserError(f"image_size {image_size} is not a multiple of the patch size {patch or 1}: change image_size")
    preprocessing = trained | {"resize": round(trained["resize"] * image_size / trained["crop"]), "crop": image_size}
    pretrained = _described(pretrained, {"image_size": image_size}, preprocessing)
    if not patch or not family_of(architecture["arch"]).learned_positions:
        return pretrained
    side, variant = image_size // patch, variant_on_card(architecture)
    how = {"antialias": variant["antialias"], "offset": variant["pos_offset"]}

    def with_positions(params: Any) -> Any:
        return params | {"pos_embed": np.asarray(resize_pos_embed(params["pos_embed"], side, side, square=True, **how))}

    return _map_backbones(with_positions, pretrained)


def with_channels(pretrained: Pretrained, in_channels: int) -> Pretrained:
    """Adapts the network to another number of input channels."""
    if in_channels < 1:
        raise UserError(f"in_channels {in_channels}: set it to 1 or more")
    architecture, trained = pretrained.card["architecture"], pretrained.card["preprocessing"]
    statistics = {name: per_channel(trained[name], in_channels) for name in ("mean", "std")}
    first = family_of(architecture["arch"]).input_layer

    def changed(params: Any) -> Any:
        return params | {first: params[first] | {"kernel": _adapt_kernel(params[first]["kernel"], in_channels)}}

    return _map_backbones(changed, _described(pretrained, {"in_channels": in_channels}, trained | statistics))


def _adapt_kernel(kernel: np.ndarray, channels: int) -> np.ndarray:
    """[h, w, C, D] -> [h, w, channels, D], with the same output for an image whose channels are all equal.

    For more channels, the kernel's channels repeat cyclically, each divided by its number of copies. For fewer, each
    channel has an equal share of the sum over all channels.
    """
    old_channels = kernel.shape[2]
    if channels < old_channels:
        return np.repeat(kernel.sum(axis=2, keepdims=True) / np.float32(channels), channels, axis=2)
    source = np.arange(channels) % old_channels
    return kernel[:, :, source] / np.bincount(source)[source].astype(np.float32)[:, None]


def per_channel(values: list[float], channels: int) -> list[float]:
    """Statistics for another number of channels: their mean for one channel, else repeated cyclically."""
    if channels == 1 and len(values) > 1:
        return [round(sum(values) / len(values), 6)]
    return [values[i % len(values)] for i in range(channels)]


def _described(pretrained: Pretrained, architecture: dict[str, Any], preprocessing: dict[str, Any]) -> Pretrained:
    card = pretrained.card | {
        "architecture": pretrained.card["architecture"] | architecture,
        "preprocessing": preprocessing,
    }
    return pretrained._replace(card=card)


def _map_backbones(change: Any, pretrained: Pretrained) -> Pretrained:
    """Applies change(parameters of a backbone) to teacher and student."""

    def changed(weights: Weights) -> Weights:
        return weights._replace(params=weights.params | {"backbone": change(weights.params["backbone"])})

    return pretrained._replace(
        teacher=changed(pretrained.teacher), student=pretrained.student and changed(pretrained.student)
    )
