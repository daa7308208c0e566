"""`dino-jax suggest` and `dino-jax train --config=auto`, as a user calls them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dino_jax import recipes
from dino_jax.commands import suggest
from dino_jax.errors import UserError
from dino_jax.suggest.choices import Choice

ROOT = Path(__file__).parents[2]


def dino_jax(*arguments):
    program = [sys.executable, "-m", "dino_jax", *map(str, arguments)]
    return subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


def test_training_with_auto_settings_writes_a_recipe_and_resumes_with_it(tmp_path):
    arguments = (
        "train",
        "--config=auto",
        f"--workdir={tmp_path}/run",
        "--config.data.source=demo:train:8",
        "--hours=0.001",
        "--config.epochs=3",
        "--config.health.report=False",
        "--config.evals.probe.images=40",
    )
    first = dino_jax(*arguments)
    assert first.returncode == 0, first.stderr
    recipe = tmp_path / "run" / "suggested.py"
    assert "timing vit_" in first.stderr
    assert recipes.get_config(str(recipe)).data.source == "demo:train:8"
    assert json.loads((tmp_path / "run" / "health.json").read_text())["step"] > 0
    written = recipe.read_text()
    again = dino_jax(*arguments)
    assert again.returncode == 0, again.stderr
    assert "nothing left to train" in again.stdout
    assert recipe.read_text() == written


def test_a_recipe_has_the_reasons_and_loads(tmp_path):
    choices = [
        Choice("head.out_dim", 64, "few images"),
        Choice("data.mean", (0.1,), "measured"),
        Choice("data.std", (0.2,), "measured"),
        Choice("data.source", 'folder:a "b"\\c', "1 image"),
    ]
    path = tmp_path / "mine.py"
    path.write_text(suggest.recipe(choices, "dino-jax suggest x", "a machine"))
    config = recipes.get_config(str(path))
    assert (config.head.out_dim, config.data.mean, config.data.source) == (64, (0.1,), 'folder:a "b"\\c')
    assert path.read_text().count("# measured") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=auto", "--config.data.source=demo"], "--workdir is missing"),
        (["--config=auto", "--workdir=w"], "--config.data.source is missing"),
        (
            ["--config", "auto", "--workdir=w", "--config.data.source", "demo", "--config.distributed.auto=True"],
            "one process",
        ),
    ],
)
def test_auto_names_what_is_missing(arguments, words):
    with pytest.raises(UserError, match=words):
        suggest.automatic(arguments).__enter__()


def test_other_recipes_pass_unchanged():
    arguments = ["--config=vits16", "--workdir=w"]
    for same in (arguments, ["--config=auto", "--help"]):
        with suggest.automatic(same) as found:
            assert found == same


def test_mistakes_are_one_line(tmp_path):
    for arguments, words in [
        (["suggest"], "usage: dino-jax suggest SOURCE"),
        (["suggest", f"folder:{tmp_path}/none"], "none"),
        (["suggest", "demo", "--output=a.txt"], "must end in .py"),
        (["suggest", "demo", f"--test=folder:{tmp_path}"], str(tmp_path)),
    ]:
        result = dino_jax(*arguments)
        assert result.returncode == 2, result.stderr
        assert words in result.stderr
        assert "Traceback" not in result.stderr
