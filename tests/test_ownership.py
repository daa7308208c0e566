"""Two writers never share a folder: the second is refused with the name of the first."""

import os
import subprocess
import sys

import pytest
from processes import train

from dino_jax.errors import UserError
from dino_jax.ownership import LOCK, owned

HOLDER = """
import sys, time
from dino_jax.ownership import owned
with owned(sys.argv[1], "--out"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_writer_is_refused_by_the_name_of_the_first_and_a_killed_one_is_taken_over(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "held\n"
        message = rf"in use by process {first.pid} on .* since 20.*another --out"
        with pytest.raises(UserError, match=message), owned(tmp_path, "--out"):
            raise AssertionError("both write")
    finally:
        first.kill()
        first.wait()
    with owned(tmp_path, "--out"):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    assert not (tmp_path / LOCK).exists()
    with owned(tmp_path, "--out"):
        pass


@pytest.mark.slow
def test_a_second_trainer_is_refused_and_the_first_does_not_notice(tmp_path):
    first = train(tmp_path / "run", epochs=40)
    first.wait_for("step 3/")
    second = train(tmp_path / "run", epochs=40)
    assert f"is in use by process {first.popen.pid}" in second.finish(2)
    first.finish()
