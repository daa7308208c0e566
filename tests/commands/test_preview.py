import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from dino_jax.data.multicrop import Crops
from dino_jax.data.pipeline import Batch
from dino_jax.report.crops import GAP, LABEL_HEIGHT, MIN_TILE, picture

ROOT = Path(__file__).parents[2]


def run(*arguments):
    command = [sys.executable, "-m", "dino_jax", "preview", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def batch_of(canvas):
    count, side = canvas.shape[:2]
    none = np.full(count, -1, np.int32)
    return Batch(canvas, np.full((count, 2), side, np.float32), np.arange(count), np.arange(count), none, none)


@pytest.mark.parametrize(("channels", "shown"), [(1, [90, 90, 90]), (3, [90, 120, 150])])
def test_picture_undoes_the_normalization_and_puts_views_in_order(channels, shown):
    mean, std = np.full(channels, 0.4), np.full(channels, 0.25)
    color = np.array([90, 120, 150, 180])[:channels]

    def view(side, count, darker):
        flat = np.broadcast_to(color - darker, (2, count, side, side, channels))
        return ((flat / 255 - mean) / std).astype(np.float32)

    canvas = np.broadcast_to(color - 60, (2, 20, 20, channels)).astype(np.uint8)
    data = ConfigDict({"mean": mean.tolist(), "std": std.tolist(), "dtype": "uint8", "shown": (0, 1, 2)})
    sheet = np.asarray(picture(batch_of(canvas), Crops(view(16, 2, 0), view(6, 3, 30)), data))
    step = MIN_TILE + GAP
    assert sheet.shape == (LABEL_HEIGHT + 2 * step, GAP + 6 * step, 3)
    for row in range(2):
        middle = LABEL_HEIGHT + row * step + MIN_TILE // 2
        colors = sheet[middle, [GAP + column * step + MIN_TILE // 2 for column in range(6)]]
        np.testing.assert_array_equal(colors, np.array([shown]) - np.array([60, 0, 0, 30, 30, 30])[:, None])


def test_deep_bands_are_stretched_alike_in_all_tiles_of_an_image():
    side, channels = 20, 6
    ramp = np.linspace(0.01, 0.02, side, dtype=np.float32)  # of a range that ends at 1
    canvas = np.broadcast_to(ramp[None, :, None], (1, side, side, channels)).copy()
    canvas[..., 4] = canvas[:, :, ::-1, 4]
    half = canvas[:, None, :, : side // 2]
    crops = Crops(np.concatenate([half, half], 1), np.zeros((1, 0, side, side, channels), np.float32))
    data = ConfigDict({"mean": (0.0,) * 6, "std": (1.0,) * 6, "dtype": "float32", "shown": (0, 4, 1)})
    row = np.asarray(picture(batch_of(canvas), crops, data))[LABEL_HEIGHT + MIN_TILE // 2]
    whole, part = row[GAP : GAP + MIN_TILE], row[2 * GAP + MIN_TILE :][:MIN_TILE]
    assert whole[0].tolist() == [0, 255, 0]
    assert whole[-1].tolist() == [255, 0, 255]
    assert 100 < part[-1][0] < 140, "the dark half of the image stays dark in its crop"


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
