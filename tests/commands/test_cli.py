"""`dino-jax`: the list of commands, how flags and mistakes are reported, and what runs from anywhere."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_flags

import dino_jax
from dino_jax.commands import cli
from dino_jax.errors import EXTRAS, UserError, missing_extras

ROOT = Path(__file__).parents[2]


def run(*arguments, cwd=ROOT, program=("-m", "dino_jax")):
    command = [sys.executable, *program, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_every_file_of_a_command_is_listed_and_offers_what_commands_offer():
    files = {path.stem for path in (ROOT / "dino_jax/commands").glob("*.py")} - {"__init__", "cli", "help_page"}
    assert set(cli.COMMANDS) == files
    for name in cli.COMMANDS:
        command = importlib.import_module(f"dino_jax.commands.{name}")
        assert command.USAGE
        assert f"dino-jax {name} " in command.__doc__
        assert callable(command.define_flags)
        assert callable(command.main)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_commands_are_listed(arguments):
    done = run(*arguments)
    assert done.returncode == 0
    for name, summary in cli.COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert summary in done.stdout


def test_an_unknown_command_is_one_line():
    done = run("trian")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no command 'trian': give one of train, evaluate, ")


def test_the_version_is_the_package_s():
    assert run("--version").stdout == f"dino_jax {dino_jax.__version__}\n"


def test_a_pipe_that_is_closed_early_is_no_error():
    command = f"{sys.executable} -m dino_jax train --help | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("usage: dino-jax train ")
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "rest"),
    [
        (["--config=vits16", "--workdir=a"], ("vits16", ["--workdir=a"])),
        (
            ["--workdir=a", "--config", "mine.py", "--config.epochs=1"],
            ("mine.py", ["--workdir=a", "--config.epochs=1"]),
        ),
        (["--config.epochs", "1", "SOURCE"], ("", ["--config.epochs", "1", "SOURCE"])),
    ],
)
def test_the_recipe_is_told_from_its_settings(arguments, rest):
    assert cli.split_recipe(arguments) == rest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--config=vits32"], "no recipe 'vits32': give the path of a .py file, or one of ablation, default"),
        (["train", "--config=vits16", "--config.optim.lrr=1"], '"lr" instead of "lrr"'),
        (["evaluate"], "usage: dino-jax evaluate PROTOCOL --checkpoint=PATH"),
        (["evaluate", "knn", "linear"], "give one protocol, not knn linear"),
        (["replay"], "usage: dino-jax replay WORKDIR/replay-STEP.json"),
        (["check"], "usage: dino-jax check SOURCE"),
        (["prepare", "demo"], "usage: dino-jax prepare SOURCE OUT"),
        (["demo", "--workdir=gs://bucket/run"], "--workdir: gs://bucket/run is not a local path"),
        (["convert", "a.pth", "s3://bucket/a", "--to=hf"], "TARGET: s3://bucket/a is not a local path"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, arguments, message):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_library_that_is_not_installed_is_named_with_its_extra():
    program = "import sys; sys.modules['grain'] = None; from dino_jax.commands.cli import run; run('train', [])"
    done = run(program=("-c", program))
    assert done.returncode == 2
    assert done.stderr == "error: grain is not installed: pip install 'dino_jax[train]'\n"


def test_an_import_of_the_package_names_the_extra_too():
    program = "import sys; sys.modules['optax'] = None; import dino_jax; dino_jax.train"
    assert "UserError: optax is not installed: pip install 'dino_jax[train]'" in run(program=("-c", program)).stderr
    assert EXTRAS["tensorflow_datasets"] == "tfds"
    with pytest.raises(UserError, match=r"tensorflow_datasets.*dino_jax\[tfds\]"), missing_extras():
        raise ModuleNotFoundError(name="tensorflow_datasets.core")


def test_other_failed_imports_are_not_blamed_on_the_user():
    with pytest.raises(ModuleNotFoundError), missing_extras():
        raise ModuleNotFoundError(name="dino_jax.nowhere")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_PLATFORMS": "cuda"}, "JAX_PLATFORMS=cuda: JAX finds no such device here: unset it"),
        ({"JAX_PLATFORMS": "abacus"}, "JAX_PLATFORMS=abacus: JAX finds no such device here"),
        ({"JAX_NUM_CPU_DEVICES": "some"}, "JAX_NUM_CPU_DEVICES=some is not a valid value"),
    ],
)
def test_environment_variables_that_keep_jax_from_starting_are_named(tmp_path, variables, message):
    done = command(tmp_path, *tiny_flags(), "--workdir=run", **variables)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_quoted_tilde_is_the_home_directory_and_without_a_home_there_is_no_cache(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    images = "--config.data.source=demo:train:1"  # too few: the run ends as soon as it owns its workdir
    done = command(tmp_path, *tiny_flags(), images, "--workdir=~/run", HOME=str(home))
    assert "fewer than a batch" in done.stderr
    assert (home / "run").is_dir()
    assert not (tmp_path / "~").exists()
    (tmp_path / "file").touch()
    done = command(tmp_path, *tiny_flags(), images, "--workdir=run", XDG_CACHE_HOME=str(tmp_path / "file"))
    assert done.stderr.count("no cache of compiled programs") == 1
    assert "fewer than a batch" in done.stderr


def command(folder, *arguments, **variables):
    """`dino-jax train` in a folder, with these environment variables."""
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    env |= {"PYTHONPATH": str(ROOT), **variables}
    run = [sys.executable, "-m", "dino_jax", "train", f"--config={ROOT}/configs/demo.py", *arguments[1:]]
    return subprocess.run(run, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
