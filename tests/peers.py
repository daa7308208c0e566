"""PyTorch, timm and transformers for the tests that compare with them, which skip where these are not installed."""

import functools

import pytest


def import_torch():
    return pytest.importorskip("torch")


def import_timm():
    import_torchvision()
    return pytest.importorskip("timm")


def import_transformers():
    import_torchvision()
    return pytest.importorskip("transformers")


@functools.cache
def import_torchvision():
    """timm and transformers import it, wherever it is installed, so it comes first."""
    torch = import_torch()
    try:
        return pytest.importorskip("torchvision")
    except RuntimeError:
        # The registry's torchvision is built for CUDA: beside a torch for CPUs its compiled operators do not load, and
        # its import fails for want of two of them, which no model here uses. Their names are enough.
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return pytest.importorskip("torchvision")
