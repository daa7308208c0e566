"""The house's arrows point down only (docs/design.md): who may import whom inside the package."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "dino_jax"
LOW = {"errors", "whole"}
MAY_IMPORT = {
    "errors": set(),
    "whole": {"errors"},
    "models": LOW,
    "schedules": LOW,
    "optimizers": LOW,
    "progress": set(),
    "watchdog": LOW,
    "data": {"cli", "progress", *LOW},
    "metrics": LOW,
    "flops": set(),
    "sharding": {"watchdog", *LOW},
    "cli": {"watchdog", *LOW},
    "stopping": {"watchdog", *LOW},
    "dino": {"models", "schedules", "optimizers", "data", "sharding"},
    "recipe": {"dino", "sharding", "schedules", "data", "flops", "models"},
    "checkpoints": {"models", *LOW},
    "convert": {"models", *LOW},
    "pretrained": {"models", "checkpoints", "convert", *LOW},
    "backbone": {"models", "data", "pretrained", *LOW},
    "portable": {"backbone", *LOW},
    "convert.__main__": {"backbone", "portable", "pretrained", "checkpoints", "convert", "cli", *LOW},
    "initialization": {"models", "pretrained", "sharding", *LOW},
    "checks": {"models", "schedules", "optimizers", "initialization", *LOW},
    "evals": {"models", "data", "checkpoints", "backbone", "sharding", "progress", *LOW},
    "agreement": {"checkpoints", "sharding", "data", *LOW},
    "skipped": {"checkpoints", "data", *LOW},
    "train_loop": {
        "recipe",
        "dino",
        "sharding",
        "checkpoints",
        "metrics",
        "flops",
        "evals",
        "data",
        "checks",
        "initialization",
        "agreement",
        "skipped",
        "stopping",
        "watchdog",
        *LOW,
    },
    "replay": {
        "train_loop",
        "recipe",
        "checkpoints",
        "skipped",
        "dino",
        "sharding",
        "checks",
        "data",
        "progress",
        "cli",
        *LOW,
    },
    "preview": {"data", "dino", "cli", "checks", *LOW},
    "ablation": {"demo", "train_loop", "backbone", "checkpoints", "checks", "data", "sharding", "cli", *LOW},
    "plan": {"dino", "sharding", "recipe", "checks", "flops", "cli", *LOW},
    "demo": {"train_loop", "recipe", "backbone", "checkpoints", "data", "evals", "models", "sharding", "cli"},
}


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dino_jax":
            parts = node.module.split(".")
            yield from ([parts[1]] if len(parts) > 1 else [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("dino_jax."))


def test_imports_go_down_only():
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if path.name == "__main__.py":  # a command sits on top of what its folder imports
            room += ".__main__"
        if room == "__init__":
            continue
        wrong = set(imported_rooms(path)) - MAY_IMPORT[room] - {room}
        assert not wrong, f"{path.relative_to(PACKAGE)} imports {sorted(wrong)}"


def test_configs_import_nothing_of_the_package():
    for path in (PACKAGE.parent / "configs").glob("*.py"):
        assert not set(imported_rooms(path)), path


def test_the_step_needs_nothing_that_reads_images():
    # A bare machine with a GPU runs the benchmarks of the step with no more than these.
    heavy = ("grain", "PIL", "array_record", "tensorflow_datasets", "tensorboardX", "scipy", "safetensors")
    code = (
        "import sys, benchmarks.step, dino_jax\n"
        f"print([m for m in {heavy} if m in sys.modules])\n"
        "assert dino_jax.load_backbone and 'grain' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert done.stdout.strip() == "[]"
