"""Fixtures shared by all tests: where the goldens are and how to draw their weights."""

import importlib.util
import json
import os
from pathlib import Path

# Programs that many tests compile, here and in processes that they start; before any of them imports JAX.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "programs"))

import numpy as np
import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--goldens", default=str(Path(__file__).parent / "golden"), help="folder with the reference's arrays"
    )


@pytest.fixture(scope="session")
def goldens_dir(request) -> Path:
    return Path(request.config.getoption("--goldens"))


@pytest.fixture(scope="session")
def golden(goldens_dir):
    """golden(name) -> (arrays by key, meta): one .npz of the reference's numbers."""

    def load(name):
        with np.load(goldens_dir / f"{name}.npz") as file:
            arrays = {key: file[key] for key in file.files if key != "meta"}
            meta = json.loads(str(file["meta"])) if "meta" in file.files else {}
        return arrays, meta

    return load


@pytest.fixture(scope="session")
def rule_weights(goldens_dir):
    """The goldens' rule for weights that they do not store: make(shapes, seed, gain, override)."""
    spec = importlib.util.spec_from_file_location("rule_weights", goldens_dir / "rule_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make
