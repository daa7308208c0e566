"""Images per second and memory of the train step and of feature extraction, beside PyTorch's.

    python -m benchmarks.step [--arch=vit_small,vit_tiny] [--batch=4,8] [--repeats=9] [--ours=xla,cudnn+unroll]
        [--peers=eager,compiled]

The train step is the real one: crops made on the device from uint8 canvases (2 x 224 and 8 x 96), student, teacher,
loss with K = 65,536, gradients, clip, AdamW, teacher and center. float32 on a CPU, bfloat16 elsewhere. The peer is
`benchmarks/torch_peer.py`. Both run on one device (of a CPU all cores). `--batch=largest` looks for the largest power
of two from 64 on that fits, for each by itself. First: seconds of the first call, which compiles. A percentage is the
row's FLOP/s as a share of what each one's own matrix products reach on this machine (`benchmarks/ceilings.py`).
"""

import json
import resource
import time
from functools import partial

import jax
import numpy as np
from absl import app, flags

from benchmarks import environment
from dino_jax.distributed import sharding
from dino_jax.training.flops import count_flops, peak_flops
from dino_jax.training.setup import DeviceBatch, build_setup, flops_per_image, init_state
from dino_jax.training.step import compile_lowered, lower_step

ARCH = flags.DEFINE_list("arch", ["vit_small", "vit_tiny"], "architectures, patch 16")
BATCH = flags.DEFINE_list("batch", ["4", "8"], "images a step; 'largest' that fits")
OURS = flags.DEFINE_list("ours", ["xla"], "config.model.attention (cudnn is for NVIDIA GPUs), and +unroll")
PEERS = flags.DEFINE_list("peers", ["eager", "compiled"], "eager, compiled or neither")
REPEATS = flags.DEFINE_integer("repeats", 9, "timed runs; the median counts")
ROW = flags.DEFINE_string("row", "", "one cell, as JSON: what the command runs in processes of their own")
FEATURE_BATCH = 16


def ours_train(arch: str, batch: int, program: str):
    """A call that does one full step on one device, and the model FLOPs of an image."""
    config = environment.recipe_config(arch, program)
    config.batch_size = batch
    mesh = sharding.make_mesh(jax.devices()[:1])
    setup = build_setup(config, steps_per_epoch=1_000)
    state = init_state(setup, mesh)
    step = None
    rng = np.random.default_rng(0)
    side = config.data.canvas_size
    canvas = rng.integers(0, 256, (batch, side, side, 3), np.uint8)
    size = np.full((batch, 2), (375, 500), np.float32)
    inputs = sharding.shard_batch(DeviceBatch(canvas, size, np.arange(batch, dtype=np.int32)), mesh)

    def run():
        nonlocal state, step
        step = step or compile_lowered(lower_step(setup, mesh, state))
        state, metrics = step(state, inputs)
        jax.block_until_ready((state, metrics))

    return run, flops_per_image(setup)


def ours_features(arch: str, batch: int, program: str):
    """A call that takes a batch of 224 x 224 images through the backbone."""
    backbone = build_setup(environment.recipe_config(arch, program), steps_per_epoch=1).method.backbone
    images = jax.random.normal(jax.random.key(0), (batch, 224, 224, 3))
    variables = jax.jit(backbone.init)(jax.random.key(1), images[:1])
    apply = jax.jit(lambda variables, images: backbone.apply(variables, images).cls)
    return lambda: jax.block_until_ready(apply(variables, images)), count_flops(apply, variables, images[:1])


def theirs(stage: str, arch: str, batch: int, compiled: bool):
    """The same of the PyTorch peer."""
    environment.import_torchvision()
    from benchmarks import torch_peer

    if stage == "features":
        return torch_peer.feature_extraction(arch, batch, compiled), None
    return torch_peer.Trainer(arch, batch, out_dim=65_536, compiled=compiled).step, None


