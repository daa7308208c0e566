import re

import pytest
from tiny import tiny_config

from dino_jax.training import loop

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    loop.train(tiny_config(), workdir)
    return workdir


def test_the_same_command_changes_nothing(finished, capsys):
    loop.train(tiny_config(), finished)
    output = capsys.readouterr().out
    assert "resuming after step 10" in output
    assert "changed" not in output
    assert "jump" not in output


def test_each_changed_setting_and_each_jump_of_a_schedule_is_said(finished, capsys):
    """A longer run and a larger rate: the learning rate had come down, and goes up again."""
    loop.train(tiny_config(epochs=3, optim__lr=0.01, data__source="demo:train:9"), finished)
    output = capsys.readouterr().out
    [settings] = re.findall("changed since the checkpoint: (.*)", output)
    assert "epochs 2 -> 3" in settings
    assert re.search(r"optim.lr [\d.]+ -> 0.01", settings)
    assert "data.source demo:train:8 -> demo:train:9" in settings
    [jumps] = re.findall("the schedules jump at step 10: (.*)", output)
    lr = re.search(r"lr ([\d.e-]+) -> ([\d.e-]+)", jumps)
    assert float(lr[2]) > 2 * float(lr[1])
    momentum = re.search(r"teacher_momentum ([\d.]+) -> ([\d.]+)", jumps)
    assert float(momentum[2]) < float(momentum[1])
