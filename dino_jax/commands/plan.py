"""Compiles the train step of a recipe for a TPU slice, without TPU hardware, and reports its resource needs.

    pip install 'dino_jax[plan]'
    dino-jax plan --config=vits16 --topology=v5e:16x16 --config.batch_size=4096

Prints the peak memory and the memory of a chip, the largest batch that fits, the communication between chips, FLOPs,
and a model of step time and scaling. Memory and collectives are reported by the compiler. Times are estimates: chips
compute at `--utilization` of their peak, and communication uses the full link bandwidth, without overlap.
"""

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dino_jax import atomic
from dino_jax.commands import cli
from dino_jax.distributed import fsdp, sharding
from dino_jax.errors import UserError
from dino_jax.training.config_checks import check_config
from dino_jax.training.flops import peak_flops
from dino_jax.training.setup import abstract_state, build_setup, flops_per_image, share_unit
from dino_jax.training.step import lower_step

USAGE = "[--topology=CHIP:SHAPE] [--config=RECIPE] [--config.KEY=VALUE ...]"


class Chip(NamedTuple):
    """Google Cloud's figures for one chip."""

    memory: float  # bytes
    links: float  # outgoing bytes per second over all links to neighbors (half of "bidirectional")
    network: float  # bytes per second between slices: its share of the pod's or host's bandwidth


CHIPS = {"v5e": Chip(16e9, 200e9, 3.1e9), "v5p": Chip(95e9, 600e9, 6.2e9), "v6e": Chip(32e9, 400e9, 12.5e9)}
OPERATIONS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
WIDTHS = {"s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "f16": 2, "bf16": 2, "s8": 1, "u8": 1, "pred": 1}
RESERVED = 0.03  # share of a chip's memory for the runtime


class Collective(NamedTuple):
    """A communication operation between devices."""

    operation: str
    size: int  # bytes of its results on each device
    times: int  # executions per step
    devices: int  # devices in each group


def define_flags(arguments: Sequence[str]) -> cli.Settings:
    """Defines the flags for the slice, and returns a recipe's settings."""
    flags.DEFINE_string("topology", "v5e:4x4", "chip and shape of a slice: v5e:16x16, v5p:4x4x4, v6e:8x8")
    flags.DEFINE_integer("slices", 1, "number of slices")
    flags.DEFINE_float("utilization", 0.4, "assumed share of the chips' peak FLOP/s, for the modeled times")
    flags.DEFINE_string("output", None, "JSON file to also write the plan to")
    return cli.recipe(arguments, default="vits16")


def main(arguments: Sequence[str]) -> None:
    """Prints the plan, and writes it as JSON if --output is set."""
    cli.require_no_arguments(arguments)
    # Only the compiler is used: libtpu must not search for a chip, nor warn that it knows none. The topology decides.
    os.environ.update(ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_SKIP_MDS_QUERY="1", TPU_STDERR_LOG_LEVEL="3")
    os.environ.update(TPU_ACCELERATOR_TYPE="v5litepod-16", TPU_WORKER_HOSTNAMES="localhost")
    jax.config.update("jax_platforms", "cpu")
    values, config = flags.FLAGS, flags.FLAGS.config
    mesh, chip = topology_mesh(values.topology, values.slices, config.fsdp)
    if config.dtype == "auto":
        config.dtype = "bfloat16"
    config.data.source = config.data.source or "not read"
    check_config(config, mesh.size)
    plan = make_plan(config, mesh, chip, values.slices, values.utilization)
    print(table(plan))
    if values.output:
        atomic.write_json(values.output, plan)


def topology_mesh(name: str, slices: int, fsdp: int) -> tuple[Mesh, Chip]:
    """Returns the mesh of a topology such as v5e:16x16, and its chip. Raises UserError if it does not exist."""
    generation = name.split(":")[0]
    if generation not in CHIPS:
        raise UserError(f"--topology={name}: give CHIP:SHAPE with CHIP one of {', '.join(CHIPS)}, like v5e:16x16")
    try:
        shape = {} if slices == 1 else {"num_slices": slices}
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **shape).devices
    except Exception as error:  # the compiler raises errors of any type
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"can't compile for --topology={name} ({reason}): check the shape, and that libtpu is installed "
            "(pip install 'dino_jax[plan]')"
        ) from error
    if len(devices) % fsdp:
        raise UserError(
            f"fsdp {fsdp} does not divide {len(devices)} chips: set --config.fsdp to a divisor of {len(devices)}"
        )
    return sharding.make_mesh(devices, fsdp), CHIPS[generation]


