"""`make demo`, shortened: a new user's first command must end with a report and a picture."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny import SHORT

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_report_and_picture(tmp_path):
    command = [sys.executable, "-m", "dino_jax", "demo", f"--workdir={tmp_path}", *SHORT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    for name in ("knn_top1", "knn_top1_init", "knn_top1_pixels"):
        assert 0 <= report[name] <= 100
        assert 0 <= report[f"{name}_full_bank"] <= 100
    assert 0 < report["attention_jaccard"] < 1
    assert report["images_per_second"] > 0
    assert "raw pixels" in done.stdout
    with Image.open(tmp_path / "attention.png") as picture:
        assert min(picture.size) > 100