def measure(who: str, stage: str, arch: str, batch: int, repeats: int) -> dict:
    """One cell: images_per_second, seconds of the first call, peak GiB, and ours' share of the device's peak."""
    ours = who not in ("eager", "compiled")
    if ours:
        run, work = (ours_train if stage == "train" else ours_features)(arch, batch, program=who)
    else:
        run, work = theirs(stage, arch, batch, compiled=who == "compiled")
    start = time.perf_counter()
    run()
    first = time.perf_counter() - start
    rate = batch / environment.median_seconds(run, repeats)
    found = {"images_per_second": rate, "first": first, "gib": peak_gib(ours)} | ({"flops": work} if work else {})
    peak = peak_flops(jax.devices()[0]) if ours else None
    if peak and work:
        found["mfu"] = rate * work / peak
    return found


def peak_gib(ours: bool) -> float:
    """Of the device's memory, of the process on a CPU."""
    if ours:
        stats = jax.devices()[0].memory_stats()
        used = stats and stats["peak_bytes_in_use"]
    else:
        import torch

        used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return (used or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**30


def cell(who: str, stage: str, arch: str, batch: str) -> dict:
    """`measure` in a process of its own; for 'largest' by doubling from 64 until it no longer fits."""
    ask = partial(environment.in_own_process, "benchmarks.step", who=who, stage=stage, arch=arch, repeats=REPEATS.value)
    if batch != "largest":
        return ask(batch=int(batch)) | {"batch": int(batch)}
    best, size = {"error": "64 does not fit"}, 64
    while "error" not in (found := ask(batch=size)):
        best, size = found | {"batch": size}, 2 * size
    return best if found["error"] == "out of memory" else found


def show(found: dict, asked: str) -> str:
    """A cell in words."""
    if "error" in found:
        return found["error"]
    batch = f"{found['batch']}: " if asked == "largest" else ""
    mfu = f", MFU {found['mfu']:.0%}" if "mfu" in found else ""
    share = f", {found['share']:.0%}" if "share" in found else ""
    return f"{batch}{found['images_per_second']:.2f} ({found['gib']:.2f} GiB, first {found['first']:.1f} s{mfu}{share})"


def with_shares(cells: list[dict], arch: str, reach: dict[tuple[str, str], float | None]) -> list[dict]:
    """Adds to each cell its FLOP/s as a share of its own products. The peer does the same work as ours, the first."""
    work = cells[0].get("flops")
    shared = []
    for i, found in enumerate(cells):
        most = reach.get((arch, "xla" if i < len(OURS.value) else "torch"))
        known = work and most and "images_per_second" in found
        shared.append(found | ({"share": found["images_per_second"] * work / (most * 1e9)} if known else {}))
    return shared


def main(argv: list[str]) -> None:
    """Prints the table, or with --row a cell."""
    if ROW.value:
        print(json.dumps(measure(**json.loads(ROW.value))))
        return
    print(f"{environment.describe()}; images/s (peak memory, first call), median of {REPEATS.value}\n")
    columns = [*OURS.value, *PEERS.value]
    reach = {
        (arch, who): environment.in_own_process("benchmarks.ceilings", who=who, arch=arch).get("rate")
        for arch in ARCH.value
        for who in ("xla", *(["torch"] if PEERS.value else []))
    }
    for (arch, who), found in reach.items():
        print(f"products of {arch} in {who}: {found or float('nan'):,.0f} GFLOP/s")
    print()
    names = [f"ours, {program}" for program in OURS.value] + [f"PyTorch {peer}" for peer in PEERS.value]
    print(f"| stage | batch | {' | '.join(names)} | ours / best peer |\n|---|---|{'---|' * len(columns)}---|")
    stages = [("train", arch, batch) for arch in ARCH.value for batch in BATCH.value]
    for stage, arch, batch in stages + [("features", arch, str(FEATURE_BATCH)) for arch in ARCH.value]:
        found = with_shares([cell(who, stage, arch, batch) for who in columns], arch, reach)
        rates = [f.get("images_per_second", 0) for f in found]
        ours, peer = max(rates[: len(OURS.value)]), max(rates[len(OURS.value) :], default=0)
        ratio = f"{ours / peer:.2f}" if peer else ""
        shown = " | ".join(show(f, batch) for f in found)
        print(f"| {stage} {arch}/16 | {batch} | {shown} | {ratio} |", flush=True)


if __name__ == "__main__":
    app.run(main)
