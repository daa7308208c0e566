"""ViTs of Hugging Face transformers: maps tensor names to and from the official ones, writes `from_pretrained` folders.

The names are those that `ViTModel`, `Dinov2Model` and `Dinov2WithRegistersModel` have on disk. The names that they have
in memory since transformers 5, and the prefix of a model for classification, are also read. Tensors have the same
layout in both forms, except that Hugging Face stores query, key and value separately.

A folder written here states the reference's settings: LayerNorm eps 1e-6, and the preprocessing of the model card (in
the reference: shorter side to 256, bicubic, center crop 224). The DINO folders on the hub state other settings: eps
1e-12 (this package computes with 1e-6), and the image resized to 224 x 224, bilinear, without keeping its aspect ratio.
For such a folder the model card has shorter side 224 and center crop 224, which is the same view of a square image. To
compare with published numbers, set the resize to 256.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dino_jax import atomic
from dino_jax.errors import UserError
from dino_jax.json_files import NUMBERS, POSITIVES, SIZE, read_object, require
from dino_jax.models import family_of, from_card
from dino_jax.models.registry import VIT, variant_on_card
from dino_jax.weights import tensor_files
from dino_jax.weights.official import refuse_antialiased, renamed

# Hugging Face module or parameter -> official name, outside of blocks (STEM) and inside.
STEM = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}
BLOCK = {
    "layernorm_before": "norm1",
    "attention.attention.query": "attn.query",
    "attention.attention.key": "attn.key",
    "attention.attention.value": "attn.value",
    "attention.output.dense": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
DINOV2_BLOCK = {
    "norm1": "norm1",
    "attention.attention.query": "attn.query",
    "attention.attention.key": "attn.key",
    "attention.attention.value": "attn.value",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.weights_in": "mlp.w12",
    "mlp.weights_out": "mlp.w3",
    "layer_scale2.lambda1": "ls2.gamma",
}
BLOCK_IN_MEMORY = {
    "attention.q_proj": "attn.query",
    "attention.k_proj": "attn.key",
    "attention.v_proj": "attn.value",
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.w3",
}
# Official layers that are concatenations of layers there: the names of these layers.
QKV = ("query", "key", "value")
MODELS = {"vit": "ViTModel", "dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}
JOINED = {"attn.qkv.": [f"attn.{part}." for part in QKV], "mlp.w12.": ["mlp.gate.", "mlp.up."]}

PREFIXES = ("vit.", "dinov2.", "dinov2_with_registers.")  # of models for classification
NAME = re.compile(
    r"(?:(?:vit|dinov2|dinov2_with_registers)\.)?(?:(?:encoder\.layer|layers)\.(\d+)\.)?(.*?)(\.weight|\.bias)?",
    re.DOTALL,
)
OFFICIAL_NAME = re.compile(r"(?:blocks\.(\d+)\.)?(.*?)(\.weight|\.bias)?", re.DOTALL)


def is_huggingface(names: Iterable[str]) -> bool:
    """Returns whether these are the tensor names of a transformers model."""
    return any(name.startswith(("embeddings.", *(f"{prefix}embeddings." for prefix in PREFIXES))) for name in names)


def to_official(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Hugging Face names -> official names; query, key and value are concatenated to qkv.

    Tensors that are not part of a backbone (pooler, classifier) keep their names. If one of query, key and value is
    missing, the other two keep separate names and there is no qkv.
    """
    official = renamed(tensors, _official_name)
    for whole, parts in JOINED.items():
        for first in [name for name in official if parts[0] in name]:
            names = [first.replace(parts[0], part) for part in parts]
            if all(name in official for name in names):
                official[first.replace(parts[0], whole)] = np.concatenate([official.pop(name) for name in names])
    return official


