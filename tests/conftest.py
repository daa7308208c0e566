"""Fixtures shared by all tests: where the goldens are and how to draw their weights."""

import importlib.util
import json
import os
from functools import partial
from pathlib import Path

# Programs that many tests compile, here and in processes that they start; before any of them imports JAX. Small ones
# too: there are thousands, most of them single operations.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "programs"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
# Two fifths less time: most of it is compilation. `XLA_FLAGS= make test` runs the programs that users run.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import numpy as np
import processes
import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--goldens", default=str(Path(__file__).parent / "golden"), help="folder with the reference's arrays"
    )
    parser.addoption(
        "--goldens2", default=str(Path(__file__).parent / "golden2"), help="folder with the arrays of DINOv2"
    )


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that no worker is left with one when the others are done.

    Tests that use the reference's arrays are marked `golden`: `pytest -m golden --goldens=DIR` runs them on others.
    """
    for item in items:
        if {"goldens_dir", "golden", "golden2", "rule_weights"} & set(item.fixturenames):
            item.add_marker("golden")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _end_processes():
    yield
    processes.end_all()


@pytest.fixture(scope="session")
def goldens_dir(request) -> Path:
    return Path(request.config.getoption("--goldens"))


@pytest.fixture(scope="session")
def golden(goldens_dir):
    """golden(name) -> (arrays by key, meta): one .npz of the reference's numbers."""

    return partial(load_golden, goldens_dir)


@pytest.fixture(scope="session")
def golden2(request):
    """golden2(name) -> (arrays by key, meta): the same of DINOv2's numbers."""
    return partial(load_golden, Path(request.config.getoption("--goldens2")))


def load_golden(folder, name):
    with np.load(folder / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files if key != "meta"}
        meta = json.loads(str(file["meta"])) if "meta" in file.files else {}
    return arrays, meta


@pytest.fixture(scope="session")
def rule_weights(goldens_dir):
    """The goldens' rule for weights that they do not store: make(shapes, seed, gain, override)."""
    spec = importlib.util.spec_from_file_location("rule_weights", goldens_dir / "rule_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make
