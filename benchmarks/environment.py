"""The line that every table carries: date, machine, versions; how things are timed, each in a process of its own."""

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Rows run in processes of their own: the one that prints the table must leave them the device's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402

# PyTorch's half is what its users install; both are said in the table's head.
PACKAGES = ("jax", "jaxlib", "flax", "torch", "timm", "torchvision", "kornia")


def describe() -> str:
    """Date, devices, cores and versions in one line."""
    device = jax.devices()[0]
    cpuinfo = Path("/proc/cpuinfo")  # Linux; elsewhere platform knows
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor()
    return (
        f"{datetime.date.today()}, {jax.device_count()} x {device.device_kind}, {os.cpu_count()} cores ({cpu}), "
        f"Python {platform.python_version()}, {', '.join(_versions())}"
        + (f", GLIBC_TUNABLES={os.environ['GLIBC_TUNABLES']}" if "GLIBC_TUNABLES" in os.environ else "")
    )


def _versions():
    for package in PACKAGES:
        try:
            yield f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue


def on_cpu() -> bool:
    """Whether JAX has no accelerator."""
    return jax.default_backend() == "cpu"


def median_seconds(run: Callable[[], object], repeats: int, warmup: int = 1) -> float:
    """Median wall time of run(), whose result is waited for."""
    times = []
    for _ in range(warmup + repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times[warmup:])


def in_own_process(module: str, **row) -> dict:
    """What `python -m module --row=JSON` prints on its last line, as JSON; {"error": its last words} if it fails.

    One process a row: peak memory is the row's own, PyTorch and JAX never share one, and running out of memory ends
    the row alone.
    """
    command = [sys.executable, "-m", module, f"--row={json.dumps(row)}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"error": words[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


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
