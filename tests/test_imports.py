"""The house's arrows point down only (docs/design.md): who may import whom inside the package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dino_jax"
# The house from the ground up: a room imports from itself and from rooms before it.
FLOORS = (
    "errors",
    "recipes",
    "progress",
    "provenance",
    "limits",
    "json_files",
    "atomic",
    "ownership",
    "storage",
    "lease",
    "models",
    "data",
    "checkpoints",
    "weights",
    "distributed",
    "health",
    "dino",
    "dinov2",
    "dino_variants",
    "evals",
    "training",
    "suggest",
    "report",
    "commands",
    "__main__",
)


def imported_rooms(path):
    """Rooms of the package that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dino_jax":
            parts = node.module.split(".")
            yield from ([parts[1]] if len(parts) > 1 else [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("dino_jax."))


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_room_has_a_floor():
    assert {room_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__"} == set(FLOORS)


def test_no_import_points_up():
    for path in PACKAGE.rglob("*.py"):
        room = room_of(path)
        if room == "__init__":  # the public names, which it imports when they are asked for
            continue
        above = [other for other in imported_rooms(path) if FLOORS.index(other) > FLOORS.index(room)]
        assert not above, f"{path.relative_to(PACKAGE)} imports {sorted(set(above))}"


def test_configs_import_nothing_of_the_package_but_one_another():
    for path in (PACKAGE.parent / "configs").glob("*.py"):
        assert set(imported_rooms(path)) <= {"recipes"}, path


def modules_after(code):
    """Names of the modules that a fresh interpreter has loaded after some code."""
    code += "\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    return set(done.stdout.split())


def test_importing_the_package_imports_no_library():
    assert not modules_after("import dino_jax") & {"jax", "flax", "numpy", "grain", "PIL", "orbax"}


def test_getting_a_recipe_is_light():
    loaded = modules_after("import dino_jax; dino_jax.get_config('vits16')")
    assert not loaded & {"jax", "flax", "numpy", "grain", "PIL", "orbax"}


@pytest.mark.parametrize("script", ["train", "evaluate", "dino_jax.__main__", "dino_jax.commands.cli"])
def test_what_workers_import_of_the_command_line_is_light(script):
    # Each process that reads images imports the script that was started once more.
    assert not modules_after(f"import {script}") & {"absl", "jax", "flax", "numpy", "grain", "ml_collections"}


def test_the_step_needs_nothing_that_reads_images():
    # A bare machine with a GPU runs the benchmarks of the step with no more than these.
    heavy = {"grain", "PIL", "array_record", "tensorflow_datasets", "tensorboardX", "scipy", "safetensors"}
    assert not modules_after("import benchmarks.step") & heavy


def test_loading_a_backbone_needs_nothing_of_training():
    heavy = {"grain", "array_record", "tensorflow_datasets", "tensorboardX", "ml_collections"}
    loaded = modules_after("import dino_jax; dino_jax.load_backbone")
    assert "PIL" in loaded
    assert not loaded & heavy