def from_official(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Official names of a backbone -> names on disk, with qkv split. The inverse of `to_official`.

    The names are those of `Dinov2Model` and `Dinov2WithRegistersModel` for a ViT with LayerScale, else of `ViTModel`.
    """
    block = DINOV2_BLOCK if any(name.endswith(".ls1.gamma") for name in tensors) else BLOCK
    separate: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if ".attn.qkv." in name:
            separate |= {name.replace("qkv", part): x for part, x in zip(QKV, np.split(tensor, 3), strict=True)}
        else:
            separate[name] = tensor
    return {_huggingface_name(name, block): tensor for name, tensor in separate.items()}


def write_folder(folder: str | Path, tensors: Mapping[str, np.ndarray], card: Mapping[str, Any]) -> None:
    """Atomically writes a new folder with a ViT's tensors (official names) and the settings of its `model_card`.

    `AutoModel.from_pretrained` and `AutoImageProcessor.from_pretrained` read the folder. Pass add_pooling_layer=False
    to avoid the warning about a pooler of `ViTModel`, which DINO does not have. Raises UserError for the card of a
    convnet, or of a ViT that transformers does not have.
    """
    architecture, folder = card["architecture"], Path(folder)
    model_type, names = _model_type(architecture), dict(tensors)
    if model_type == "vit":
        names.pop("mask_token", None)
    elif model_type == "dinov2_with_registers":  # always has one
        names.setdefault("mask_token", np.zeros_like(names["cls_token"][0]))
    processor = _processor(card["preprocessing"], architecture["in_channels"])
    with atomic.folder(folder) as unfinished:
        tensor_files.write(unfinished / "model.safetensors", from_official(names))
        atomic.write_json(unfinished / "config.json", _config(architecture))
        atomic.write_json(unfinished / "preprocessor_config.json", processor)


def read_folder_settings(folder: str | Path) -> dict[str, Any]:
    """Reads the settings in a folder's JSON files that its tensors do not show.

    Returns {"num_attention_heads": int, "pos_offset": float, "preprocessing": {"resize": int, "crop": int, "mean": [C],
    "std": [C]}}, with preprocessing as in a model card. Settings that the files do not state are omitted; `Dinov2Model`
    resizes positions without the reference's offset. Raises UserError if a file is damaged, the activation is not the
    exact GELU, or the network is an anti-aliased ResNet.
    """
    config, processor = (_read_json(Path(folder) / name) for name in ("config.json", "preprocessor_config.json"))
    source = f"{Path(folder) / 'preprocessor_config.json'}"
    if (activation := config.get("hidden_act", "gelu")) != "gelu":
        raise UserError(f"{folder} holds a ViT with activation {activation!r}: only the exact 'gelu' is supported")
    refuse_antialiased(str(config.get("architecture", "")), f"{folder}")  # timm's key
    settings: dict[str, Any] = {}
    if "num_attention_heads" in config:
        settings["num_attention_heads"] = config["num_attention_heads"]
    if config.get("model_type") == "dinov2":
        settings["pos_offset"] = 0.0
    if preprocessing := _sizes(processor) | _statistics(processor, config.get("num_channels", 3), source):
        kinds = {"resize": SIZE, "crop": SIZE, "mean": NUMBERS, "std": POSITIVES}
        require(preprocessing, {name: kinds[name] for name in preprocessing}, source)
        settings["preprocessing"] = preprocessing
    return settings


def _official_name(name: str) -> str:
    """Returns the official name; a tensor that is not part of a backbone keeps its name."""
    layer, module, kind = _parts(NAME, name)
    if layer is None:
        return STEM[module] + kind if module in STEM else name
    inside = BLOCK | DINOV2_BLOCK | BLOCK_IN_MEMORY
    return f"blocks.{layer}.{inside[module]}{kind}" if module in inside else name


def _huggingface_name(name: str, block: Mapping[str, str]) -> str:
    layer, module, kind = _parts(OFFICIAL_NAME, name)
    inverse = {official: huggingface for huggingface, official in (STEM if layer is None else block).items()}
    return ("" if layer is None else f"encoder.layer.{layer}.") + inverse[module] + kind


def _parts(pattern: re.Pattern[str], name: str) -> tuple[str | None, str, str]:
    """Splits a name into block number (None outside of blocks), module, and ".weight", ".bias" or ""."""
    layer, module, kind = pattern.fullmatch(name).groups()  # type: ignore[union-attr]
    return layer, module, kind or ""


def _model_type(architecture: Mapping[str, Any]) -> str:
    """Returns transformers' model for an architecture, a key of MODELS. Raises UserError if it has none."""
    arch = architecture["arch"]
    if family_of(arch) is not VIT:
        raise UserError(f"the Hugging Face form only supports ViTs, not {arch}: use --to=timm")
    variant = variant_on_card(architecture)
    if variant["layer_scale"]:
        return "dinov2_with_registers" if variant["registers"] else "dinov2"
    if variant["registers"] or variant["ffn"] != "mlp":
        raise UserError(f"transformers has no {arch} with registers or SwiGLU but without LayerScale: use --to=timm")
    return "vit"


def _config(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of ViTConfig, Dinov2Config or Dinov2WithRegistersConfig."""
    model: Any = from_card(architecture)
    model_type = _model_type(architecture)
    dinov2 = {
        "mlp_ratio": model.mlp_ratio,
        "layerscale_value": model.layer_scale,
        "use_swiglu_ffn": model.ffn == "swiglu",
    }
    special = {
        "vit": {"intermediate_size": model.mlp_ratio * model.embed_dim},
        "dinov2": dinov2 | {"use_mask_token": model.mask_token},
        "dinov2_with_registers": dinov2 | {"num_register_tokens": model.registers},
    }
    return special[model_type] | {
        "architectures": [MODELS[model_type]],
        "model_type": model_type,
        "hidden_size": model.embed_dim,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads,
        "image_size": architecture["image_size"],
        "patch_size": architecture["patch_size"],
        "num_channels": architecture["in_channels"],
        "qkv_bias": True,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def _processor(preprocessing: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """Returns settings of BitImageProcessor, because ViTImageProcessor neither keeps the aspect ratio nor crops."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": preprocessing["resize"]},
        "resample": Image.Resampling.BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": preprocessing["crop"], "width": preprocessing["crop"]},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing["mean"]),
        "image_std": list(preprocessing["std"]),
    }


