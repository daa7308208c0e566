import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_jax.data.multicrop import Crops
from dino_jax.report.crops import GAP, LABEL_HEIGHT, MIN_TILE, picture

ROOT = Path(__file__).parents[2]


def run(*arguments):
    command = [sys.executable, "-m", "dino_jax", "preview", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(("channels", "shown"), [(1, [90, 90, 90]), (3, [90, 120, 150]), (4, [90, 120, 150])])
def test_picture_undoes_the_normalization_and_puts_views_in_order(channels, shown):
    mean, std = np.full(channels, 0.4), np.full(channels, 0.25)
    color = np.array([90, 120, 150, 180])[:channels]

    def view(side, count, darker):
        flat = np.broadcast_to(color - darker, (2, count, side, side, channels))
        return ((flat / 255 - mean) / std).astype(np.float32)

    canvas = np.broadcast_to(color - 60, (2, 20, 20, channels)).astype(np.uint8)
    sheet = np.asarray(picture(canvas, Crops(view(16, 2, 0), view(6, 3, 30)), mean, std))
    step = MIN_TILE + GAP
    assert sheet.shape == (LABEL_HEIGHT + 2 * step, GAP + 6 * step, 3)
    for row in range(2):
        middle = LABEL_HEIGHT + row * step + MIN_TILE // 2
        colors = sheet[middle, [GAP + column * step + MIN_TILE // 2 for column in range(6)]]
        np.testing.assert_array_equal(colors, np.array([shown]) - np.array([60, 0, 0, 30, 30, 30])[:, None])


@pytest.mark.slow
def test_command_writes_a_picture(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3)).astype(np.uint8)).save(tmp_path / f"{i}.png")
    output = tmp_path / "new" / "crops.png"
    done = run(
        "--config=vits16",
        f"--config.data.source=folder:{tmp_path}",
        "--config.data.canvas_size=32",
        "--config.crops.global_size=112",
        "--config.crops.local_size=16",
        "--config.crops.local_number=2",
        f"--output={output}",
        "--images=3",
    )
    assert done.returncode == 0, done.stderr
    with Image.open(output) as image:
        assert image.size == (GAP + 5 * (112 + GAP), LABEL_HEIGHT + 3 * (112 + GAP))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: data.source"),
        (["--config=configs/missing.py"], "error: "),
        (["--config=vits16", "--config.data.source=demo", "--images=0"], "error: --images=0"),
        (["--config=vits16", "--config.data.source=demo", "--output=crops"], "error: --output=crops"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(message)
    assert "Traceback" not in done.stderr
