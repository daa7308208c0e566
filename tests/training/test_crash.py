"""Runs that are killed: real processes, real signals."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import chaos
from dino_jax import checkpoints
from dino_jax.errors import Stopped

ROOT = Path(__file__).parents[2]
TINY = [  # tiny_config() as flags, but longer
    "--config.batch_size=16",
    "--config.epochs=12",  # of 5 steps
    "--config.log_every=1",
    "--config.head.out_dim=64",
    "--config.head.hidden_dim=32",
    "--config.head.bottleneck_dim=16",
    "--config.crops.local_number=0",
    "--config.data.source=demo:train:8",
    "--config.evals.knn.every_epochs=0",
    "--config.checkpoint.every_steps=4",
]


def test_a_run_that_is_killed_3_times_ends_with_the_same_bits(tmp_path):
    report = chaos.run(kills=3, seed=0, folder=tmp_path, arguments=TINY)
    assert report.kills == 3
    assert {"student", "teacher", "center", "opt_state"} <= set(report.digests)
    assert report.digests == report.reference_digests
    assert not report.left_over
    assert report.good


def start(workdir, *flags, program="train.py", **env):
    """A run in a process of its own, and the file that has what it says."""
    said = workdir.with_suffix(".log")
    command = [sys.executable, program, "--config=configs/demo.py", *TINY, f"--workdir={workdir}", *flags]
    with open(said, "w") as log:
        env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | env
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log), said


def wait_until(process, said, words, timeout=200):
    deadline = time.monotonic() + timeout
    while words not in said.read_text():
        assert process.poll() is None, said.read_text()
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.02)


def last_step(text):
    return max((int(step) for step in re.findall(r"^step (\d+)/", text, re.MULTILINE)), default=0)


KNN = [
    "--config.evals.knn.every_epochs=1",
    "--config.evals.knn.train=demo:train:400",
    "--config.evals.knn.test=demo:test",
    "--config.evals.knn.k=5",
]
PHASES = {  # what the run has said, seconds after it, flags
    "evaluation": ("step 5/60", 0.1, KNN),
    "step": ("step 6/60", 0.0, []),
    "saving": ("step 8/60", 0.0, ["--config.head.out_dim=65536"]),
    "start": ("no knn evaluation", 0.3, []),
}


@pytest.mark.parametrize("phase", PHASES)
def test_sigterm_saves_and_exits_with_75_in_any_phase(tmp_path, phase):
    words, seconds, flags = PHASES[phase]
    process, said = start(tmp_path / "run", "--config.epochs=12000", *flags)
    wait_until(process, said, words.replace("/60", "/60,000"))
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=chaos.LONGEST) == Stopped.exit_code, said.read_text()
    text = said.read_text()
    saved = checkpoints.newest_intact(tmp_path / "run" / "checkpoints") or 0
    assert f"stopped by a signal after step {saved}: the same command resumes here" in text
    assert last_step(text) == saved


def test_sigterm_while_the_compiler_works_does_not_wait_for_it(tmp_path):
    process, said = start(tmp_path / "run", "--config.model.arch=vit_small", JAX_COMPILATION_CACHE_DIR="")
    wait_until(process, said, "no knn evaluation")
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=chaos.LONGEST) == Stopped.exit_code, said.read_text()
    assert "stopped by a signal" in said.read_text()


STALLING = """
import os, sys, time
from pathlib import Path
from dino_jax.data.sources import SCHEMES
from dino_jax.data.sources.demo import DemoSource

class Stalling(DemoSource):
    def __getitem__(self, i):
        while Path(os.environ["STALL"]).exists():
            time.sleep(0.1)
        return super().__getitem__(i)

SCHEMES["demo"] = Stalling
import train
from dino_jax.commands import cli

if __name__ == "__main__":
    cli.run(train.main)
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_sigterm_while_no_image_comes(tmp_path, workers):
    program, stall = tmp_path / "stalling.py", tmp_path / "stall"
    program.write_text(STALLING)
    flags = ["--config.epochs=12000", f"--config.data.workers={workers}"]
    process, said = start(tmp_path / "run", *flags, program=str(program), STALL=str(stall))
    wait_until(process, said, "step 6/")
    stall.touch()
    before, after = -1, 0
    while before < after:  # until the batches that were ready are used up
        time.sleep(1)
        before, after = after, last_step(said.read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=chaos.LONGEST) == Stopped.exit_code, said.read_text()
    saved = checkpoints.newest_intact(tmp_path / "run" / "checkpoints")
    assert f"stopped by a signal after step {saved}" in said.read_text()