def make_plan(config: ConfigDict, mesh: Mesh, chip: Chip, slices: int, utilization: float) -> dict[str, Any]:
    """Compiles the step at the config's batch size and at half of it, and estimates the rest. Takes minutes."""
    batch, chips = config.batch_size, mesh.size
    share = batch // chips
    program = compile_step(config, mesh)
    peak = peak_bytes(program)
    fits = None
    unit = share_unit(config)
    smaller = share // 2 // unit * unit
    if smaller:
        half = config.copy_and_resolve_references()
        half.batch_size = smaller * chips
        peaks = {share: peak, smaller: peak_bytes(compile_step(half, mesh))}
        fits = images_that_fit(peaks, chip.memory * (1 - RESERVED), unit)
    setup = build_setup(config, steps_per_epoch=1_000)
    flops = flops_per_image(setup) * share
    parameters = sum(x.size for x in jax.tree.leaves(abstract_state(setup, mesh).student))
    rate = peak_flops(mesh.devices.flat[0])
    operations = list(collectives(program.as_text() or "", chips))
    seconds = {
        "compute": flops / (rate * utilization) if rate else None,
        "links": sum(link_seconds(one, chip, chips // slices) for one in operations),
        "network": network_seconds(4 * parameters, chip, slices, chips // slices),
    }
    return {
        "chips": chips,
        "slices": slices,
        "arch": f"{config.model.arch}/{config.model.patch_size}",
        "batch": batch,
        "fsdp": config.fsdp,
        "accum_steps": config.accum_steps,
        "parameters": parameters,
        "peak_bytes": peak,
        "chip_bytes": chip.memory,
        "largest_batch": fits and fits * chips,
        "flops_per_chip": flops,
        "collectives": [one._asdict() for one in operations],
        "seconds": seconds,
        "utilization": utilization,
    }


def peak_bytes(program: jax.stages.Compiled) -> int:
    """Returns the compiler's estimate of the peak memory of a device, bytes."""
    memory: Any = program.memory_analysis()
    return memory.peak_memory_in_bytes


def images_that_fit(peaks: Mapping[int, float], memory: float, multiple: int) -> int | None:
    """Returns the largest number of images per chip that fits, a multiple of `multiple`.

    Extrapolates linearly from `peaks`, the peak memory (bytes) at two numbers of images. Returns None if memory does
    not grow, which happens with few images, when most of it does not depend on the number of images.
    """
    (few, low), (many, high) = sorted(peaks.items())
    if high <= low:
        return None
    return int(few + (memory - low) * (many - few) / (high - low)) // multiple * multiple


def compile_step(config: ConfigDict, mesh: Mesh) -> jax.stages.Compiled:
    """Compiles the train step of a config for the devices of a mesh."""
    print(f"compiling for {mesh.size} chips, batch {config.batch_size:,} (a few minutes)", file=sys.stderr, flush=True)
    setup = build_setup(config, steps_per_epoch=1_000)
    state = abstract_state(setup, mesh)
    fsdp.check_divides(state, config.fsdp)
    try:
        return lower_step(setup, mesh, state).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needs = re.search(r"Used ([\d.]+\w) of ([\d.]+\w)", str(error))
        memory = f"{needs[1]} of {needs[2]}" if needs else "more than the memory of a chip"
        raise UserError(
            f"batch {config.batch_size:,} on {mesh.size} chips needs {memory}: set a smaller --config.batch_size, "
            "a larger --config.accum_steps or --config.fsdp, or --config.model.remat=True"
        ) from error


def collectives(text: str, devices: int) -> Iterator[Collective]:
    """Yields the collectives of a compiled program (HLO text). `times` includes the iterations of loops."""
    bodies = dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", text, re.S | re.M))
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.M)
    assert entry is not None

    overlapped: set[tuple[Any, ...]] = set()

    def walk(name: str, times: int, fused: bool = False) -> Iterator[Collective]:
        for line in bodies.get(name, "").splitlines():
            operation = re.search(rf"= (\(.*?\)|\S+) ({'|'.join(OPERATIONS)})(-start)?\(", line)
            if operation:
                sizes = [array_bytes(*one) for one in re.findall(r"(\w+)\[([\d,]*)\]", operation[1])]
                # The type of a -start operation holds operands as well as results.
                size = sum(sizes) if not operation[3] or operation[2] == "all-reduce" else max(sizes)
                channel = re.search(r"channel_id=(\d+)", line)
                # A collective that overlaps with computation appears in each of the fusions that it overlaps with.
                key = (operation[2], size, times, channel and channel[1])
                if not (fused and key in overlapped):
                    yield Collective(operation[2], size, times, _group(line, devices))
                if fused:
                    overlapped.add(key)
            loop = re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
            if loop:
                yield from walk(loop[2], times * trips(line, bodies.get(loop[1], "")))
            for called in re.findall(r"(?:calls|true_computation|false_computation)=%?([\w.\-]+)", line):
                yield from walk(called, times, True)

    return walk(entry[1], 1)


def array_bytes(kind: str, dimensions: str) -> int:
    """Returns the bytes of an array in HLO notation, kind[dimensions]."""
    return WIDTHS.get(kind, 0) * int(np.prod([int(n) for n in dimensions.split(",") if n], dtype=np.int64))


def _group(line: str, devices: int) -> int:
    """Parses the number of devices in a collective's group, from {{0,1},{2,3}} or [groups,size]<=..."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(iota[1])
    return devices


def trips(line: str, condition: str) -> int:
    """Returns the trip count of a loop: as stated by the compiler, or the constant in the loop's condition."""
    if known := re.search(r'known_trip_count[^}]*?"?n"?:"?(\d+)', line):
        return int(known[1])
    return max((int(n) for n in re.findall(r"s32\[\][^=]*constant\((\d+)\)", condition)), default=1)


def link_seconds(one: Collective, chip: Chip, per_slice: int) -> float:
    """Returns the seconds of a ring collective within a slice: an all-reduce sends the data twice, others once."""
    n = min(one.devices, per_slice)
    passes = 2 if one.operation == "all-reduce" else 1
    size = one.size * (n if one.operation == "reduce-scatter" else 1)  # its result is 1/n of the data
    return one.times * passes * size * (n - 1) / n / chip.links


def network_seconds(gradient: int, chip: Chip, slices: int, per_slice: int) -> float:
    """Returns the seconds to reduce the gradient (bytes) between slices, in a ring.

    Each chip sends the part of the gradient that it reduced within its slice. This is an estimate, because the runtime
    performs this reduction and it does not appear in the compiled program.
    """
    return 2 * gradient / per_slice * (slices - 1) / slices / chip.network


def table(plan: dict[str, Any]) -> str:
    """Formats the plan as a table."""
    seconds, gb = plan["seconds"], 1e9
    total = sum(seconds.values()) if seconds["compute"] else None
    moved: dict[str, list[int]] = {}
    for one in plan["collectives"]:
        count, size = moved.get(one["operation"], [0, 0])
        moved[one["operation"]] = [count + one["times"], size + one["times"] * one["size"]]
    exchanged = ", ".join(f"{count} {name} of {size / 1e6:,.1f} MB" for name, (count, size) in moved.items())
    fits = (
        "unknown for so few images per chip: set a larger --config.batch_size"
        if plan["largest_batch"] is None
        else f"{plan['largest_batch']:,} images (extrapolated from two batch sizes)"
    )
    rows = {
        "run": f"{plan['arch']} on {plan['chips']} chips in {plan['slices']} slice(s), batch {plan['batch']:,}, "
        f"fsdp {plan['fsdp']}, accum_steps {plan['accum_steps']}",
        "peak memory": f"{plan['peak_bytes'] / gb:.2f} of {plan['chip_bytes'] / gb:.0f} GB per chip",
        "largest batch": fits,
        "FLOPs": f"{plan['flops_per_chip'] / 1e12:.2f} T per chip and step",
        "between chips": f"{exchanged or 'nothing'} per step",
    }
    if total:
        alone = seconds["compute"] + seconds["links"]
        rows["step, modeled"] = (
            f"{1e3 * total:.1f} ms: {1e3 * seconds['compute']:.1f} computing at {plan['utilization']:.0%} of the peak, "
            f"{1e3 * seconds['links']:.2f} on links, {1e3 * seconds['network']:.2f} between slices"
        )
        rows["images/s, modeled"] = f"{plan['batch'] / total:,.0f}"
        rows["scaling, modeled"] = (
            f"{seconds['compute'] / total:.3f} relative to chips without communication, "
            f"{alone / total:.3f} relative to slices without communication"
        )
    width = max(map(len, rows)) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows.items())
