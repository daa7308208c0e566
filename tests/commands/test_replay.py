"""A run that stops for what is not finite leaves a file from which one command shows the step again."""

import json
import math
import shutil

import numpy as np
import pytest
from tiny import tiny_config

from dino_jax.commands import replay
from dino_jax.data.pipeline import train_batches
from dino_jax.data.pixels import Pixels
from dino_jax.data.sources import open_source
from dino_jax.errors import NotFiniteError, UserError
from dino_jax.training import loop, nonfinite
from dino_jax.training.nonfinite import StepGuard


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of ten steps with checkpoints after 4, 8 and 10, and a replay file of step 7 as if it had stopped there."""
    workdir, config = tmp_path_factory.mktemp("finished"), tiny_config(crops__local_number=0, checkpoint__keep_last=9)
    loop.train(config, workdir)
    source = open_source(config.data.source)
    with train_batches(source, batch_size=16, canvas_size=config.data.canvas_size, pixels=Pixels(1), seed=0) as batches:
        index = [next(batches).index for _ in range(7)][-1]
    return workdir, nonfinite.write_replay_file(workdir, config, source, step=7, saved=4, skipped=[], index=index)


@pytest.mark.slow
def test_the_very_same_step(finished):
    """From the checkpoint after step 4, over the batches of 5 and 6: bit for bit what was logged of step 7."""
    workdir, file = finished
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    [run] = [line for line in logged if line["step"] == 7 and "loss" in line]
    report = replay.replay(file)
    assert report.metrics["loss"] == run["loss"]
    assert report.metrics["grad_norm"] == run["grad_norm"]
    assert report.images == []
    assert math.hypot(*report.grad_norms.values()) == pytest.approx(run["grad_norm"], rel=1e-5)


@pytest.mark.slow
def test_a_run_that_overflows_is_replayed(tmp_path, capsys, monkeypatch):
    """A learning rate that throws the weights far away, so that the head's products overflow in the second step."""
    settings = {"optim__lr": 1e16, "optim__warmup_epochs": 0, "optim__clip_grad": 0.0, "optim__max_skipped": 2}
    settings |= {"crops__local_number": 0, "checkpoint__every_steps": 1}
    message = r"step 4 .* 2 other skipped steps in a row.* dino-jax replay .*replay-4.json"
    with pytest.raises(NotFiniteError, match=message):
        loop.train(tiny_config(**settings), tmp_path)
    lines = capsys.readouterr().out
    assert "step 2 is skipped" in lines
    assert "2 in a row, 2 in total" in lines
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")  # devices are there already
    replay.main([str(tmp_path / "replay-4.json")])
    out = capsys.readouterr().out
    assert "loss nan" in out
    norms = [float(line.split()[0]) for line in out.splitlines() if ".blocks" in line or "head." in line]
    assert norms
    assert not np.isfinite(norms[0])
    assert "images with non-finite values: 16" in out
    assert "student" in out


@pytest.mark.slow
def test_mistakes_are_one_line(finished, tmp_path):
    workdir, file = finished
    with pytest.raises(UserError, match="give WORKDIR/replay-STEP.json"):
        replay.replay(workdir / "config.json")
    with pytest.raises(UserError, match=r"usage: dino-jax replay WORKDIR/replay-STEP\.json"):
        replay.main([])
    alone = shutil.copy(file, tmp_path)
    with pytest.raises(UserError, match="checkpoints/4, where the replay starts, is missing"):
        replay.replay(alone)


@pytest.mark.slow
def test_an_edited_file_is_one_line(finished, tmp_path):
    told = json.loads(finished[1].read_text())
    for name in ("step", "seed", "checkpoint", "skipped", "images", "config"):
        for odd in (None, "a", -1, [], ["a"], {}, {"model": 3}):
            (tmp_path / "replay-7.json").write_text(json.dumps({**told, name: odd}))
            with pytest.raises(UserError) as caught:
                replay.replay(tmp_path / "replay-7.json")
            assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_other_images_are_refused(finished):
    workdir, file = finished
    told = json.loads(file.read_text())
    told["images"][3]["name"] = "another.jpg"
    other = workdir / "replay-other.json"
    other.write_text(json.dumps(told))
    with pytest.raises(UserError, match="no longer has the images of step 7"):
        replay.replay(other)


def values(skip=False, grad_norm=1.0, param_norm=1.0):
    loss = math.nan if skip else 1.0
    return {"loss": loss, "grad_norm": grad_norm, "param_norm": param_norm, "skipped": float(skip)}


@pytest.fixture
def watch(tmp_path):
    config = tiny_config(optim__max_skipped=2)
    return StepGuard(config, tmp_path, open_source("demo:train:2"), last_saved=0)


def test_only_steps_in_a_row_end_a_run(watch):
    index = np.arange(16)
    for step, skip in enumerate([True, True, False, True, True], start=1):
        scalars = watch.check(step, values(skip), index)
    assert scalars["skipped_steps"] == 4
    with pytest.raises(NotFiniteError, match="loss is nan at step 6"):
        watch.check(6, values(skip=True), index)


def test_parameters_that_are_not_finite_end_a_run_at_once(watch):
    with pytest.raises(NotFiniteError, match="param_norm is inf at step 1"):
        watch.check(1, values(param_norm=math.inf), np.arange(16))
