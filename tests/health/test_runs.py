"""Runs that say how they are."""

import json

import pytest
from processes import train
from tiny import tiny_config

from dino_jax.errors import Collapsed
from dino_jax.health import monitor
from dino_jax.health.logs import read_log
from dino_jax.training import loop
from dino_jax.training.writers import read_metrics

pytestmark = pytest.mark.slow

# One prototype wins: without centering, and with a sharp teacher that follows at once.
COLLAPSING = {
    **{"dino__centering": False, "dino__teacher_momentum": 0.5, "dino__warmup_teacher_temp": 0.01},
    **{"dino__teacher_temp": 0.01, "optim__warmup_epochs": 0, "epochs": 20, "log_every": 2},
}


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("collapsed")
    loop.train(tiny_config(**COLLAPSING), workdir)
    return workdir


def test_a_run_leaves_its_verdict(collapsed):
    report = json.loads((collapsed / "health.json").read_text())
    assert (report["verdict"], report["total_steps"], report["images"]) == ("collapsed", 100, 80)
    found = {one["name"]: one for one in report["findings"]}
    assert found["single_prototype"]["knob"] == "dino.centering"
    notes = [row["health"] for row in read_metrics(collapsed / "metrics.jsonl") if "health" in row]
    assert any("one prototype always wins" in note for note in notes)


def test_diagnose_and_a_resumed_run_say_the_same(collapsed):
    before = json.loads((collapsed / "health.json").read_text())
    log = read_log(collapsed)
    assert monitor.of_log(log.settings, log.total_steps, log.images, log.rows).report() == before
    loop.train(tiny_config(**COLLAPSING), collapsed)
    assert json.loads((collapsed / "health.json").read_text()) == before


def test_a_collapsed_run_can_end_itself(tmp_path):
    process = train(tmp_path / "run", **COLLAPSING, health__stop="collapse")
    output = process.finish(Collapsed.exit_code)
    assert "error: the run has collapsed at step" in output
    assert json.loads((tmp_path / "run" / "health.json").read_text())["verdict"] == "collapsed"
    assert not (tmp_path / "run" / "export").exists()
