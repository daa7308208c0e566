"""Initializes a run from trained weights: `--config.init_from=PATH` (continued pretraining)."""

import zlib
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dino_jax.distributed.fsdp import place
from dino_jax.distributed.processes import on_every_process
from dino_jax.distributed.sharding import replicate
from dino_jax.errors import UserError
from dino_jax.models.registry import VARIANT, family_of, given_sizes, given_variant, sizes_of, sizes_on_card
from dino_jax.provenance import flat
from dino_jax.storage import is_remote
from dino_jax.weights import load
from dino_jax.weights.pretrained import Pretrained, Weights

# The heads of a student, and the settings of their own sizes.
HEADS = {
    "head": ("head.out_dim", "head.bottleneck_dim"),
    "patch_head": ("dinov2.patch_out_dim", "dinov2.patch_bottleneck_dim"),
}
ADAPTATIONS = ("image_size", "in_channels")  # values that config.init_adapt may list


def start_from(fresh: Any, config: ConfigDict, mesh: Mesh) -> tuple[Any, str]:
    """Replaces parts of a fresh training state by the weights of config.init_from. Also returns a log line.

    Heads and center are loaded if the source has them, unless config.init_heads is False. If the source has no student,
    its teacher initializes both networks. Optimizer moments, schedules and step stay fresh. Raises UserError, with the
    settings to change, if the source's architecture or head differs from the config's.
    """
    targets = {"image_size": config.crops.global_size, "in_channels": config.model.in_channels}
    changes = {name: targets[name] for name in ADAPTATIONS if name in config.init_adapt.split(",")}
    # Check first that all processes see the same kind of path, because reading a run's checkpoints is collective.
    if not is_remote(config.init_from):
        on_every_process(
            lambda: load.require_path(config.init_from), size=lambda path: int((path / "checkpoints").is_dir())
        )
    num_heads = config.model.num_heads or None  # for a file that does not state them
    read = partial(load.load_weights, config.init_from, heads=config.init_heads, num_heads=num_heads, **changes)
    pretrained = on_every_process(read, size=_checksum)
    _check_backbone(pretrained.card["architecture"], config)
    # A copy, because a CPU device may alias the host's memory, and each step overwrites its state.
    student = pretrained.student or jax.tree.map(np.copy, pretrained.teacher)
    heads = "head" in pretrained.teacher.params and "head" in student.params
    parts = ["backbone", *(part for part in HEADS if heads and part in fresh.student and part in student.params)]
    for part in parts[1:]:
        pretrained = pretrained._replace(teacher=_head_of(pretrained.teacher, part, config))
        student = _head_of(student, part, config)

    def merged(before: dict[str, Any], loaded: dict[str, Any]) -> dict[str, Any]:
        after = before | place({part: loaded[part] for part in parts if part in before}, mesh)
        return after | {"backbone": _mask_token_as_in(before["backbone"], after["backbone"])}

    state = fresh.replace(
        teacher=merged(fresh.teacher, pretrained.teacher.params),
        teacher_stats=merged(fresh.teacher_stats, pretrained.teacher.stats),
        student=merged(fresh.student, student.params),
        student_stats=merged(fresh.student_stats, student.stats),
    )
    if heads and config.dino.centering:  # without it the centers stay at 0
        centers = {"center": pretrained.center, "patch_center": pretrained.patch_center}
        fits = {name: x for name, x in centers.items() if x is not None and x.shape == _shape_of(state, name)}
        state = state.replace(**{name: replicate(x, mesh) for name, x in fits.items()})
    return state, _describe(pretrained, config, parts, set(fresh.student) - set(parts))


def _shape_of(state: Any, name: str) -> tuple[int, ...]:
    """Returns the shape of a center; () if the method has none of this name."""
    return tuple(getattr(state, name, np.float32(0)).shape)


