"""`--help` of every command: each flag and setting with its value and its meaning, which is a comment in the source."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import ConfigDict

from dino_jax import recipes
from dino_jax.commands import cli, help_page
from dino_jax.evals import PROTOCOLS
from dino_jax.provenance import flat

ROOT = Path(__file__).parents[2]


def help_of(*program):
    """What a program prints."""
    command = [sys.executable, *program, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def page_of(name, *arguments):
    """The page of a command, without a process of its own."""
    command = importlib.import_module(f"dino_jax.commands.{name}")
    forget_flags(command)  # another test may have run the command in this process
    settings = command.define_flags([*arguments, "--help"])
    page = help_page.page(command, settings)
    forget_flags(command)  # other commands have flags of the same names
    return page


def forget_flags(command):
    for flag in flags.FLAGS.get_flags_for_module(command.__name__):
        delattr(flags.FLAGS, flag.name)


def assert_all_have_meanings(function):
    meanings = help_page.meanings(function)
    missing = [name for name in flat(function().to_dict()) if not meanings.get(name)]
    assert not missing, f"no comment beside or above {missing}"


def test_every_setting_of_the_recipes_has_a_meaning():
    assert_all_have_meanings(recipes.load("default").get_config)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_setting_of_a_protocol_has_a_meaning(protocol):
    assert_all_have_meanings(PROTOCOLS[protocol].default_config)


def example():
    """Settings in the forms in which functions define them."""
    config = ConfigDict()
    # This comment is about all of them.

    config.size = 224  # pixels
    # Peak learning rate,
    # scaled by the batch.
    config.lr = 0.1
    config.text = "no # comment"  # but this
    config.bare = 1
    config.group = ConfigDict()  # of a kind
    config.group.shape = (
        1,
        2,
    )  # rows, columns
    config.evals = ConfigDict(  # of all kinds
        {
            "knn": {  # while training
                "every": 10,  # epochs
                # Neighbors.
                "k": 20,
            }
        }
    )
    return config


def test_meanings_are_the_comments_beside_and_above():
    assert help_page.meanings(example) == {
        "size": "pixels",
        "lr": "Peak learning rate, scaled by the batch.",
        "text": "but this",
        "bare": "",
        "group": "of a kind",
        "group.shape": "rows, columns",
        "evals": "",
        "evals.knn": "while training",
        "evals.knn.every": "epochs",
        "evals.knn.k": "Neighbors.",
    }


def test_settings_that_a_helper_defines_are_found():
    meanings = help_page.meanings(PROTOCOLS["projection"].default_config)
    assert "folder:PATH" in meanings["source"]  # which `features` defines as well
    assert "points" in meanings["most"]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_page_of_every_command(name):
    page = page_of(name)
    assert page.startswith(f"usage: dino-jax {name} ")
    assert max(map(len, page.splitlines())) <= 120
    assert "absl" not in page
    if name in ("train", "demo", "ablation", "preview", "plan"):
        assert "--config.optim.lr=" in page
        assert "peak learning rate before scaling" in page


def test_train_py_shows_the_values_of_a_recipe_and_of_the_command_line():
    page = help_of("train.py", "--config=vits8")
    assert "  --workdir=  " in page
    assert "  --config.model.patch_size=8  " in page
    assert "ViT-S/8, 800 epochs" in page


def test_evaluate_py_shows_the_settings_of_a_protocol():
    page = help_of("evaluate.py", "knn")
    assert "  --checkpoint=  " in page
    assert "  --config.k=10,20,100,200  " in page
    assert "  --config.crop=  " in page


def test_without_a_protocol_the_page_has_no_settings():
    page = page_of("evaluate")
    assert "  --checkpoint=  " in page
    assert "--config." not in page.partition("flags:")[2]


def test_flags_of_libraries_are_left_out():
    assert "alsologtostderr" in flags.FLAGS  # absl's
    assert "flags:" not in page_of("replay")
