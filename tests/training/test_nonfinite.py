"""Faults of hosts, disks and numbers in real runs: each ends by itself, soon, with the cause in one line."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_jax.distributed.watchdog import HUNG, PEER_LOST

ROOT = Path(__file__).parents[2]
IMAGES = 64
TINY = [  # tiny_config() as flags
    "--config=configs/demo.py",
    "--config.batch_size=16",
    "--config.epochs=1000",
    "--config.log_every=1",
    "--config.head.out_dim=64",
    "--config.head.hidden_dim=32",
    "--config.head.bottleneck_dim=16",
    "--config.crops.local_number=0",
    "--config.evals.knn.every_epochs=0",
    "--config.distributed.num_processes=2",
]


def start_two(tmp_path, *flags, only=None):
    """train.py in two processes, each on images of its own (the same ones); their standard error goes to files."""
    for i in range(2):
        save_images(tmp_path / f"images{i}")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        flags = [*flags, f"--config.distributed.coordinator=localhost:{free.getsockname()[1]}"]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1", "JAX_PLATFORMS": "cpu"}
    processes = []
    for i in range(2) if only is None else [only]:
        command = [
            sys.executable,
            "train.py",
            *TINY,
            f"--config.data.source=folder:{tmp_path}/images{i}",
            *flags,
            f"--workdir={tmp_path / 'run'}",
        ]
        with open(tmp_path / f"{i}.err", "w") as stderr:
            command.append(f"--config.distributed.process_id={i}")
            processes.append(
                subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True)
            )
    return processes


def wait_for_step_2(process):
    next(line for line in process.stdout if line.startswith("step 2"))


def said(tmp_path, i):
    return (tmp_path / f"{i}.err").read_text()


def save_images(folder):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        Image.fromarray(rng.integers(0, 255, (32, 32), np.uint8)).save(folder / f"{i:02}.png")


def test_a_disk_that_hangs_on_one_of_2_hosts_ends_both(tmp_path):
    """A pipe that nobody writes to, in the place of an image, never returns from being read."""
    limits = ["--config.watchdog.seconds=8", "--config.data.workers=1", "--config.distributed.heartbeat=100"]
    processes = start_two(tmp_path, *limits)
    wait_for_step_2(processes[0])
    os.mkfifo(tmp_path / "pipe")
    os.replace(tmp_path / "pipe", tmp_path / "images1" / "07.png")
    for process in processes:
        process.communicate(timeout=200)
    # Whoever is the first to end takes the other with it: with its own line, or JAX's.
    assert HUNG in {process.returncode for process in processes}
    assert all(process.returncode for process in processes)
    assert re.search(
        r"error: step \d+ .*`data`, on process 1|process 1 at step \d+ \(data\)", said(tmp_path, 0) + said(tmp_path, 1)
    )
    assert "Thread 0x" in said(tmp_path, 0) + said(tmp_path, 1)
    left = [path for path in Path("/proc").glob("[0-9]*/environ") if str(tmp_path).encode() in read(path.parent)]
    assert not left


def read(process):
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("present", [0, 1])
def test_an_absent_process_is_said_to_be(tmp_path, present):
    processes = start_two(tmp_path, "--config.distributed.timeout=4", only=present)
    processes[0].communicate(timeout=60)
    assert processes[0].returncode == PEER_LOST
    assert said(tmp_path, present).startswith("error: not all processes have met in 4 s")


def test_a_killed_process_ends_the_other(tmp_path):
    first, second = start_two(tmp_path, "--config.distributed.heartbeat=5")
    wait_for_step_2(first)
    second.kill()
    second.communicate()
    first.communicate(timeout=60)
    assert first.returncode == PEER_LOST, said(tmp_path, 0)
    assert re.search(r"error: process 1 has been silent for 5 s, last heard of at step", said(tmp_path, 0))
