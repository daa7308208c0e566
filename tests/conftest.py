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
        "--goldens2", default=str(Path(__file__).parent / "golden2"), help="folder with the DINOv2 reference's arrays"
    )


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that no worker is left with one when the others are done.

    Tests that use a reference's arrays are marked `golden` or `golden2`: `pytest -m golden --goldens=DIR` and
    `pytest -m golden2 --goldens2=DIR` run them on others.
    """
    for item in items:
        fixtures = set(item.fixturenames)
        if {"goldens_dir", "golden", "rule_weights"} & fixtures:
            item.add_marker("golden")
        if {"goldens2_dir", "golden2", "rule_weights2"} & fixtures:
            item.add_marker("golden2")
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
def goldens2_dir(request) -> Path:
    return Path(request.config.getoption("--goldens2"))


@pytest.fixture(scope="session")
def golden(goldens_dir):
    """golden(name) -> (arrays by key, meta): one .npz of the DINO reference's numbers."""
    return partial(_load, goldens_dir)


@pytest.fixture(scope="session")
def golden2(goldens2_dir):
    """golden2(name) -> (arrays by key, meta): one .npz of the DINOv2 reference's numbers."""
    return partial(_load, goldens2_dir)


@pytest.fixture(scope="session")
def rule_weights(goldens_dir):
    """The goldens' rule for weights that they do not store: make(shapes, seed, gain, override)."""
    return _rule(goldens_dir)


@pytest.fixture(scope="session")
def rule_weights2(goldens2_dir):
    """The DINOv2 goldens' rule for weights that they do not store: make(shapes, seed, gain, override)."""
    return _rule(goldens2_dir)


def _load(folder, name):
    with np.load(folder / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files if key != "meta"}
        meta = json.loads(str(file["meta"])) if "meta" in file.files else {}
    return arrays, meta


def _rule(folder):
    spec = importlib.util.spec_from_file_location("rule_weights", folder / "rule_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make
