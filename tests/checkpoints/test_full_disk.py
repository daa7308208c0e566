"""Checkpoints without room: one line, and nothing that was saved is lost."""

import os
import resource
import shutil
import subprocess
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from dino_jax import checkpoints
from dino_jax.errors import UserError

# Orbax closes an event loop while more of its writes fail.
ORBAX_COMPLAINS = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def noise(step):
    """4 MiB that no compression makes less of."""
    bits = np.random.default_rng(step).integers(0, 2**32, 1 << 20, np.uint32)
    return {"step": jnp.int32(step), "bits": jnp.asarray(bits)}


def save_and_wait(manager, step, c):
    """Either half may tell of a full disk."""
    checkpoints.save(manager, step, noise(step), c)
    manager.wait_until_finished()


def save_into_a_full_disk(workdir, refuse, spare):
    """Two steps are saved, refuse() leaves no room for a third, spare() makes some again, and the same run goes on."""
    c = tiny_config()
    with checkpoints.open_manager(workdir, c.checkpoint) as manager:
        for step in (1, 2):
            save_and_wait(manager, step, c)
        refuse()
        with pytest.raises(UserError) as error:
            save_and_wait(manager, 3, c)
    spare()
    assert str(workdir / "checkpoints") in str(error.value)
    assert "make room" in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["1", "2"]
    with checkpoints.open_manager(workdir, c.checkpoint) as manager:
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), noise(0))
        state, step = checkpoints.restore(manager, target, c)
        assert step == 2
        jax.tree.map(np.testing.assert_array_equal, state, noise(2))
        assert checkpoints.save(manager, 3, noise(3), c)
    assert checkpoints.newest_intact(workdir / "checkpoints") == 3


@ORBAX_COMPLAINS
def test_a_file_that_may_not_grow_stops_with_one_line_and_the_last_step_intact(tmp_path):
    """As a full disk, a quota stops a file in its middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        save_into_a_full_disk(
            tmp_path,
            refuse=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1])),
            spare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before),
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def small_disk(folder):
    """40 MB mounted at a folder; skips where that is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no small disk: {error}")
    if mounted.returncode:
        pytest.skip(f"no small disk, mounting one needs root: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@ORBAX_COMPLAINS
def test_a_full_disk_stops_with_one_line_and_the_last_step_intact(tmp_path):
    with small_disk(tmp_path / "disk") as disk:

        def fill():
            with open(disk / "other", "wb") as file:
                file.truncate(0)
                os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - (2 << 20))

        save_into_a_full_disk(disk / "run", refuse=fill, spare=(disk / "other").unlink)
