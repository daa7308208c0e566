"""Findings and verdicts from rows like those that short runs with planted faults logged."""

import math

import pytest

from dino_jax.health import monitor
from dino_jax.health.findings import EFFECTS

TOTAL, K = 18_000, 256
LN_K = math.log(K)
HEALTHY = {  # of the demo at step 600
    **{"loss": 5.15, "teacher_entropy": 4.84, "kl": 0.31, "mean_target_entropy": 5.28, "prototypes_used": 5.6},
    **{"teacher_spread": 0.31, "student_spread": 0.28, "teacher_distance": 0.04, "update_ratio": 1e-3, "lr": 8e-4},
    **{"pixel_spread": 1.2, "crop_pixel_spread": 1.1, "crop_difference": 0.75, "repeated_images": 0.0},
    **{"teacher_momentum": 0.99, "teacher_temp": 0.04, "weight_decay": 0.04, "param_norm": 26.0, "skipped_steps": 0.0},
}
SETTINGS = {"head.out_dim": K, "epochs": 48.0, "optim.lr": 8e-3, "dino.student_temp": 0.1, "dino.sharpening": True}


def watched(changes=None, settings=None, images=12_000, steps=(1, 200, 400, 600, 800, 1000), total=TOTAL, **extra):
    """A monitor that has seen these steps: healthy but for the changes, numbers or functions of the step."""
    rows = [
        {"step": step} | {k: v(step) if callable(v) else v for k, v in {**HEALTHY, **(changes or {}), **extra}.items()}
        for step in steps
    ]
    return monitor.of_log(SETTINGS | (settings or {}), total, images, rows)


def found(health):
    return {one["name"]: one for one in health.report()["findings"] if one["until_step"] is None}


def test_a_healthy_run_has_no_findings():
    health = watched()
    assert not health.report()["findings"]
    assert health.verdict() == "learning"
    assert health.summary() == "learning: no findings"
    assert watched(steps=(1, 200)).verdict() == "too early to say"


UNIFORM = {"teacher_entropy": 5.54, "mean_target_entropy": 5.545, "kl": 0.004, "loss": 5.544}
SINGLE = {"teacher_entropy": 1e-6, "mean_target_entropy": 1e-6, "kl": 0.02, "loss": 0.02, "prototypes_used": 1.0}


def test_the_first_steps_of_a_short_run_are_no_collapse():
    ours = {"log_every": 5}
    assert not watched(UNIFORM, ours, steps=range(5, 500, 5), total=600).report()["findings"]
    assert "uniform_collapse" in found(watched(UNIFORM, ours, steps=range(5, 505, 5), total=600))
    assert "uniform_collapse" in found(watched(UNIFORM, steps=range(1, 5), total=100))  # epochs, of another code's log


