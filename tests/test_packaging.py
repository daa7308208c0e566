"""What an installation brings: the same requirements everywhere they are listed. `.ci/wheel` tries the wheel itself."""

import re
import tomllib
from pathlib import Path

import pytest

import dino_jax
from dino_jax.errors import EXTRAS

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = PROJECT["optional-dependencies"]


def name_of(requirement):
    return re.split(r"[<>=\[ ]", requirement)[0].lower().replace("_", "-")


def lines_of(file):
    lines = [line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    return [line for line in lines if line]


def test_requirements_are_the_core_and_the_extras_that_the_file_names():
    [extras] = re.findall(r"^# dino_jax\[([\w,]+)\]", (ROOT / "requirements.txt").read_text())
    expected = [*PROJECT["dependencies"], *(one for extra in extras.split(",") for one in OPTIONAL[extra])]
    assert sorted(lines_of("requirements.txt")) == sorted(expected)


@pytest.mark.parametrize("extra", [extra for extra in OPTIONAL if extra not in ("all", "plan")])
def test_a_missing_library_is_blamed_on_the_extra_that_has_it(extra):
    renamed = {"umap": "umap-learn"}  # libraries whose distribution has another name
    modules = [renamed.get(module, module) for module, named in EXTRAS.items() if named == extra]
    assert {name_of(module) for module in modules} == {name_of(requirement) for requirement in OPTIONAL[extra]}


def test_no_library_is_in_the_core_and_in_an_extra():
    core = {name_of(requirement) for requirement in PROJECT["dependencies"]}
    assert not core & {name_of(one) for extra, some in OPTIONAL.items() if extra != "all" for one in some}


def test_the_version_is_written_once():
    assert PROJECT["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", dino_jax.__version__)
    assert "dino_jax.__version__" in (ROOT / "pyproject.toml").read_text()
