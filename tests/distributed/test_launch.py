"""Launchers that processes find each other by, with their environment faked on one machine."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def slurm_environment(task, job):
    """What srun gives task 0 or 1 of a job on this machine (the variables that JAX reads)."""
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(task),
        "SLURM_LOCALID": str(task),
        "SLURM_STEP_NUM_NODES": "1",
    }


def free_job():
    """A job number from which JAX derives a free port: 61440 + number modulo 4096."""
    for job in range(1000, 5000):
        with socket.socket() as probe:
            try:
                probe.bind(("localhost", job % 2**12 + 65535 - 2**12 + 1))
            except OSError:
                continue
        return job
    raise AssertionError("no free port")


def test_slurm_tasks_find_each_other(tmp_path):
    job = free_job()
    program = [
        "import sys, jax",
        "from dino_jax import sharding",
        "from configs import default",
        "config = default.get_config()",
        "config.distributed.auto, config.distributed.timeout = True, 60",
        "processes.initialize(config.distributed)",
        "print('task', jax.process_index(), 'of', jax.process_count(), 'devices', jax.device_count())",
    ]
    (tmp_path / "program.py").write_text("\n".join(program))
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    tasks = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "program.py")],
            env=os.environ | flags | slurm_environment(task, job),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for task in (0, 1)
    ]
    said = [task.communicate(timeout=120)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert [re.findall(r"task (\d) of 2 devices 4", text) for text in said] == [["0"], ["1"]]
