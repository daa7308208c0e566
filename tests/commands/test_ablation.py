"""The ablation command, shortened: table, figures, picture, and what it reports of runs that fail."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image, ImageColor
from tiny import SHORT, tiny_config

from dino_jax.commands import ablation
from dino_jax.training import loop
from dino_jax.training.config_checks import check_config

ROOT = Path(__file__).parents[2]
LN_K = math.log(256)
KNN = {"evals__knn__train": "demo:train:3", "evals__knn__test": "demo:test:3", "evals__knn__k": 5}


def run(*arguments):
    command = [sys.executable, "-m", "dino_jax", "ablation", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_table_figures_and_picture_and_nothing_twice(tmp_path, monkeypatch):
    done = run(f"--workdir={tmp_path}", "--cells=no_centering,no_multicrop", *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "ablation.json").read_text())
    assert list(report["cells"]) == ["no_centering", "no_multicrop"]
    for name, figures in report["cells"].items():
        assert figures["loss"] == pytest.approx(figures["teacher_entropy"] + figures["kl"], abs=1e-4)
        assert figures["verdict"] in done.stdout
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert (config["dino"]["centering"], config["crops"]["local_number"]) == {
            "no_centering": (False, 4),
            "no_multicrop": (True, 0),
        }[name]
    for figures in (report["pixels"], report["untrained"], *report["cells"].values()):
        assert 0 <= figures["few"] <= 100
        assert 0 <= figures["full"] <= 100
    for title in ("raw pixels", "untrained network", "no centering", "no multi-crop"):
        assert f"\n{title} " in done.stdout
    with Image.open(tmp_path / "ablation.png") as picture:
        assert min(picture.size) > 300

    monkeypatch.setattr(loop, "train", None)  # would fail
    for name, figures in report["cells"].items():
        config = ConfigDict(json.loads((tmp_path / name / "config.json").read_text()))
        assert ablation.run_cell(config, tmp_path / name).items() <= figures.items()


@pytest.mark.slow
def test_unknown_cell_is_one_line(tmp_path):
    done = run(f"--workdir={tmp_path}", "--cells=full,no_teacher")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --cells=full,no_teacher: give a subset of full,no_momentum")


@pytest.mark.slow
def test_run_that_is_not_finite_is_a_result_and_not_repeated(tmp_path, monkeypatch):
    config = tiny_config(optim__lr=1e30, optim__warmup_epochs=0, optim__clip_grad=0.0, crops__local_number=0, **KNN)
    figures = ablation.run_cell(config, tmp_path)
    assert ablation.verdict(figures, LN_K, 30.0).startswith("stopped: ")
    assert " at step " in figures["stopped"]
    assert figures["few"] is None
    report = {"bank": "a", "bank_full": "b", "ln_k": LN_K, "cells": {"full": figures | {"verdict": "stopped: nan"}}}
    line = ablation.table(report | dict.fromkeys(("pixels", "untrained"), {"few": 1, "full": 2})).splitlines()[-1]
    assert line.split()[:3] == ["DINO", "-", "-"]
    assert line.endswith("stopped: nan")

    monkeypatch.setattr(loop, "train", None)  # would fail
    assert ablation.run_cell(config, tmp_path) == figures


def test_a_run_of_other_settings_is_trained(tmp_path, monkeypatch):
    (tmp_path / "report.json").write_text(json.dumps({"config": {"epochs": 1}, "figures": {}}))

    def train(config, workdir):
        raise InterruptedError

    monkeypatch.setattr(loop, "train", train)
    with pytest.raises(InterruptedError):
        ablation.run_cell(tiny_config(), tmp_path)


@pytest.mark.parametrize(
    ("entropy", "mean_target_entropy", "knn", "expected"),
    [
        (0.0, 0.0, 25, "collapsed: one prototype"),
        (0.9 * LN_K, LN_K, 60, "learns"),
        (0.01, 0.8 * LN_K, 60, "learns"),  # sure of itself, of each image something else
        (0.9 * LN_K, LN_K, 25, "no better than untrained"),
        (0.99 * LN_K, LN_K, 60, "collapsed: uniform"),
        (0.8 * LN_K, 0.81 * LN_K, 60, "collapsed: one answer"),
    ],
)
def test_verdict(entropy, mean_target_entropy, knn, expected):
    figures = {"teacher_entropy": entropy, "mean_target_entropy": mean_target_entropy, "few": knn, "stopped": None}
    assert ablation.verdict(figures, LN_K, untrained=30.0) == expected


@pytest.mark.parametrize("name", ablation.CELLS)
def test_every_cell_is_a_valid_run_with_a_color_of_its_own(name):
    cell = ablation.CELLS[name]
    check_config(ablation.changed(tiny_config(), cell.changes), devices=1)
    assert re.search(rf"\b{name}\b", ablation.__doc__.split("Cells: ")[1])
    assert len(cell.title) < 24  # the width of the table's first column
    assert [other.color for other in ablation.CELLS.values()].count(cell.color) == 1


@pytest.mark.slow
def test_figures_of_a_cell_of_another_loss(tmp_path):
    config = ablation.changed(tiny_config(**KNN), ablation.CELLS["mse"].changes)
    figures = ablation.run_cell(config, tmp_path)
    assert 0 < figures["loss"] < 2
    assert figures["kl"] > 0  # of the outputs, though the loss is not their cross-entropy
    assert 0 <= figures["few"] <= 100


def test_final_figures_are_means_of_the_end():
    curve = {"step": np.arange(20), **{name: np.arange(20.0) for name in ablation.SCALARS}}
    assert ablation.final(curve)["loss"] == 18.5  # the last tenth: 18 and 19
    empty = {"step": np.array([]), **{name: np.array([]) for name in ablation.SCALARS}}
    assert ablation.final(empty)["loss"] is None


def test_figure_draws_each_line_where_its_numbers_are(tmp_path):
    steps = np.arange(0.0, 1001, 50)

    def curve(entropy, kl):
        return {"step": steps, "teacher_entropy": entropy + 0 * steps, "kl": kl + 0 * steps}

    curves = {
        "no_sharpening": curve(LN_K, 0.0),
        "no_centering": curve(0.0, 1.0),
        "no_multicrop": curve(LN_K * steps / 1000, 2.0),  # a ramp
        "no_momentum": {"step": np.array([]), "teacher_entropy": np.array([]), "kl": np.array([])},
    }
    figure = ablation.draw_curves(curves, LN_K)
    figure.savefig(tmp_path / "drawn.png")
    with Image.open(tmp_path / "drawn.png") as picture:
        sheet = np.asarray(picture.convert("RGB")).astype(int)
    left, right = (axes.get_window_extent() for axes in figure.axes)

    def rows_and_columns(name, start, end):
        color = np.array(ImageColor.getrgb(ablation.CELLS[name].color))
        rows, columns = np.nonzero(np.abs(sheet[:, int(start) : int(end)] - color).max(-1) < 10)
        assert len(rows), name
        return rows, columns + int(start)

    top, bottom = (rows_and_columns(name, left.x0, left.x1)[0].mean() for name in ("no_sharpening", "no_centering"))
    rows, columns = rows_and_columns("no_multicrop", left.x0, left.x1)
    ramp = np.polyfit(columns, rows, 1)
    # Half a pixel is what the grid of pixels leaves open at each end.
    assert ramp[0] == pytest.approx((top - bottom) / left.width, rel=0.02)
    assert np.polyval(ramp, left.x0 + left.width / 2) == pytest.approx((top + bottom) / 2, abs=2)

    none, one, two = (
        rows_and_columns(name, right.x0, right.x1)[0].mean()
        for name in ("no_sharpening", "no_centering", "no_multicrop")
    )
    assert none == pytest.approx(bottom, abs=2)  # both panels start at 0
    assert one == pytest.approx((none + two) / 2, abs=2)
    rows_and_columns("no_momentum", right.x1, sheet.shape[1])  # in the legend, though it logged nothing
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [ablation.CELLS[name].title for name in curves]


def test_lines_that_coincide_are_all_visible():
    curve = {"step": np.arange(9.0), "teacher_entropy": np.full(9, 3.0), "kl": np.zeros(9)}
    figure = ablation.draw_curves(dict.fromkeys(ablation.CELLS, curve), LN_K)

    def drawn():
        figure.canvas.draw()
        return np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)

    complete = drawn()
    for axes in figure.axes:
        for line in axes.lines:
            line.set_visible(False)
            assert (np.abs(drawn() - complete).max(-1) > 50).sum() > 500, line.get_label()
            line.set_visible(True)


def test_no_matplotlib_is_found_out_before_the_first_run(tmp_path):
    program = "import sys; sys.modules['matplotlib'] = None; from dino_jax.commands import cli; "
    program += "cli.run('ablation', sys.argv[1:])"
    command = [sys.executable, "-c", program, f"--workdir={tmp_path / 'runs'}", *SHORT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "pip install 'dino_jax[plots]'" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "runs").exists()
