"""Faults of hosts and disks in real runs: each ends by itself, soon, with the cause in one line."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import HELD, LONGEST, Held, train, two_processes

from dino_jax.distributed.watchdog import HUNG, PEER_LOST

EPOCHS, IMAGES = 12, 80
STEP = "dino_jax.training.loop:Run.step"
pytestmark = pytest.mark.slow


def two_hosts(folder, **changes):
    """Changes of the config of two processes, each with images of its own (the same ones)."""
    both = two_processes(epochs=EPOCHS, **changes)
    for i, changes in enumerate(both):
        save_images(folder / f"images{i}")
        changes["data__source"] = f"folder:{folder}/images{i}"
    return both


def save_images(folder):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        Image.fromarray(rng.integers(0, 255, (32, 32), np.uint8)).save(folder / f"{i:02}.png")


def test_a_disk_that_hangs_on_one_of_2_hosts_ends_both(tmp_path):
    """One host's images never return from being read, from the second epoch on."""
    limits = {"watchdog__seconds": 8, "data__workers": 1, "distributed__heartbeat": 100}
    mine, theirs = two_processes(epochs=EPOCHS, **limits)
    first = train(tmp_path / "run", devices=2, **mine)
    second = train(tmp_path / "run", program=HELD, env={"DEMO_EPOCHS": "1"}, devices=2, **theirs)
    codes = [process.popen.wait(LONGEST) for process in (first, second)]
    # Whoever is the first to end takes the other with it: with its own line, or JAX's.
    assert HUNG in codes
    assert all(codes)
    outputs = first.output + second.output
    assert re.search(r"error: step \d+ .*`data`, on process 1|process 1 at step \d+ \(data\)", outputs)
    assert "Thread 0x" in outputs
    left = [path for path in Path("/proc").glob("[0-9]*/environ") if str(tmp_path).encode() in read(path.parent)]
    assert not left


def read(process):
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("present", [0, 1])
def test_an_absent_process_is_said_to_be(tmp_path, present):
    process = train(tmp_path / "run", **two_processes(distributed__timeout=4)[present])
    assert process.finish(PEER_LOST).startswith("error: not all processes have met in 4 s")


def test_a_killed_process_ends_the_other(tmp_path):
    mine, theirs = two_hosts(tmp_path, distributed__heartbeat=5)
    first = train(tmp_path / "run", devices=2, **mine)
    held = Held(tmp_path / "run", STEP, call=3, devices=2, **theirs)
    held.wait()
    held.process.end()
    held.process.popen.wait()
    output = first.finish(PEER_LOST)
    assert re.search(r"error: process 1 has been silent for 5 s, last heard from at step", output)
