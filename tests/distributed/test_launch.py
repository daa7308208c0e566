"""Launchers that processes find each other by, with their environment faked on one machine."""

import re
import socket

import pytest
from processes import Process


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


PROGRAM = """
import jax
from configs import default
from dino_jax.distributed import processes

config = default.get_config()
config.distributed.auto, config.distributed.timeout = True, 300
processes.initialize(config.distributed)
print("task", jax.process_index(), "of", jax.process_count(), "devices", jax.device_count())
"""


@pytest.mark.slow
def test_slurm_tasks_find_each_other(tmp_path):
    job = free_job()
    tasks = [Process(tmp_path / f"log{i}", "-c", PROGRAM, devices=2, **slurm_environment(i, job)) for i in range(2)]
    outputs = [task.finish() for task in tasks]
    assert [re.findall(r"task (\d) of 2 devices 4", output) for output in outputs] == [["0"], ["1"]]