def _sizes(processor: Mapping[str, Any]) -> dict[str, int]:
    """Returns the card's resize and crop; without a center crop, both are the processor's size."""
    resize = _side(processor.get("size"))
    crop = _side(processor.get("crop_size")) if processor.get("do_center_crop") else resize
    return {"resize": resize, "crop": crop or resize} if resize else {}


def _side(size: Any) -> int | None:
    """The shorter side of an int, [height, width], {"height", "width"} or {"shortest_edge"}; None if not stated."""
    if isinstance(size, Mapping):
        size = [value for key, value in size.items() if key in ("shortest_edge", "height", "width") and value]
    sides = size if isinstance(size, list) else [size]
    if not all(isinstance(side, int) for side in sides):
        return next((side for side in sides if side is not None and not isinstance(side, int)), None)
    return min(sides, default=None)


def _statistics(processor: Mapping[str, Any], channels: Any, source: str) -> dict[str, list[float]]:
    """Returns the card's mean and std, for pixels in 0..1, whatever the processor scales them by."""
    factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1
    require({"rescale_factor": [factor]}, {"rescale_factor": POSITIVES}, source)
    scale = 255 * factor
    given = {"mean": processor.get("image_mean"), "std": processor.get("image_std")}
    if processor.get("do_normalize") is False:
        given = {"mean": [0.0], "std": [1.0]}
    statistics = {}
    for name, value in given.items():
        if value is not None:
            values = value if isinstance(value, list) else [value] * (channels if isinstance(channels, int) else 1)
            require({f"image_{name}": values}, {f"image_{name}": NUMBERS}, source)
            statistics[name] = values if abs(scale - 1) < 1e-6 else [number / scale for number in values]
    return statistics


def _read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; {} if the file does not exist."""
    if not path.is_file():
        return {}
    return read_object(path, {})
