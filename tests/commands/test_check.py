import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from zoo import BAD, LINKED_NOWHERE, NO_ACCESS, USED, put_in_folder

from dino_jax.commands.check import check, describe
from dino_jax.data.pixels import Pixels
from dino_jax.data.sources import open_source
from dino_jax.data.summary import summarize

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    root = tmp_path_factory.mktemp("zoo")
    put_in_folder(root)
    (root / NO_ACCESS).unlink()  # good or bad, as the user who runs the tests may read it or not
    return root


@pytest.fixture(scope="module")
def report(zoo):
    source = open_source(f"folder:{zoo}")
    return summarize(source, check(source, canvas_size=32, pixels=Pixels(3), workers=0))


def test_every_bad_image_is_named_with_its_reason(report):
    assert report["images"] == len(USED) + len(BAD) + len(LINKED_NOWHERE)
    assert set(report["bad"]) == {*BAD, *LINKED_NOWHERE}
    for name, (_, words) in BAD.items():
        assert re.search(words, report["bad"][name]), name
    assert "No such file" in report["bad"]["dangling.png"]
    assert "symbolic links" in report["bad"]["circle.png"]


def test_equal_contents_are_named_together(report):
    groups = [set(names) for names in report["duplicates"]]
    assert {"twin_a.png", "twin_b.png"} in groups
    assert {"LOUD.JPG", "plain.jpg"} in groups
    assert not any("pixel.png" in names for names in groups)


def test_formats_and_sizes_are_counted(report):
    assert report["kinds"]["TIFF F"] == 1
    assert report["kinds"]["JPEG CMYK"] == 1
    assert sum(report["kinds"].values()) == len(USED)
    assert report["sizes"]["height"] == {"least": 1, "median": 48, "most": 5000}
    assert report["sizes"]["width"] == {"least": 1, "median": 64, "most": 5000}


def test_the_last_lines_say_what_to_do(report):
    text = describe(report, max_bad_fraction=0.01)
    assert "training would stop" in text
    assert "max_bad_fraction is 1.000%" in text
    assert "zero_bytes.jpg: not a whole image file" in text
    assert "training would replace them" in describe(report, max_bad_fraction=0.5)
    many = report | {"bad": {f"{i}.jpg": "damaged" for i in range(30)}}
    assert "19.jpg" in describe(many, 0.01)
    assert describe(many, 0.01).endswith("and 10 more: see --report=FILE")


def test_arrays_are_checked_as_well():
    source = open_source("demo:test:2")
    report = summarize(source, check(source, canvas_size=40, pixels=Pixels(1), workers=0))
    assert report["kinds"] == {"array uint8 x 1": 20}
    assert report["classes"] == 10
    assert report["bad"] == {}
    assert describe(report, 0.01).endswith("0 of 20 images (0.000%) cannot be decoded")
    report = summarize(source, check(source, canvas_size=40, pixels=Pixels(4), workers=0))
    assert set(report["bad"].values()) == {"it has 1 channels, but model.in_channels is 4"}


def run(*arguments):
    command = [sys.executable, "-m", "dino_jax", "check", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_command_finds_bad_images(zoo, tmp_path, report):
    done = run(f"folder:{zoo}", "--workers=2", "--canvas_size=32", f"--report={tmp_path}/report.json")
    assert done.returncode == 1, done.stderr
    assert "zero_bytes.jpg" in done.stdout
    assert json.loads((tmp_path / "report.json").read_text()) == {"source": f"folder:{zoo}", **report}


@pytest.mark.slow
def test_command_without_bad_images(tmp_path):
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "a.png")
    done = run(f"folder:{tmp_path}", "--workers=0")
    assert done.returncode == 0, done.stderr
    assert "0 of 1 images" in done.stdout


@pytest.mark.slow
def test_a_mistake_is_one_line(tmp_path):
    done = run(f"folder:{tmp_path}/gone")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("no such folder")
    assert "Traceback" not in done.stderr
    done = run(f"folder:{tmp_path}", "--beam=--runner=DirectRunner")
    assert (done.returncode, "error: --report is missing" in done.stderr) == (2, True)


def test_findings_hold_no_arrays():
    """Thousands of arrays from workers would take as many open files."""
    source = open_source("demo:test:1")
    finding = check(source, canvas_size=40, pixels=Pixels(1), workers=0)[0]
    assert finding.moments
    assert not any(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(finding))


def test_mean_and_std_are_those_of_the_pixels(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 20, 30, 3), np.uint8)
    images[..., 1] //= 2
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    source = open_source(f"folder:{tmp_path}")
    found = summarize(source, check(source, canvas_size=32, pixels=Pixels(3), workers=0))
    np.testing.assert_allclose(found["statistics"]["mean"], images.mean((0, 1, 2)) / 255, atol=5e-4)  # three digits
    np.testing.assert_allclose(found["statistics"]["std"], images.std((0, 1, 2)) / 255, atol=5e-4)
    mean, std = (",".join(map(str, found["statistics"][name])) for name in ("mean", "std"))
    assert f"pixels: --config.data.mean={mean} --config.data.std={std}" in describe(found, 0.01)
