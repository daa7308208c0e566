import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from dino_jax.training import loop, recent, schedules

NOW = schedules.Values(*[jnp.float32(0)] * len(schedules.Values._fields))


def after(norms, skipped=()):
    """What a run remembers after steps of these gradient norms; steps are numbered from 0."""
    add = jax.jit(recent.add)
    memory = recent.init(4)
    for step, norm in enumerate(norms):
        memory = add(memory, jnp.int32(step), NOW, jnp.float32(norm), jnp.bool_(step in skipped), jnp.ones(4) / 4)
    return memory


def test_the_limit_is_a_multiple_of_the_quantile_once_there_are_enough_norms():
    assert recent.max_grad_norm(after([2.0] * (recent.FEW - 1)), 3.0) == np.inf
    assert recent.max_grad_norm(after([2.0] * recent.FEW), 3.0) == 6.0
    assert recent.max_grad_norm(after([2.0] * recent.FEW), 0.0) == np.inf


@pytest.mark.parametrize("spike", [7.0, np.inf, np.nan])
def test_a_skipped_step_does_not_raise_the_limit(spike):
    assert recent.max_grad_norm(after([2.0] * recent.FEW + [spike], skipped={recent.FEW}), 3.0) == 6.0


def test_the_quantile_is_that_of_the_last_steps():
    norms = np.random.default_rng(0).gamma(2.0, size=recent.WINDOW + 500).astype(np.float32)
    # NumPy interpolates in float64, the step in float32.
    np.testing.assert_allclose(recent.quantile(after(norms)), np.quantile(norms[500:], 0.99), rtol=1e-6)
    assert np.isnan(recent.quantile(recent.init(4)))


@pytest.mark.slow
def test_a_resumed_run_skips_the_steps_that_an_uninterrupted_run_skips(tmp_path):
    """After a kill between saves, the same final bits as without it."""
    config = tiny_config(
        data__source="demo:train:8",
        batch_size=4,
        epochs=10,
        optim__skip_above=0.17,  # the norms of some steps exceed it
        checkpoint__every_steps=130,
        checkpoint__keep_last=9,
    )
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    final = loop.train(config, whole)
    skipped = [row["step"] for row in map(json.loads, (whole / "metrics.jsonl").open()) if row.get("skipped")]
    assert min(skipped) > recent.FEW
    assert max(skipped) > 130
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "200")
    again = loop.train(config, resumed)
    jax.tree.map(np.testing.assert_array_equal, final, again)


@pytest.mark.slow
def test_checkpoints_of_versions_without_it_resume(tmp_path, monkeypatch, capsys):
    config = tiny_config(data__source="demo:train:8", batch_size=4)
    save = loop.checkpoints.save
    with monkeypatch.context() as patch:
        patch.setattr(loop.checkpoints, "save", lambda m, step, state, c: save(m, step, state.replace(recent={}), c))
        loop.train(config, tmp_path)
    state = loop.train(config, tmp_path)
    assert "resuming after step 40" in capsys.readouterr().out
    assert (state.recent["grad_norms"] == -1).all()
