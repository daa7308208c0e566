"""Trainers as processes of their own: how tests start them, wait for what they do, and end them."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tiny import tiny_flags

ROOT = Path(__file__).parents[1]
HELD = Path(__file__).with_name("held_train.py")
SEVERAL = Path(__file__).with_name("several_runs.py")
LONGEST = 600  # seconds that a process may take on a machine with much else to do
POLL = 0.02  # seconds
_started: list["Process"] = []


def environment(devices: int = 1, **changes: str) -> dict[str, str]:
    """This process's environment with that many CPU devices, and with this package and the tests to import."""
    flags = {"XLA_FLAGS": xla_flags(devices), "JAX_PLATFORMS": "cpu"}
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "PYTHONUNBUFFERED": "1"}
    return os.environ | flags | paths | changes


def xla_flags(devices: int) -> str:
    """XLA_FLAGS of this process for that many CPU devices."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"


class Process:
    """A Python program whose output, with its errors, goes to a file that can be read while it runs."""

    def __init__(self, log: Path, *arguments: str, devices: int = 1, **env: str):
        self.log = log
        with open(log, "w") as file:
            command = [sys.executable, *arguments]
            env = environment(devices, **env)
            self.popen = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file)
        _started.append(self)

    @property
    def output(self) -> str:
        """What the program has printed so far."""
        return self.log.read_text()

    @property
    def last_step(self) -> int:
        """The last step that the program has logged; 0 without one."""
        return max((int(step) for step in re.findall(r"^step (\d+)/", self.output, re.MULTILINE)), default=0)

    def wait_for(self, words: str) -> None:
        """Waits until the program has printed these words."""
        self._wait(lambda: words in self.output)

    def wait_for_file(self, path: Path) -> None:
        """Waits until the file exists."""
        self._wait(path.exists)

    def finish(self, code: int = 0) -> str:
        """Waits for the end, which must be with this code, and returns the output."""
        assert self.popen.wait(LONGEST) == code, self.output
        return self.output

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal, SIGTERM as a scheduler does and SIGKILL without mercy."""
        self.popen.send_signal(number)

    def _wait(self, condition: Any) -> None:
        deadline = time.monotonic() + LONGEST
        while not condition():
            assert self.popen.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(POLL)


def train(workdir: Path, *, program: Path | str = "train.py", devices: int = 1, env: dict | None = None, **changes):
    """train.py with the tiny settings and these changes; the log is `workdir`.log, or .1.log where that exists."""
    logs = (workdir.with_name(f"{workdir.name}{suffix}.log") for suffix in ("", ".1", ".2", ".3"))
    log = next(log for log in logs if not log.exists())
    return Process(log, str(program), *tiny_flags(**changes), f"--workdir={workdir}", devices=devices, **(env or {}))


class Held:
    """A trainer that stands still before the `call`-th call of a function, `module:function`, until `release`."""

    def __init__(self, workdir: Path, function: str, call: int = 1, **options: Any):
        self.reached, self._released = workdir.with_suffix(".reached"), workdir.with_suffix(".released")
        place = {"HOLD": f"{function}:{call}", "REACHED": str(self.reached), "RELEASED": str(self._released)}
        self.process = train(workdir, program=HELD, env=place, **options)

    def wait(self) -> None:
        """Waits until the trainer stands there."""
        self.process.wait_for_file(self.reached)

    def release(self) -> None:
        """Lets the trainer go on."""
        self._released.touch()


def free_port() -> int:
    """A port to listen on, from a part of the range below Linux's ephemeral ports that is this test process's own."""
    worker = int(re.sub(r"\D", "", os.environ.get("PYTEST_XDIST_WORKER", "")) or 0)
    for _ in range(1000):
        _ports[0] = (_ports[0] + 1) % 1000
        port = 12_000 + 1000 * (worker % 20) + _ports[0]
        with socket.socket() as probe:
            try:
                probe.bind(("localhost", port))
            except OSError:
                continue
        return port
    raise AssertionError("no free port")


_ports = [os.getpid() % 1000]


def two_processes(**changes: Any) -> list[dict[str, Any]]:
    """Changes of the config of process 0 and process 1 of two."""
    shared = {"distributed__coordinator": f"localhost:{free_port()}", "distributed__num_processes": 2}
    return [{**shared, "distributed__process_id": i, **changes} for i in range(2)]


def end_all() -> None:
    """Kills what a test that failed has left."""
    while _started:
        process = _started.pop().popen
        if process.poll() is None:
            process.kill()
        process.wait()
