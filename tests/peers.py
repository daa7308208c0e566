"""PyTorch, timm and transformers for the tests that compare with them, which skip where these are not installed."""

import pytest

from benchmarks import environment


def import_torch():
    return pytest.importorskip("torch")


def import_timm():
    import_torchvision()
    return pytest.importorskip("timm")


def import_transformers():
    import_torchvision()
    return pytest.importorskip("transformers")


def import_torchvision():
    """timm and transformers import it, wherever it is installed, so it comes first."""
    import_torch()
    try:
        return environment.import_torchvision()
    except ImportError:
        pytest.skip("torchvision is not installed")
