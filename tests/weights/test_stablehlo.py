import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dino_jax import Backbone
from dino_jax.errors import UserError
from dino_jax.models import build_backbone
from dino_jax.weights import stablehlo

# Isolated from this folder and its environment, and neither this package nor what it needs beside JAX can be imported.
ELSEWHERE = """
import sys
sys.modules.update(dict.fromkeys(["dino_jax", "flax", "optax", "orbax"]))
import jax, numpy as np
from jax import export
jax.config.update("jax_platforms", "cpu")
program, images, features = sys.argv[1:]
call = export.deserialize(open(program, "rb").read()).call
images = np.load(images)
found = {f"{name} of {n}": x for n in (1, 3) for name, x in call(images[:n]).items()}
np.savez(features, **found)
"""


def make_backbone(arch, size, channels=3):
    """Trained for images of 32 pixels, used on images of `size`."""
    model = build_backbone(arch, patch_size=8, image_size=32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, channels), np.float32))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
        fan_in = np.prod(leaf.shape[:-1]) if path[-1].key == "kernel" else 100
        return rng.normal(0, fan_in**-0.5, leaf.shape).astype(leaf.dtype)

    variables = {"batch_stats": {}} | jax.tree.map_with_path(draw, dict(shapes))
    architecture = {"arch": arch, "patch_size": 8, "in_channels": channels, "image_size": 32}
    card = {"architecture": architecture, "preprocessing": {"crop": size, "mean": [0.5], "std": [0.2]}}
    return Backbone(model, variables, card)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "size", "channels", "names"),
    [("vit_nano", 48, 1, {"cls", "patches"}), ("resnet18", 32, 3, {"cls", "patches"})],
)
def test_a_file_gives_the_features_where_only_jax_is_installed(tmp_path, arch, size, channels, names):
    backbone = make_backbone(arch, size, channels)
    images = np.random.default_rng(1).normal(size=(3, size, size, channels)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    stablehlo.write_stablehlo(tmp_path / "model", backbone)
    files = [tmp_path / name for name in ("model", "images.npy", "features.npz")]
    subprocess.run([sys.executable, "-I", "-c", ELSEWHERE, *files], cwd=tmp_path, check=True, timeout=120)
    features = backbone(images)
    with np.load(files[-1]) as found:
        assert set(found) == {f"{name} of {n}" for name in names for n in (1, 3)}
        for name in names:
            for n in (1, 3):
                # The same operations by the same compiler, which may order sums otherwise for another batch size:
                # a hundred roundings of the largest value, where features of two images differ by a tenth of it.
                expected = np.asarray(getattr(features, name)[:n])
                np.testing.assert_allclose(
                    found[f"{name} of {n}"], expected, rtol=0, atol=1e-5 * np.abs(expected).max()
                )
    assert json.loads((tmp_path / "model.json").read_text()) == backbone.card


def test_a_file_runs_on_every_platform_and_tells_nothing_of_the_writers_folders(tmp_path):
    stablehlo.write_stablehlo(tmp_path / "model", make_backbone("vit_nano", 32))
    data = (tmp_path / "model").read_bytes()
    assert set(jax.export.deserialize(bytearray(data)).platforms) == {"cpu", "cuda", "rocm", "tpu"}
    for folder in (Path(stablehlo.__file__).parent, Path(jax.__file__).parent.parent):
        assert str(folder).encode() not in data


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't write .*file/model") as error:
        stablehlo.write_stablehlo(tmp_path / "file" / "model", make_backbone("vit_nano", 32))
    assert "\n" not in str(error.value)
