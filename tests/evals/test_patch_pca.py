import json

import numpy as np
import pytest
from backbones import random_vit
from PIL import Image
from skimage import data

from dino_jax.errors import UserError
from dino_jax.evals import patch_pca
from dino_jax.evals.common.pca import principal_components
from dino_jax.models import build_backbone
from dino_jax.weights.backbone import Backbone


@pytest.fixture(scope="module")
def backbone():
    return random_vit()


def settings(images, **values):
    config = patch_pca.default_config()
    config.update({"images": str(images), "size": 0} | values)
    return config


def test_pictures_of_any_shape(backbone, tmp_path, capsys):
    Image.fromarray(data.coffee()[:50, :90]).save(tmp_path / "wide.png")
    Image.fromarray(data.astronaut()[:90, :50]).save(tmp_path / "high.png")
    results = patch_pca.run(backbone, settings(f"{tmp_path}/wide.png,{tmp_path}/high.png"), tmp_path)
    sheet, wide, high = (np.asarray(Image.open(path)) for path in results["pictures"])
    assert wide.shape == (48, 88, 3)
    assert high.shape == (88, 48, 3)
    blocks = wide.reshape(6, 8, 11, 8, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()  # a color a patch
    assert len(np.unique(blocks[:, 0, :, 0].reshape(-1, 3), axis=0)) > 30
    assert sheet.shape[1] > 5 * 240
    assert len(results["figures"]["explained"]) == 1
    json.dumps(results)
    assert "all pictures" in capsys.readouterr().out

    apart = patch_pca.run(backbone, settings(f"{tmp_path}/wide.png,{tmp_path}/high.png", together=False), tmp_path)
    assert len(apart["figures"]["explained"]) == 2


def test_components_together_are_those_of_all_patches():
    rng = np.random.default_rng(0)
    tokens = [rng.standard_normal(shape).astype(np.float32) for shape in ((3, 4, 9), (5, 2, 9))]
    (first, second), shares = patch_pca.patch_components(tokens)
    assert (first.shape, second.shape) == ((3, 4, 3), (5, 2, 3))
    coordinates, expected = principal_components(np.concatenate([one.reshape(-1, 9) for one in tokens]), 3)
    joined = np.concatenate([first.reshape(-1, 3), second.reshape(-1, 3)])
    assert joined.min() == 0
    assert joined.max() == 1
    inside = (joined > 0) & (joined < 1)
    for i in range(3):  # the same but for origin and scale
        line = np.polyfit(coordinates[inside[:, i], i], joined[inside[:, i], i], 1)
        np.testing.assert_allclose(np.polyval(line, coordinates[inside[:, i], i]), joined[inside[:, i], i], atol=1e-5)
        assert line[0] > 0
    np.testing.assert_allclose(shares, expected)


def test_like_patches_get_like_colors(backbone, tmp_path):
    halves = np.zeros((32, 64, 3), np.uint8)
    halves[:, 32:] = (250, 120, 30)
    Image.fromarray(halves).save(tmp_path / "halves.png")
    picture = patch_pca.run(backbone, settings(tmp_path / "halves.png"), tmp_path)["pictures"][1]
    red = np.asarray(Image.open(picture))[::8, ::8, 0].astype(int)
    # The first component is what tells the halves apart; position embeddings make the rest.
    assert abs(red[:, :4].mean() - red[:, 4:].mean()) > 2 * max(red[:, :4].std(), red[:, 4:].std())


def test_mistakes_are_named(backbone, tmp_path):
    with pytest.raises(UserError, match="config.images"):
        patch_pca.run(backbone, settings(""), tmp_path)
    with pytest.raises(UserError, match="config.tile"):
        patch_pca.run(backbone, settings("", tile=0), tmp_path)
    convnet = Backbone(build_backbone("resnet18"), {}, {"architecture": {"arch": "resnet18", "in_channels": 3}})
    with pytest.raises(UserError, match="vision transformer"):
        patch_pca.run(convnet, settings(""), tmp_path)
