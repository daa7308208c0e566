"""PyTorch, timm and transformers for the tests that compare with them, which skip where these are not installed."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import environment

ROOT = Path(__file__).parent.parent


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


def randomized(model):
    """The model with no value left where training starts (zeros, ones), and attention that is far from uniform."""
    import torch

    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0 if name.endswith("bias") else 1, 0.1)
        elif parameter.ndim == 3:  # tokens and positions
            torch.nn.init.normal_(parameter, 0, 0.5)
        else:
            torch.nn.init.normal_(parameter, 0, parameter[0].numel() ** -0.5)
    return model.eval()


def run(model, images):
    """A peer's output for our images."""
    import torch

    return model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))


def assert_equal(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(tensors[name], tensor, err_msg=name)


def convert(source, target, to, **settings):
    command = [sys.executable, "-m", "dino_jax", "convert", str(source), str(target), f"--to={to}"]
    command += [f"--{name}={value}" for name, value in settings.items()]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target
