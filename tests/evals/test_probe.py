import jax
import numpy as np
import pytest
from tiny import tiny_config

from dino_jax.checkpoints import model_card
from dino_jax.data.pixels import Pixels
from dino_jax.data.sources import open_source
from dino_jax.distributed.sharding import make_mesh
from dino_jax.errors import UserError
from dino_jax.evals import probe
from dino_jax.training import loop
from dino_jax.training.evaluators import build_evaluators
from dino_jax.training.setup import backbone_variables, build_setup, init_state
from dino_jax.training.writers import read_metrics
from dino_jax.weights.backbone import Backbone


@pytest.fixture(scope="module")
def backbone():
    """An untrained one."""
    config = tiny_config()
    setup = build_setup(config, steps_per_epoch=5)
    state = init_state(setup, make_mesh())
    variables = jax.device_get(backbone_variables(state, "teacher"))
    return Backbone(setup.method.backbone, variables, model_card(config, 0))


def settings(**changes):
    config = probe.default_config()
    config.update(
        {"source": "demo:train:8", "images": 48, "batch_size": 16, "workers": 0, "canvas_size": 40, **changes}
    )
    return config


def features(backbone, **changes):
    config = settings(**changes)
    mean, std = (backbone.card["preprocessing"][key] for key in ("mean", "std"))
    augment = probe.global_crops(tiny_config().crops, mean, std)
    keys = ("images", "pairs", "seed", "canvas_size", "batch_size", "workers")
    reading = probe.Reading(pixels=Pixels(1), **{key: config[key] for key in keys})
    source = open_source(config.source)
    return probe.crop_features(backbone.model.apply, backbone.variables, augment, source, make_mesh(), reading)


def test_the_same_crops_each_time_whatever_the_batches(backbone):
    first, again = features(backbone), features(backbone, batch_size=24)
    assert first.cls.shape == first.patch.shape == (48, 4, 64)
    np.testing.assert_allclose(first.cls, again.cls, rtol=1e-4, atol=1e-5)  # sums of other shapes
    assert not np.allclose(first.cls, features(backbone, seed=1).cls, atol=1e-2)
    assert not np.allclose(first.cls[:, 0], first.cls[:, 2], atol=1e-2)  # crops of another pair


def test_a_source_smaller_than_a_batch_is_used_once(backbone):
    assert features(backbone, source="demo:train:1", batch_size=256).cls.shape == (10, 4, 64)
    with pytest.raises(UserError, match="images is 1"):
        features(backbone, source="demo:train:1", images=1)


def test_protocol_writes_figures(backbone, tmp_path, capsys):
    found = probe.run(backbone, settings(), tmp_path)
    assert 0 <= found["figures"]["crop_retrieval"] <= 100
    assert 1 <= found["figures"]["rankme"] <= 48
    assert set(found["figures"]) == {
        *("crop_retrieval", "rankme", "rankme_patch", "lidar", "alpha_req", "uniformity", "alignment")
    }
    assert set(found["untrained"]) == set(found["figures"])
    assert "crop_retrieval" in capsys.readouterr().out
    with pytest.raises(UserError, match="--config.source is empty"):
        probe.run(backbone, settings(source=""), tmp_path)


@pytest.mark.slow
def test_while_training(tmp_path):
    """At step 0, before it, the figures are the untrained network's."""
    changes = {"evals__probe__every_epochs": 1, "evals__probe__images": 40}
    loop.train(tiny_config(**changes), tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    measured = {row["step"]: row for row in rows if "probe_rankme" in row}
    assert sorted(measured) == [0, 5, 10]
    assert all(0 < row["probe_distinct_prototypes"] <= 64 for row in measured.values())
    config = tiny_config(**changes)
    setup, mesh = build_setup(config, steps_per_epoch=5), make_mesh()
    [evaluator] = build_evaluators(setup, open_source(config.data.source), mesh, 5, info=print)
    assert evaluator.evaluate(init_state(setup, mesh))["probe_rankme"] == pytest.approx(measured[0]["probe_rankme"])
