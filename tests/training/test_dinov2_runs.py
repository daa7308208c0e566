"""DINOv2 as a user runs it: several processes, kills, evaluations and what a run leaves behind."""

import json

import numpy as np
import pytest
from processes import SEVERAL, Process, two_processes
from tiny import DINOV2, KNN, tiny_config, tiny_flags

from benchmarks import chaos
from dino_jax import load_backbone
from dino_jax.errors import UserError
from dino_jax.training import loop
from dino_jax.training.config_checks import check_config
from dino_jax.training.writers import read_metrics

pytestmark = pytest.mark.slow
CHANGES = DINOV2 | {"epochs": 12}  # 24 steps


def losses(workdir):
    names = ("loss", "loss_dino", "loss_ibot", "loss_koleo")
    return [[row[name] for name in names] for row in read_metrics(workdir / "metrics.jsonl") if "loss" in row]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("dinov2")
    loop.train(tiny_config(**CHANGES | KNN | {"evals__knn__every_epochs": 12}), workdir)
    return workdir


def test_a_run_logs_each_loss_evaluates_and_exports(trained):
    assert len(losses(trained)) == 24
    assert [row["step"] for row in read_metrics(trained / "metrics.jsonl") if "knn_top1_teacher" in row] == [0, 24]
    backbone = load_backbone(trained)
    assert backbone.card["architecture"]["registers"] == 2
    images = np.zeros((2, 32, 32, 1), np.uint8)
    assert np.isfinite(backbone(images).cls).all()


def test_same_losses_in_2_processes(trained, tmp_path):
    folder = tmp_path / "runs"
    processes = [
        Process(tmp_path / f"log{i}", str(SEVERAL), json.dumps([(str(folder / "two"), CHANGES | me)]), devices=2)
        for i, me in enumerate(two_processes())
    ]
    for process in processes:
        assert "two: trained" in process.finish()
    np.testing.assert_allclose(losses(folder / "two"), losses(trained), rtol=1e-5)


def test_a_run_that_is_killed_ends_with_the_same_bits(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
        report = chaos.run(kills=1, seed=0, folder=tmp_path / "runs", arguments=tiny_flags(**CHANGES)[1:])
    assert report.kills == 1
    assert "patch_center" in report.digests
    assert report.digests == report.reference_digests


@pytest.mark.parametrize("frozen_epochs", [0.0, 11.5])
def test_the_backbone_waits_for_new_heads(trained, tmp_path, frozen_epochs):
    """Frozen for all steps but the last, whose learning rate is nearly 0, it stays what it was."""
    start = {"init_from": str(trained / "export"), "optim__freeze_backbone_epochs": frozen_epochs}
    loop.train(tiny_config(**CHANGES | start), tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 1), np.uint8)
    before, after = (load_backbone(path)(images).cls for path in (trained, tmp_path))
    change = np.abs(after - before).max() / np.abs(before).max()
    assert change < 1e-3 if frozen_epochs else change > 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dinov2__group_images": 3}, "set --config.dinov2.group_images to one of 2, 4, 8, 16, 32"),
        ({"dinov2__mask_ratio": (0.5, 0.1)}, "set --config.dinov2.mask_ratio to a smaller and a larger number"),
        ({"dinov2__mask_ratio": (0.1, 0.2, 0.5)}, "set --config.dinov2.mask_ratio to a smaller and a larger number"),
        (
            {"model__patch_size": 16},
            "2 patches a side, too few for masks: set --config.crops.global_size to 64 or more",
        ),
        ({"batch_size": 1, "dinov2__group_images": 2}, "set --config.batch_size to 2 or more"),
        ({"dinov2__mask_probability": 0.0}, "mask no patch of 16: set --config.dinov2.mask_probability"),
        ({"head__use_bn": True}, "set --config.head.use_bn=False"),
        ({"model__arch": "resnet18"}, "--config.model"),
        ({"dinov2__targets": "softmax"}, "set --config.dinov2.targets to one of center, sinkhorn"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        check_config(tiny_config(**DINOV2 | changes), devices=1)
