"""A program that XLA compiled for a GPU, read from its text: which kernels it runs, and what each of them moves."""

import re
from collections import defaultdict
from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from dino_jax.commands.plan import array_bytes, trips
from dino_jax.training.flops import PEAK_FLOPS

# An H100 SXM's.
BANDWIDTH = 3.35e12  # bytes a second
_DENSE = PEAK_FLOPS["NVIDIA H100 80GB HBM3"]
PEAK = {"bf16": _DENSE, "f32": _DENSE / 2}  # FLOP/s by the type of the operands, float32 as TF32

FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id"}
STAGES = {  # the first that is found in the name of what a kernel comes from
    "crops": r"/crops/",
    "backward": r"transpose\(jvp",
    "student, loss": r"jvp\(",
    "teacher": r"ViT|DINOHead",
    "the rest": "",
}


class Instruction(NamedTuple):
    """A line of HLO's text."""

    name: str
    shape: str
    opcode: str
    operands: list[str]
    text: str
    root: bool

    def attribute(self, pattern: str) -> str:
        """What the pattern's group is in the line; empty if it is not there."""
        found = re.search(pattern, self.text)
        return found[1] if found else ""


Computation = dict[str, Instruction]


class Kernel(NamedTuple):
    """What the GPU is asked to run, `times` in a step."""

    times: int
    stage: str
    moved: int  # bytes
    seconds: float  # at the peaks


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """HLO's text -> computations by name, and the name of the outermost."""
    computations: dict[str, Computation] = {}
    entry = current = ""
    for line in text.splitlines():
        if head := re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = head[2]
            computations[current] = {}
            entry = current if head[1] else entry
        elif found := re.match(r"^ *(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)", line):
            root, name, shape, opcode, rest = found.groups()
            operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
            computations[current][name] = Instruction(name, shape, opcode, operands, line, bool(root))
    return computations, entry


def kernels(computations: dict[str, Computation], name: str, times: int = 1) -> Iterator[Kernel]:
    """Those of a computation, and of the loops and calls in it."""
    for each in computations[name].values():
        if each.opcode == "while":
            yield from kernels(computations, each.attribute(r"body=%?([\w.\-]+)"), times * trips(each.text, ""))
        elif each.opcode == "call":
            yield from kernels(computations, each.attribute(r"to_apply=%?([\w.\-]+)"), times)
        elif each.opcode not in FREE:
            operands = [computations[name][operand] for operand in each.operands]
            if each.opcode == "fusion":
                moved = traffic(computations[each.attribute(r"calls=%?([\w.\-]+)")])
            else:
                moved = size(each.shape) + sum(size(operand.shape) for operand in operands)
            origin = each.attribute(r'op_name="([^"]*)"')
            stage = next(stage for stage, mark in STAGES.items() if re.search(mark, origin))
            yield Kernel(times, stage, moved, max(moved / BANDWIDTH, product_seconds(each, operands)))


def traffic(fused: Computation) -> int:
    """Bytes that a fusion reads and writes; of a stack only the slices that it takes or puts."""
    users = defaultdict(list)
    for each in fused.values():
        for operand in each.operands:
            users[operand].append(each)

    def uses(name: str) -> list[Instruction]:
        return [use for each in users[name] for use in (uses(each.name) if each.opcode == "bitcast" else [each])]

    def source(name: str) -> Instruction:
        return source(fused[name].operands[0]) if fused[name].opcode == "bitcast" else fused[name]

    def read(parameter: Instruction) -> int:
        found = uses(parameter.name)
        if found and all(use.opcode in ("dynamic-slice", "slice") for use in found):
            return min(size(parameter.shape), sum(size(use.shape) for use in found))
        if found and all(
            use.opcode == "dynamic-update-slice" and source(use.operands[0]) == parameter for use in found
        ):
            return 0
        return size(parameter.shape)

    def written(result: Instruction) -> int:
        if result.opcode == "tuple":
            return sum(written(source(name)) for name in result.operands)
        return size(fused[result.operands[1]].shape if result.opcode == "dynamic-update-slice" else result.shape)

    parameters = [each for each in fused.values() if each.opcode == "parameter"]
    return sum(map(read, parameters)) + sum(written(source(each.name)) for each in fused.values() if each.root)


def product_seconds(each: Instruction, operands: list[Instruction]) -> float:
    """What the products of cuBLAS and of cuDNN's attention take at the chip's peak."""
    if "cublas" in each.attribute(r'custom_call_target="([^"]*)"'):
        axis = int(each.attribute(r'"lhs_contracting_dimensions":\["(\d+)"') or -1)
        flops = 2 * prod(dimensions(each.shape)) * dimensions(operands[0].shape)[axis]
        return flops / PEAK.get(operands[0].shape.split("[")[0], PEAK["bf16"])
    if "fmhaSoftmax" in each.text:  # two products, and five for the gradient
        images, heads, tokens, width = dimensions(each.shape)
        return (10 if "Backward" in each.text else 4) * images * heads * tokens**2 * width / PEAK["bf16"]
    return 0.0


def dimensions(shape: str) -> list[int]:
    """Of an array, or of the first of a tuple."""
    return [int(n) for n in re.findall(r"\[([\d,]*)\]", shape)[0].split(",") if n]


def size(shape: str) -> int:
    """Bytes of an array or a tuple; cuBLAS's workspace, which is int8, is none."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return sum(array_bytes(kind, axes) for kind, axes in arrays if kind != "s8")