def _mask_token_as_in(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Keeps or drops the mask token, because a run has one only if its method masks patches."""
    fresh = {name: x for name, x in before.items() if name == "mask_token"}
    loaded = {name: x for name, x in after.items() if name != "mask_token" or fresh}
    return fresh | loaded


def _checksum(pretrained: Pretrained) -> int:
    """Returns a checksum of all weights, to verify that all processes read the same."""
    return sum(zlib.crc32(np.ascontiguousarray(x).tobytes()) for x in jax.tree.leaves(pretrained[1:])) % 2**31


def _describe(pretrained: Pretrained, config: ConfigDict, parts: list[str], new: set[str]) -> str:
    """Returns a log line. parts: what is loaded; new: parts of the student that start out random."""
    networks = "student and teacher" if pretrained.student else "the teacher, used for both networks"
    start = f"starting from {config.init_from}: {pretrained.card['architecture']['arch']} of {networks}"
    trained = pretrained.card["preprocessing"]
    before, now = ([*data["mean"], *data["std"]] for data in (trained, config.data))
    if len(before) != len(now) or not np.allclose(before, now, atol=1e-3):
        start += f" (trained with data.mean {trained['mean']} and data.std {trained['std']}, unlike this run)"
    if "head" in parts:
        start += ", with heads"
        start += f"; {', '.join(sorted(new))} is new" if new else ""
        if pretrained.center is None:
            return f"{start}; it has no center, which starts at 0 and settles within about ten steps"
        return f"{start} and center; optimizer and schedules start from scratch"
    why = "it has no projection head" if config.init_heads else "init_heads is False"
    start += f"; {why}: heads and center are fresh."
    if config.optim.freeze_backbone_epochs:
        return f"{start} Only they train for the first {config.optim.freeze_backbone_epochs:g} epochs"
    return (
        f"{start} Until the heads are trained, their targets are arbitrary and degrade the pretrained features: set "
        "--config.optim.freeze_backbone_epochs to train only the heads at first, and compare k-NN with that of step 0 "
        "(--config.evals.knn.test)"
    )


def _check_backbone(architecture: dict[str, Any], config: ConfigDict) -> None:
    required = {"model.in_channels": architecture["in_channels"]}
    current = {"model.in_channels": config.model.in_channels}
    card_sizes, config_sizes = given_sizes(sizes_on_card(architecture)), given_sizes(config.model)
    # Compare sizes, not names, because `vit` may have the sizes of a named architecture.
    if sizes_of(architecture["arch"], card_sizes) != sizes_of(config.model.arch, config_sizes):
        required |= _network(architecture["arch"], card_sizes)
        current |= _network(config.model.arch, config_sizes)
    if architecture["patch_size"]:
        required["model.patch_size"], current["model.patch_size"] = architecture["patch_size"], config.model.patch_size
    if family_of(architecture["arch"]).learned_positions:
        there = {name: architecture.get(name, VARIANT[name]) for name in given_variant(config.model)}
        here = given_variant(config.model)
        if here["layer_scale"] and there["layer_scale"]:  # only its presence matters, because its factors are loaded
            there["layer_scale"] = here["layer_scale"]
        required |= {f"model.{name}": value for name, value in there.items()}
        current |= {f"model.{name}": value for name, value in here.items()}
        required["crops.global_size"], current["crops.global_size"] = (
            architecture["image_size"],
            config.crops.global_size,
        )
    adaptable = {"crops.global_size": "image_size", "model.in_channels": "in_channels"}
    names = [adaptation for name, adaptation in adaptable.items() if required.get(name) != current.get(name)]
    way_out = f", or --config.init_adapt={','.join(names)} to adapt the weights" if names else ""
    _require_same(required, current, config, way_out)


def _network(arch: str, sizes: dict[str, Any]) -> dict[str, Any]:
    return {"model.arch": arch} | {f"model.{name}": value for name, value in sizes.items()}


def _head_of(weights: Weights, part: str, config: ConfigDict) -> Weights:
    """Returns the weights with the config's form of a head: with a trainable gain, or without the gain if it is 1."""
    head, (out_dim, bottleneck_dim) = weights.params[part], HEADS[part]
    layers = sum(name.startswith("mlp_") for name in head)
    prototypes = head["last_layer"]
    gain = prototypes.get("weight_g", np.ones(len(prototypes["weight_v"]), np.float32))
    required = {
        out_dim: prototypes["weight_v"].shape[0],
        bottleneck_dim: prototypes["weight_v"].shape[1],
        "head.layers": layers,
        "head.hidden_dim": head["mlp_0"]["kernel"].shape[1] if layers > 1 else config.head.hidden_dim,
        "head.use_bn": "bn_0" in head,
        "head.norm_last_layer": config.head.norm_last_layer and bool((gain == 1).all()),
    }
    settings = flat({"head": config.head.to_dict(), "dinov2": config.dinov2.to_dict()})
    current = {name: settings[name] for name in required}
    _require_same(required, current, config, ", or --config.init_heads=False for fresh heads")
    last_layer = {"weight_v": prototypes["weight_v"]} | ({} if config.head.norm_last_layer else {"weight_g": gain})
    return weights._replace(params=weights.params | {part: head | {"last_layer": last_layer}})


def _require_same(required: dict[str, Any], current: dict[str, Any], config: ConfigDict, way_out: str) -> None:
    different = [name for name in required if required[name] != current[name]]
    if different:
        changes = ", ".join(f"{name} is {current[name]}, must be {required[name]}" for name in different)
        settings = " ".join(f"--config.{name}={required[name]}" for name in different)
        raise UserError(f"init_from={config.init_from} does not fit: {changes}; set {settings}{way_out}")
