"""The line that every table carries: date, machine, versions; and how things are timed."""

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax


def describe() -> str:
    """Date, devices, cores and versions in one line."""
    device = jax.devices()[0]
    cpuinfo = Path("/proc/cpuinfo")  # Linux; elsewhere platform knows
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor()
    return (
        f"{datetime.date.today()}, {jax.device_count()} x {device.device_kind}, {os.cpu_count()} cores ({cpu}), "
        f"Python {platform.python_version()}, jax {jax.__version__}"
    )


def median_seconds(run: Callable[[], object], repeats: int, warmup: int = 1) -> float:
    """Median wall time of run(), whose result is waited for."""
    times = []
    for _ in range(warmup + repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times[warmup:])
