"""The line that every table carries: date, machine, versions; how things are timed, each in a process of its own."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax

from configs import vits16

# For the rows: nearly all of a GPU's memory, as PyTorch takes it; errors without JAX's footer; no compiler cache of
# PyTorch's, as ours is off. For the process that prints the table: no more memory than it needs.
ROW = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "true",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93",
    "JAX_TRACEBACK_FILTERING": "off",
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
}
TABLE = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
LONGEST_ROW = 900  # seconds

# PyTorch's half is what its users install; both are said in the table's head.
PACKAGES = ("jax", "jaxlib", "flax", "torch", "timm", "torchvision", "kornia")


def describe() -> str:
    """Date, devices, cores and versions in one line."""
    os.environ.update(TABLE)
    device = jax.devices()[0]
    cpuinfo = Path("/proc/cpuinfo")  # Linux; elsewhere platform knows
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cpu = ", ".join([names[0] if names else platform.processor(), *_vector_instructions(lines)])
    return (
        f"{datetime.date.today()}, {jax.device_count()} x {device.device_kind}, {os.cpu_count()} cores ({cpu}), "
        f"Python {platform.python_version()}, {', '.join(_versions())}"
        + (f", GLIBC_TUNABLES={os.environ['GLIBC_TUNABLES']}" if "GLIBC_TUNABLES" in os.environ else "")
        + _huge_pages()
    )


def _huge_pages() -> str:
    """Who gets transparent huge pages on Linux: all (always), who asks (madvise; GLIBC_TUNABLES does), or nobody."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    found = re.search(r"\[(\w+)\]", setting.read_text()) if setting.exists() else None
    return f", huge pages: {found[1]}" if found else ""


def _vector_instructions(cpuinfo: list[str]) -> list[str]:
    """The widest vector instructions, which decide what a matrix product takes."""
    flags = {flag for line in cpuinfo if line.startswith("flags") for flag in line.split()}
    known = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX"}
    return [name for flag, name in known.items() if flag in flags][:1]


def _versions():
    for package in PACKAGES:
        try:
            yield f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue


def on_cpu() -> bool:
    """Whether JAX has no accelerator."""
    os.environ.update(TABLE)
    return jax.default_backend() == "cpu"


def recipe_config(arch: str, program: str):
    """The recipe of ViT-S/16 for another backbone, as `program`: a value of model.attention, and +unroll for that."""
    config = vits16.get_config()
    config.model.arch = arch
    config.model.attention, config.model.unroll = program.removesuffix("+unroll"), program.endswith("+unroll")
    return config


def median_seconds(run: Callable[[], object], repeats: int, warmup: int = 1) -> float:
    """Median wall time of run(), whose result is waited for."""
    times = []
    for _ in range(warmup + repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times[warmup:])


def in_own_process(module: str, **row) -> dict:
    """What `python -m module --row=JSON` prints on its last line, as JSON; {"error": why} if it fails.

    One process a row: peak memory is the row's own, PyTorch and JAX never share one, and running out of memory ends
    the row alone: its error begins with "out of memory".
    """
    command = [sys.executable, "-m", module, f"--row={json.dumps(row)}"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ | ROW, timeout=LONGEST_ROW
        )
    except subprocess.TimeoutExpired:
        return {"error": f"more than {LONGEST_ROW} s"}
    if not done.returncode:
        return json.loads(done.stdout.strip().splitlines()[-1])
    if done.returncode == -signal.SIGKILL or re.search("RESOURCE_EXHAUSTED|OutOfMemoryError", done.stderr):
        return {"error": "out of memory"}
    named = [line for line in done.stderr.splitlines() if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return {"error": (named or [f"exit code {done.returncode}"])[-1][:200].replace("|", "/")}


def wait_for_torch() -> None:
    """Until all that was asked of its device is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def import_torchvision():
    """The module, also where its compiled operators do not load.

    A torchvision built for CUDA beside a torch for CPUs fails to import for want of two operators, which nothing here
    uses. Their names are enough.
    """
    import torch

    try:
        import torchvision
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    return torchvision
