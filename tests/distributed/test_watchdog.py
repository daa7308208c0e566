"""A run that hangs, or waits for a dead process, must end by itself and say why: tried with processes that do."""

import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import LONGEST, environment, free_port

from dino_jax.distributed import watchdog
from dino_jax.distributed.watchdog import HUNG, PEER_LOST, Watchdog
from dino_jax.errors import UserError

HANGS = """
import multiprocessing, sys, time
from types import SimpleNamespace
from dino_jax.distributed.watchdog import Watchdog

def reading_from_a_dead_disk():
    time.sleep(300)

if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(300,), daemon=True)
    child.start()
    print(child.pid, flush=True)
    with Watchdog(SimpleNamespace(seconds=0.5, slow_seconds=300), heartbeat=60) as dog:
        for step in (1, 2):
            dog.beat("data", step)
            if step == 2:
                reading_from_a_dead_disk()
            dog.beat("step", step)
"""
PEER = """
import os, signal, sys, time
from types import SimpleNamespace
import jax
from dino_jax.distributed.watchdog import Watchdog

me, port, who, fault = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
jax.distributed.initialize(f"localhost:{port}", 2, me, heartbeat_timeout_seconds=60)
with Watchdog(SimpleNamespace(seconds=0, slow_seconds=300), heartbeat=2) as dog:
    dog.beat("step", 7)
    while not dog._peers.others():  # until both have heard of each other
        time.sleep(0.05)
    if me == who and fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if me == who and fault == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if me == who and fault == "raised":
        raise OSError("disk full")
    if fault != "done":
        time.sleep(300)
    if me != who:
        time.sleep(4)
"""


def run(script, *args):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, *([script] if args == () else ["-c", script, *args])]
    return subprocess.Popen(command, env=environment(), **pipes)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_hang_ends_with_the_stacks_and_without_workers(tmp_path):
    script = tmp_path / "hangs.py"  # a file, since workers are spawned
    script.write_text(HANGS)
    process = run(script)
    out, err = process.communicate(timeout=LONGEST)
    assert process.returncode == HUNG, err
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.search(r"step 2 .* 0.5 s in its phase `data`, on process 0.*--config.watchdog.seconds", line)
    assert "in reading_from_a_dead_disk" in err
    assert not is_alive(int(out))


@pytest.fixture
def ended(monkeypatch):
    """What `end` is called with, instead of the end."""
    calls = SimpleNamespace(event=threading.Event(), message="")

    def end(code, message, stacks=False):
        calls.message = message
        calls.event.set()

    monkeypatch.setattr(watchdog, "end", end)
    return calls


def test_the_first_step_and_evaluations_have_a_limit_of_their_own(ended):
    with Watchdog(SimpleNamespace(seconds=0.1, slow_seconds=300), heartbeat=60) as dog:
        for phase in ("start", "data", "step", "evaluation", "evaluation", "checkpoint"):
            dog.beat(phase, 1)
            assert not ended.event.wait(0.3), phase
        dog.beat("step", 2)
        assert ended.event.wait(30)
    assert "step 2" in ended.message


def test_a_slow_phase_that_hangs_names_its_own_knob(ended):
    with Watchdog(SimpleNamespace(seconds=0.1, slow_seconds=0.2), heartbeat=60) as dog:
        dog.beat("evaluation", 3)
        assert ended.event.wait(30)
    assert "`evaluation`" in ended.message
    assert "watchdog.slow_seconds" in ended.message


def test_beats_keep_it_quiet_and_0_switches_it_off(ended):
    with Watchdog(SimpleNamespace(seconds=0, slow_seconds=0.1), heartbeat=1) as dog:
        dog.beat("evaluation", 1)
        time.sleep(0.5)
    with Watchdog(SimpleNamespace(seconds=1.0, slow_seconds=1.0), heartbeat=60) as dog:
        for step in range(40):
            dog.beat("step", step)
            time.sleep(0.05)
    assert not ended.event.is_set()


def two(who, fault):
    """Process 0 and 1, of which `who` has a fault."""
    port = str(free_port())
    return [run(PEER, str(me), port, str(who), fault) for me in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("who", "fault", "message"),
    [
        (1, "killed", r"error: process 1 has been silent for 2 s, last heard from at step 7 \(step\)"),
        (1, "stopped", r"error: process 1 has been silent for 2 s, last heard from at step 7 \(step\)"),
        (0, "stopped", r"error: process 0, the coordinator, has not responded for 2 s"),
        (1, "raised", r"error: process 1 gave up, at step 7 \(step\): OSError: disk full"),
    ],
)
def test_a_lost_process_ends_the_others_and_is_named(who, fault, message):
    processes = two(who, fault)
    survivor = processes[1 - who]
    try:
        error = survivor.communicate(timeout=LONGEST)[1]
    finally:
        processes[who].send_signal(signal.SIGKILL)
        processes[who].communicate()
    assert survivor.returncode == PEER_LOST, error
    assert re.search(message, error)


@pytest.mark.slow
def test_a_process_that_is_done_is_not_lost():
    processes = two(1, "done")
    for process in processes:
        error = process.communicate(timeout=LONGEST)[1]
        assert process.returncode == 0, error


def test_a_jax_that_moved_its_store_is_one_line(monkeypatch):
    from jax._src import distributed

    monkeypatch.delattr(distributed, "global_state")
    with pytest.raises(UserError, match=r"jax \d.*has no jax\._src\.distributed\.global_state"):
        watchdog.key_value_store()
