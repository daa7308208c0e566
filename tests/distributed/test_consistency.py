"""Processes and devices that disagree must be refused and named: they would train garbage without a word."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import LONGEST, environment, free_port
from tiny import tiny_config

from dino_jax.data.sources import open_source
from dino_jax.distributed import consistency, sharding

TWO = """
import sys
import jax, jax.numpy as jnp, numpy as np
from dino_jax.distributed import consistency, sharding
from dino_jax.data.sources import open_source
from dino_jax.errors import UserError
from tiny import tiny_config

me, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"localhost:{port}", 2, me)

def outcome(what, check):
    try:
        check()
        print(f"{what}: agreed", flush=True)
    except UserError as error:
        print(f"{what}: {error}", flush=True)

def scaled(factor):
    return jax.jit(lambda x: x * factor)

shape = jax.ShapeDtypeStruct((3,), np.float32)
same = tiny_config(data__workers=me, distributed__process_id=me)
other = tiny_config(optim__lr=0.001 if me else 0.0005)
outcome("same config", lambda: consistency.require_same(lambda: consistency.settings(same)))
outcome("other config", lambda: consistency.require_same(lambda: consistency.settings(other)))
outcome("same data", lambda: consistency.require_same(lambda: consistency.data(open_source("demo:train:2"))))
split = ("train", "test")[me]
outcome("other data", lambda: consistency.require_same(lambda: consistency.data(open_source(f"demo:{split}:2"))))
outcome("same program", lambda: consistency.require_same(lambda: consistency.program(scaled(2).lower(shape))))
outcome("other program", lambda: consistency.require_same(lambda: consistency.program(scaled(2 + me).lower(shape))))

mesh = sharding.make_mesh()
state = {"center": np.arange(5, dtype=np.float32), "step": np.int32(3)}
outcome("same state", lambda: consistency.require_same_state(sharding.replicate(state, mesh), mesh))
state["center"][2] += 1e-6 * me
outcome("other state", lambda: consistency.require_same_state(sharding.replicate(state, mesh), mesh))
"""


@pytest.fixture(scope="module")
def outcomes():
    """What each of two processes, of two devices each, says of each comparison: [{comparison: outcome}]."""
    port = str(free_port())
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment(devices=2)}
    processes = [subprocess.Popen([sys.executable, "-c", TWO, str(i), port], **pipes) for i in range(2)]
    told = []
    for process in processes:
        output, errors = process.communicate(timeout=LONGEST)
        assert process.returncode == 0, errors
        told.append(dict(line.split(": ", 1) for line in output.splitlines() if ": " in line))
    return told


@pytest.mark.slow
@pytest.mark.parametrize("what", ["config", "data", "program", "state"])
def test_processes_that_agree_go_on(outcomes, what):
    """Also where they differ in what is a host's own business: its number, its workers."""
    assert [told[f"same {what}"] for told in outcomes] == ["agreed"] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("config", "optim.lr (process 1 has 0.001, process 0 0.0005)"),
        ("data", "names of images of data.source (process 1 has"),
        ("program", "compiled step (process 1 has"),
        ("state", "of process 1 in center and 0 more"),
    ],
)
def test_processes_that_differ_are_refused_on_both_and_named(outcomes, what, message):
    for told in outcomes:
        assert message in told[f"other {what}"]


def test_the_odd_one_out_of_many_is_named():
    told = [{"optim.lr": 1}, {"optim.lr": 2}, {"optim.lr": 1}, {}]
    assert consistency.differences(told) == ["optim.lr (process 1 has 2, process 3 has null, process 0 1)"]
    assert consistency.differences([{"a": (1, 2)}, {"a": [1, 2]}]) == []


def test_settings_hold_what_decides_a_run():
    told = consistency.settings(tiny_config())
    assert json.dumps(told)
    assert {"optim.lr", "crops.global_scale", "version of jax", "version of jaxlib", "code of dino_jax"} <= set(told)
    assert not [name for name in told if name.startswith("distributed")]


def test_manifest_knows_order_and_number():
    few, fewer = open_source("demo:train:3"), open_source("demo:train:2")
    assert consistency.data(few) == consistency.data(open_source("demo:train:3"))
    assert not consistency.data(few).items() & consistency.data(fewer).items()


@pytest.mark.parametrize("dtype", [np.float32, np.int32, jnp.bfloat16, np.uint8])
@pytest.mark.parametrize("bit", [0, 7])
def test_one_flipped_bit_changes_the_sum(dtype, bit):
    mesh = sharding.make_mesh(jax.devices()[:1])
    x = np.arange(6).astype(dtype)
    flipped = x.copy()
    flipped.view(np.uint8)[3] ^= 1 << bit
    before, after = (np.asarray(consistency.checksums(mesh, {"x": jnp.asarray(value)})) for value in (x, flipped))
    assert before.shape == (1, 1, 1)
    assert before != after
