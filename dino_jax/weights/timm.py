"""DINOv2's ViTs and XCiTs in timm: maps tensor names to and from the official ones, where the two differ.

Other ViTs have the same names in both. timm has no mask token, names registers and SwiGLU differently, and, in models
with registers, stores the position of CLS as part of the CLS token. It splits query, key and value in an XCiT's class
attention.
"""

import re
from collections.abc import Mapping

import numpy as np

from dino_jax.weights.official import renamed

REGISTERS = {"reg_token": "register_tokens"}
SWIGLU = {"mlp.fc1.": "mlp.w12.", "mlp.fc2.": "mlp.w3."}
XCIT = {"pos_embed.token_projection.": "pos_embeder.token_projection."}
CLASS_ATTENTION = re.compile(r"(cls_attn_blocks\.\d+\.attn\.)(q|k|v|qkv)(\..*)")


def to_official(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """timm's names -> official names; names that are the same in both, and others, stay."""
    names = REGISTERS | XCIT | (SWIGLU if _has_packed_swiglu(tensors) else {})
    official = _renamed(tensors, names)
    for name in [name for name in official if (found := CLASS_ATTENTION.fullmatch(name)) and found[2] == "q"]:
        parts = [CLASS_ATTENTION.sub(rf"\g<1>{part}\3", name) for part in "qkv"]
        if all(part in official for part in parts):
            official[CLASS_ATTENTION.sub(r"\1qkv\3", name)] = np.concatenate([official.pop(part) for part in parts])
    positions = official.get("pos_embed")
    if "reg_token" in tensors and positions is not None and positions.ndim == 3:
        nothing = np.zeros_like(positions[:, :1])  # the position of CLS is in its token
        official["pos_embed"] = np.concatenate([nothing, positions], axis=1)
    return official


def from_official(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Official names -> timm's, without the mask token. The inverse of `to_official` for tensors from timm."""
    kept = {name: x for name, x in tensors.items() if name != "mask_token"}
    if "register_tokens" in kept:
        positions = kept["pos_embed"]
        kept |= {"cls_token": kept["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}
    for name in [name for name in kept if CLASS_ATTENTION.fullmatch(name)]:
        parts = np.split(kept.pop(name), 3)
        kept |= {CLASS_ATTENTION.sub(rf"\g<1>{part}\3", name): x for part, x in zip("qkv", parts, strict=True)}
    return _renamed(kept, {official: timm for timm, official in (REGISTERS | XCIT | SWIGLU).items()})


def _has_packed_swiglu(tensors: Mapping[str, np.ndarray]) -> bool:
    """Returns whether fc1 computes gate and value of a SwiGLU, twice as many channels as fc2 reads."""
    nothing = np.empty(0)
    first, second = (tensors.get(f"blocks.0.mlp.{layer}.weight", nothing) for layer in ("fc1", "fc2"))
    return first.ndim == second.ndim == 2 and len(first) == 2 * second.shape[1]


def _renamed(tensors: Mapping[str, np.ndarray], names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Replaces parts of names."""
    pattern = re.compile("|".join(map(re.escape, names)))
    return renamed(tensors, lambda name: pattern.sub(lambda found: names[found[0]], name))