@pytest.mark.parametrize(
    ("name", "changes", "settings", "knob", "verdict"),
    [
        ("uniform_collapse", UNIFORM, {"dino.sharpening": False}, "dino.sharpening", "collapsed"),
        ("uniform_collapse", UNIFORM | {"teacher_temp": 0.2}, {}, "dino.teacher_temp", "collapsed"),
        ("uniform_collapse", UNIFORM, {"dino.teacher_update": "copy"}, "dino.teacher_update", "collapsed"),
        ("uniform_collapse", UNIFORM | {"teacher_momentum": 0.0}, {}, "dino.teacher_momentum", "collapsed"),
        ("single_prototype", SINGLE, {"dino.centering": False}, "dino.centering", "collapsed"),
        ("single_prototype", SINGLE, {"dino.center_momentum": 0.9999}, "dino.center_momentum", "collapsed"),
        (
            "partial_collapse",
            {"teacher_entropy": 3.0, "mean_target_entropy": 3.01},
            {"optim.lr": 1.0},
            "optim.lr",
            "collapsed",
        ),
        ("constant_features", {"teacher_spread": 0.01, "update_ratio": 0.1}, {}, "optim.lr", "collapsed"),
        ("not_moving", {"update_ratio": 1e-9}, {"optim.lr": 1e-9}, "optim.lr", "not learning"),
        ("not_moving", {"teacher_momentum": 1.0}, {}, "dino.teacher_momentum", "not learning"),
        ("diverging", {"param_norm": lambda step: 26.0 * step}, {"optim.lr": 2.0}, "optim.lr", "not learning"),
        (
            "shrinking_weights",
            {"param_norm": lambda step: 26.0 / step, "weight_decay": 20.0},
            {},
            "optim.weight_decay",
            "not learning",
        ),
        (
            "nonfinite_steps",
            {"skipped_steps": lambda step: step // 50, "update_ratio": 0.1},
            {},
            "optim.lr",
            "not learning",
        ),
        ("constant_input", {"crop_pixel_spread": 0.001}, {"data.std": [300.0]}, "data.std", "not learning"),
        ("constant_input", {"crop_pixel_spread": 0.0}, {"data.std": [0.25]}, "data.source", "not learning"),
        (
            "crops_too_alike",
            {"crop_difference": 0.05},
            {"crops.global_scale": [1.0, 1.0]},
            "crops.global_scale",
            "not learning",
        ),
        ("overfitting_few_images", {"repeated_images": 0.9}, {}, "data.source", "learning"),
        (
            "too_many_prototypes",
            {"teacher_entropy": 9.0, "mean_target_entropy": 9.9},
            {"head.out_dim": 65_536},
            "head.out_dim",
            "learning",
        ),
    ],
)
def test_each_fault_is_named_with_its_knob(name, changes, settings, knob, verdict):
    health = watched(changes, settings)
    assert found(health)[name]["knob"] == knob
    assert health.verdict() == verdict


def test_every_effect_is_tested():
    tested = {
        mark.args[1][i][0]
        for mark in test_each_fault_is_named_with_its_knob.pytestmark
        for i in range(len(mark.args[1]))
    }
    assert {effect.name for effect in EFFECTS} - tested == {"no_progress", "features_lost"}


def test_few_images_seen_thousands_of_times():
    assert found(watched(images=50, settings={"epochs": 11_520.0}))["overfitting_few_images"]["knob"] == "data.source"


def test_one_bad_batch_is_no_finding():
    assert not watched({"teacher_entropy": lambda step: 5.545 if step == 800 else 4.8}).report()["findings"]


def test_a_finding_says_since_when_and_until_when():
    health = watched({"update_ratio": lambda step: 1e-9 if step < 500 else 1e-3}, steps=range(100, 1000, 100))
    [one] = health.report()["findings"]
    assert (one["name"], one["since_step"], one["until_step"]) == ("not_moving", 300, 500)
    assert health.summary() == "learning: not_moving since step 300 until 500"
    health = monitor.Monitor(SETTINGS, TOTAL, 12_000)
    notes = [
        health.update(step, HEALTHY | {"update_ratio": 1e-9 if step < 500 else 1e-3}) for step in range(100, 1000, 100)
    ]
    assert [bool(lines) for lines in notes] == [False, False, True, False, True, False, False, False, False]
    assert "Try optim.lr" in notes[2][0]
    assert "resolved at step 500" in notes[4][0]


def test_measures_decide_once_they_rise_or_do_not():
    def measured(*values, step=1000):
        rows = [{"step": 0, "probe_crop_retrieval": values[0]}]
        for i, value in enumerate(values[1:], start=1):
            rows += [{"step": step * i, **HEALTHY}, {"step": step * i, "probe_crop_retrieval": value}]
        return monitor.of_log(SETTINGS, TOTAL, 12_000, rows)

    assert measured(1.3, 1.28).verdict() == "too early to say"
    assert measured(60.0, 60.5, 61.0).verdict() == "too early to say"
    assert measured(60.0, 60.5, 61.0, step=4000).verdict() == "learning"  # training on from good features
    rising = measured(3.0, 40.0, 61.0)
    assert rising.verdict() == "learning"
    assert rising.summary() == "learning: probe_crop_retrieval 3.0 -> 61.0; no findings"
    assert found(measured(1.3, 1.2, 1.1, step=4000))["no_progress"]["evidence"].endswith(
        "probe_crop_retrieval 1.3, now 1.2"
    )
    short = [{"step": 0, "probe_crop_retrieval": 1.3}]
    short += [
        row for step in (500, 1000) for row in ({"step": step, **HEALTHY}, {"step": step, "probe_crop_retrieval": 1})
    ]
    assert found(monitor.of_log(SETTINGS, 1_000, 12_000, short))["no_progress"]["knob"] == "epochs"


@pytest.mark.parametrize(("frozen", "knob"), [(0.0, "optim.freeze_backbone_epochs"), (2.0, "optim.lr")])
def test_pretrained_features_that_get_worse_are_named(frozen, knob):
    def continued(*values, **settings):
        rows = [{"step": 0, "knn_top1_teacher": values[0]}]
        for i, value in enumerate(values[1:], start=1):
            rows += [{"step": 1000 * i, **HEALTHY}, {"step": 1000 * i, "knn_top1_teacher": value}]
        settings |= {"optim.freeze_backbone_epochs": frozen, "optim.lr": 1e-3}
        return found(monitor.of_log(SETTINGS | settings, TOTAL, 12_000, rows))

    lost = continued(80.0, 40.0, 25.0, init_from="dinov2_vits14_pretrain.pth")
    assert lost["features_lost"]["evidence"].endswith("knn_top1_teacher 80.0, now 25.0")
    assert lost["features_lost"]["knob"] == knob
    assert "no_progress" not in lost
    assert "features_lost" not in continued(80.0, 78.0, 79.0, init_from="dinov2_vits14_pretrain.pth")
    assert "features_lost" not in continued(80.0, 40.0, 25.0)


def test_a_log_with_the_loss_only_shows_a_loss_at_ln_k():
    rows = [{"step": epoch, "loss": 11.09} for epoch in range(1, 6)]
    health = monitor.of_log({"head.out_dim": 65_536}, 100, 0, rows)
    assert health.verdict() == "collapsed"
    assert "uniform_collapse" in found(health)
    falling = [{"step": epoch, "loss": 10.5 - epoch / 10} for epoch in range(1, 6)]
    assert monitor.of_log({"head.out_dim": 65_536}, 100, 0, falling).verdict() == "too early to say"
