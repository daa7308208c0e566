"""A run's first state from weights that were trained before: `--config.init_from=PATH` (continued pretraining)."""

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
from dino_jax.models.registry import given_sizes, sizes_of, sizes_on_card
from dino_jax.weights import load
from dino_jax.weights.load import Pretrained, Weights

ADAPTATIONS = ("image_size", "in_channels")  # what config.init_adapt may name


def start_from(fresh: Any, config: ConfigDict, mesh: Mesh) -> tuple[Any, str]:
    """The fresh TrainState with what config.init_from holds in its place, and a sentence that says what that is.

    Heads and center are taken too where the source has them, unless config.init_heads is False; a source without a
    student gives its teacher to both. Optimizer moments, schedules and step stay fresh. Raises UserError, naming the
    setting, where the source is not of the config's architecture or head.
    """
    wanted = {"image_size": config.crops.global_size, "in_channels": config.model.in_channels}
    changes = {name: wanted[name] for name in ADAPTATIONS if name in config.init_adapt.split(",")}
    # First whether all see the same kind of thing: to read a run's checkpoints, the processes talk to each other.
    on_every_process(
        lambda: load.require_path(config.init_from), size=lambda path: int((path / "checkpoints").is_dir())
    )
    num_heads = config.model.num_heads or None  # for a file that does not state them
    read = partial(load.load_weights, config.init_from, heads=config.init_heads, num_heads=num_heads, **changes)
    found = on_every_process(read, size=_checksum)
    _check_backbone(found.card["architecture"], config)
    # A copy, since on a CPU a device may use the host's memory as it lies, and each step overwrites its state.
    student = found.student or jax.tree.map(np.copy, found.teacher)
    heads = "head" in found.teacher.params and "head" in student.params
    if heads:
        found, student = found._replace(teacher=_head_of(found.teacher, config)), _head_of(student, config)

    parts = ("backbone", "head") if heads else ("backbone",)

    def merged(before: dict[str, Any], loaded: dict[str, Any]) -> dict[str, Any]:
        return before | place({part: loaded[part] for part in parts}, mesh)

    state = fresh.replace(
        teacher=merged(fresh.teacher, found.teacher.params),
        teacher_stats=merged(fresh.teacher_stats, found.teacher.stats),
        student=merged(fresh.student, student.params),
        student_stats=merged(fresh.student_stats, student.stats),
    )
    if heads and found.center is not None:
        state = state.replace(center=replicate(found.center, mesh))
    return state, _said(found, config, heads)


def _checksum(found: Pretrained) -> int:
    """Of all weights, to tell whether the processes read the same."""
    return sum(zlib.crc32(np.ascontiguousarray(x).tobytes()) for x in jax.tree.leaves(found[1:])) % 2**31


def _said(found: Pretrained, config: ConfigDict, heads: bool) -> str:
    who = "student and teacher" if found.student else "the teacher, for both"
    start = f"starting from {config.init_from}: {found.card['architecture']['arch']} of {who}"
    trained = found.card["preprocessing"]
    theirs, ours = ([*data["mean"], *data["std"]] for data in (trained, config.data))
    if len(theirs) != len(ours) or not np.allclose(theirs, ours, atol=1e-3):
        start += f" (trained with data.mean {trained['mean']} and data.std {trained['std']}, unlike this run)"
    if heads and found.center is not None:
        return f"{start}, with heads and center; optimizer and schedules begin anew"
    if heads:
        return f"{start}, with heads; it has no center, which begins at 0 and settles within some ten steps"
    why = "it has no projection head" if config.init_heads else "init_heads is False"
    return (
        f"{start}; {why}: heads and center are fresh. Until they have learnt, their targets are arbitrary and pull the "
        "features away from what they were: compare k-NN with that of step 0 (--config.evals.knn.test), and try a "
        "lower --config.optim.lr"
    )


def _check_backbone(architecture: dict[str, Any], config: ConfigDict) -> None:
    there = {"model.in_channels": architecture["in_channels"]}
    ours = {"model.in_channels": config.model.in_channels}
    their_sizes, our_sizes = given_sizes(sizes_on_card(architecture)), given_sizes(config.model)
    # By sizes, not by name: `vit` may have those of a named architecture.
    if sizes_of(architecture["arch"], their_sizes) != sizes_of(config.model.arch, our_sizes):
        there |= _network(architecture["arch"], their_sizes)
        ours |= _network(config.model.arch, our_sizes)
    if architecture["patch_size"]:
        there |= {"model.patch_size": architecture["patch_size"], "crops.global_size": architecture["image_size"]}
        ours |= {"model.patch_size": config.model.patch_size, "crops.global_size": config.crops.global_size}
    adaptable = {"crops.global_size": "image_size", "model.in_channels": "in_channels"}
    names = [adaptation for name, adaptation in adaptable.items() if there.get(name) != ours.get(name)]
    way_out = f", or --config.init_adapt={','.join(names)} for what that can change" if names else ""
    _require_same(there, ours, config, way_out)


def _network(arch: str, sizes: dict[str, Any]) -> dict[str, Any]:
    return {"model.arch": arch} | {f"model.{name}": value for name, value in sizes.items()}


def _head_of(weights: Weights, config: ConfigDict) -> Weights:
    """The weights with a head as the config has it: with a gain of its own, or none that would be 1."""
    head = weights.params["head"]
    layers = sum(name.startswith("mlp_") for name in head)
    prototypes = head["last_layer"]
    gain = prototypes.get("weight_g", np.ones(len(prototypes["weight_v"]), np.float32))
    there = {
        "head.out_dim": prototypes["weight_v"].shape[0],
        "head.bottleneck_dim": prototypes["weight_v"].shape[1],
        "head.layers": layers,
        "head.hidden_dim": head["mlp_0"]["kernel"].shape[1] if layers > 1 else config.head.hidden_dim,
        "head.use_bn": "bn_0" in head,
        "head.norm_last_layer": config.head.norm_last_layer and bool((gain == 1).all()),
    }
    ours = {name: config.head[name.removeprefix("head.")] for name in there}
    _require_same(there, ours, config, ", or --config.init_heads=False for fresh heads")
    last_layer = {"weight_v": prototypes["weight_v"]} | ({} if config.head.norm_last_layer else {"weight_g": gain})
    return weights._replace(params=weights.params | {"head": head | {"last_layer": last_layer}})


def _require_same(there: dict[str, Any], ours: dict[str, Any], config: ConfigDict, way_out: str) -> None:
    different = [name for name in there if there[name] != ours[name]]
    if different:
        said = ", ".join(f"{name} is {ours[name]}, there {there[name]}" for name in different)
        settings = " ".join(f"--config.{name}={there[name]}" for name in different)
        raise UserError(f"init_from={config.init_from} does not fit: {said}; set {settings}{way_out}")
