import json

import pytest

from dino_jax.commands import diagnose
from dino_jax.commands.cli import run
from dino_jax.errors import UserError
from dino_jax.health.logs import read_log


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


OFFICIAL = [{"train_loss": 11.09, "train_lr": 1e-4, "train_wd": 0.04, "epoch": epoch} for epoch in range(4)]
DINOV2 = [
    {
        **{"iteration": i, "iter_time": 0.5, "lr": 1e-3, "wd": 0.04, "mom": 0.994, "total_loss": 17.0},
        **{"dino_local_crops_loss": 8.5, "dino_global_crops_loss": 2.2, "koleo_loss": -0.1, "ibot_loss": 6.0},
    }
    for i in range(10, 60, 10)
]
LIGHTLY = [{"step": 25, "train_loss": 9.5, "profiling/data_wait": 0.1}]


@pytest.mark.parametrize(
    ("name", "rows", "form", "loss", "step"),
    [
        ("log.txt", OFFICIAL, "the official DINO's log.txt", 11.09, 4),
        ("training_metrics.json", DINOV2, "DINOv2's training_metrics.json", 10.7, 50),
        ("metrics.jsonl", LIGHTLY, "lightly-train's metrics.jsonl", 9.5, 25),
        ("metrics.jsonl", [{"step": 3, "loss": 2.0, "kl": 0.1}], "metrics.jsonl", 2.0, 3),
    ],
)
def test_logs_of_other_code_bases_are_known_by_their_content(tmp_path, name, rows, form, loss, step):
    log = read_log(write(tmp_path / name, rows))
    assert log == read_log(tmp_path)
    assert log.form == form
    assert log.rows[-1]["loss"] == pytest.approx(loss)
    assert log.rows[-1]["step"] == log.total_steps == step
    assert "teacher_entropy" in log.missing


@pytest.mark.parametrize("text", ["", "{}\n", "nonsense\n[1]\n", '{"epoch": "one"}\n'])
def test_other_files_are_one_line(tmp_path, text):
    (tmp_path / "log.txt").write_text(text)
    with pytest.raises(UserError, match="is no log that is known here"):
        read_log(tmp_path / "log.txt")


def test_missing_logs_are_one_line(tmp_path):
    with pytest.raises(UserError, match="holds no log"):
        read_log(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        read_log(tmp_path / "absent")


def test_diagnose(tmp_path, capsys, monkeypatch):
    write(tmp_path / "log.txt", OFFICIAL)
    run("diagnose", [str(tmp_path / "log.txt")])
    output = capsys.readouterr().out
    assert "collapsed: uniform_collapse since step 3" in output
    assert "not logged, so not judged: teacher_entropy" in output
    assert diagnose.USAGE.startswith("LOG")
