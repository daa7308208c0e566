"""`dino-jax convert` as a user runs it, and the forms it writes."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dino_jax import load_backbone
from dino_jax.weights import load, official, tensor_files

ROOT = Path(__file__).parents[2]


def convert(*arguments):
    command = [sys.executable, "-m", "dino_jax", "convert", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """An official backbone file of a tiny ViT."""
    like = official.backbone_like({"arch": "vit_nano", "patch_size": 8, "image_size": 32, "in_channels": 3})
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: 0.3 * rng.standard_normal(s.shape, np.float32), like)
    path = tmp_path_factory.mktemp("source") / "tiny.safetensors"
    prepared = {"resize": 50, "crop": 32, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bicubic"}
    metadata = {load.PREPROCESSING: json.dumps(prepared)}
    tensor_files.write(path, official.to_official(variables["params"]), metadata)
    assert load.load_weights(path).card["preprocessing"] == prepared  # else the comparison of forms would say nothing
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "name"), [("timm", "tiny.safetensors"), ("hf", "tiny_hf"), ("orbax", "new/folder/export")]
)
def test_every_form_holds_the_same_backbone(source, tmp_path, form, name):
    result = convert(source, tmp_path / name, f"--to={form}")
    assert result.returncode == 0, result.stderr
    assert f"vit_nano/8, 0.2 M parameters, as {form}" in result.stdout
    expected, found = load_backbone(source), load_backbone(tmp_path / name)
    jax.tree.map(np.testing.assert_array_equal, found.variables, expected.variables)
    assert found.config == expected.config
    assert found.card["preprocessing"] == expected.card["preprocessing"]


@pytest.mark.slow
def test_size_and_channels_change_on_the_way(source, tmp_path):
    result = convert(source, tmp_path / "x.safetensors", "--to=official", "--image_size=64", "--in_channels=1")
    assert result.returncode == 0, result.stderr
    architecture = load.load_weights(tmp_path / "x.safetensors").card["architecture"]
    assert (architecture["image_size"], architecture["in_channels"]) == (64, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("SOURCE",), "usage: "),
        (("SOURCE", "new.safetensors"), "--to is missing"),
        (("SOURCE", "new.safetensors", "--to=onyx"), "value should be one of <official|timm|hf|orbax"),
        (("SOURCE", "SOURCE", "--to=timm"), "exists: remove it or give another TARGET"),
        (("SOURCE", "new.bin", "--to=timm"), "name it .safetensors"),
        (("SOURCE", "new.safetensors", "--to=official_checkpoint"), "use --to=official to convert its backbone"),
        (("SOURCE", "/proc/nowhere/x.safetensors", "--to=timm"), "can't write /proc/nowhere/x.safetensors"),
        (("absent.pth", "new.safetensors", "--to=timm"), "no such path"),
    ],
)
def test_mistakes_end_with_one_line_and_nothing_written(source, tmp_path, arguments, said):
    names = {"SOURCE": source, "absent.pth": tmp_path / "absent.pth"}
    result = convert(*(names.get(a, a if a.startswith(("--", "/")) else tmp_path / a) for a in arguments))
    assert result.returncode == 2
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
    assert source.is_file()


@pytest.mark.slow
def test_heads_of_a_file_that_does_not_state_them_are_a_flag(tmp_path):
    sizes = {"arch": "vit", "embed_dim": 48, "depth": 1, "num_heads": 3}
    like = official.backbone_like(sizes | {"patch_size": 8, "image_size": 16, "in_channels": 3})
    tree = jax.tree.map(lambda s: np.ones(s.shape, np.float32), like)
    bare, target = tmp_path / "bare.safetensors", tmp_path / "stated.safetensors"
    tensor_files.write(bare, official.to_official(tree["params"]))
    result = convert(bare, target, "--to=timm")
    assert result.returncode == 2
    assert "--num_heads=N" in result.stderr
    result = convert(bare, target, "--to=timm", "--num_heads=3")
    assert result.returncode == 0, result.stderr
    assert "vit/8" in result.stdout
    assert load_backbone(target).config["num_heads"] == 3
