"""The exit code of a process that does not end after a signal."""

import pytest
from processes import Process

from dino_jax.distributed.preemption import CUT_OFF
from dino_jax.errors import Stopped

HANGS = """
import os, signal, sys, time
from dino_jax.distributed.preemption import StopSignal
with StopSignal(grace=0.2) as stop:
    if sys.argv[1] == "saved":
        stop.saved()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("state", "code", "message"),
    [("saved", Stopped.exit_code, "the readers did not end in 0.2 s"), ("not saved", CUT_OFF, "before it could save")],
)
def test_the_exit_code_says_whether_the_run_was_saved(tmp_path, state, code, message):
    assert message in Process(tmp_path / "log", "-c", HANGS, state).finish(code)
