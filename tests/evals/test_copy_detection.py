import json

import jax
import numpy as np
import pytest
from backbones import as_tokens
from PIL import Image, ImageFilter
from skimage import data
from tolerances import assert_close

from dino_jax.errors import UserError
from dino_jax.evals import copy_detection
from dino_jax.evals.common import ranking
from dino_jax.models import build_backbone
from dino_jax.weights.backbone import Backbone

PHOTOS = ("astronaut", "coffee", "chelsea", "rocket", "immunohistochemistry", "hubble_deep_field")


@pytest.fixture(scope="module")
def backbone():
    model = build_backbone("vit_nano", patch_size=8, image_size=32)
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    card = {
        "architecture": {"arch": "vit_nano", "patch_size": 8, "in_channels": 3},
        "preprocessing": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }
    return Backbone(model, variables, card)


def save(picture, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=95)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """copydays/ with strongly blurred and slightly cropped photos, and tiles of other photos for the other folders."""
    root = tmp_path_factory.mktemp("copies")
    for number, name in enumerate(PHOTOS):
        photo = Image.fromarray(getattr(data, name)()).convert("RGB").resize((160, 120))
        save(photo, root / "copydays" / "original" / f"20{number:02}00.jpg")
        for copy in range(1 + number % 2):
            blurred = photo.filter(ImageFilter.GaussianBlur(1 + copy))
            save(blurred, root / "copydays" / "strong" / f"20{number:02}{copy + 1:02}.jpg")
        save(photo.crop((4, 3, 156, 117)), root / "copydays" / "crops" / "10" / f"20{number:02}00.jpg")
    others = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in ("gravel", "brick", "camera", "grass")]
    rng = np.random.default_rng(0)
    for number in range(148):
        left, top = rng.integers(0, 400, 2).tolist()
        tile = others[number % 4].crop((left, top, left + 64, top + 64))
        save(tile, root / ("distractors" if number < 8 else "whitening") / str(number % 2) / f"{number}.png")
    return root


def settings(root, **values):
    config = copy_detection.default_config()
    folders = {"data": str(root / "copydays"), "distractors": str(root / "distractors")}
    config.update({**folders, "imsize": 32, "batch_size": 8, "workers": 2, "sheet": 3, **values})
    return config


def test_average_precision_is_the_reference_one(golden):
    arrays, meta = golden("evals")
    found = [ranking.average_precision(*pair) for pair in zip(meta["copy_ranks"], meta["copy_nres"], strict=True)]
    np.testing.assert_allclose(found, arrays["copy/ap"], rtol=1e-6)
    assert ranking.average_precision([], 3) == 0


def test_feature_is_the_reference_one(golden):
    arrays, meta = golden("evals")
    assert_close(copy_detection.cls_and_gem(as_tokens(arrays["copy/in/tokens"])), arrays, "copy/cls_gem4", meta)


def test_whitening_is_the_reference_one(golden):
    arrays, meta = golden("evals")
    _, whiten = copy_detection.learn_whitening(arrays["copy/in/whitening_features"])
    rows = arrays["copy/in/x"] @ whiten
    assert_close(rows @ rows.T, arrays, "copy/whitened_inner_products", meta)


def test_whitening_bounds_what_rare_directions_weigh(capsys):
    features = np.random.default_rng(0).standard_normal((5, 8)) + 3
    mean, whiten = copy_detection.learn_whitening(features)
    np.testing.assert_allclose(mean, features.mean(0))
    assert "5 images, fewer than the 8 numbers" in capsys.readouterr().err
    weights = np.linalg.svd(whiten, compute_uv=False)
    assert weights[0] / weights[-1] == pytest.approx(1e5**0.5)


@pytest.mark.slow
def test_run_finds_the_originals(backbone, root, tmp_path, capsys):
    config = settings(root, queries="strong, crops/10", whitening=str(root / "whitening"))
    results = copy_detection.run(backbone, config, tmp_path)
    # Each copy has one original among 14 images: chance would give an mAP of some 15.
    assert results["figures"]["strong"]["mAP"] > 80
    assert results["figures"]["crops/10"]["mAP"] > 60
    assert results["images"] == {"original": 6, "strong": 9, "crops/10": 6, "distractors": 8, "whitening": 140}
    printed = capsys.readouterr()
    assert "6 originals, 8 distractors, whitened by 140 images" in printed.out
    assert f"{results['figures']['strong']['mAP']:.2f}" in printed.out
    assert not printed.err
    assert [path.split("/")[-1] for path in results["pictures"]] == ["answers_strong.png", "answers_crops_10.png"]
    with Image.open(results["pictures"][0]) as sheet:
        assert (np.asarray(sheet) == ranking.CORRECT).all(-1).sum() > 3 * ranking.TILE
    json.dumps(results)

    again = copy_detection.run(backbone, config, tmp_path)
    assert again["figures"] == results["figures"]
    assert again["images_per_second"] is None  # everything was there

    plain = copy_detection.run(backbone, settings(root, distractors=""), tmp_path)
    assert plain["images"] == {"original": 6, "strong": 9}
    assert plain["figures"]["strong"]["mAP"] > 80
    assert "0 distractors, not whitened" in capsys.readouterr().out


def test_an_answer_counts_among_the_first_only():
    """By hand: the original comes first, third, and too late."""
    answers = np.array([[0, 1, 2], [5, 4, 1], [5, 4, 3]])
    # One of one at the first place: 1. At the third: (0 / 2 + 1 / 3) / 2.
    assert copy_detection.mean_average_precision(answers, [[0], [1], [2]]) == pytest.approx((1 + 1 / 6 + 0) / 3)
    assert copy_detection.nearest(np.eye(3)[:2], np.eye(3), 2).tolist() == [[0, 1], [1, 0]]


def test_mistakes_are_named(backbone, root, tmp_path):
    def refused(message, backbone=backbone, **values):
        with pytest.raises(UserError, match=message) as caught:
            copy_detection.run(backbone, settings(root, **values), tmp_path / "out")
        assert "\n" not in str(caught.value)

    (tmp_path / "empty").mkdir()
    refused("config.data is empty", data="")
    refused("config.data=.*original: no such folder", data=str(tmp_path))
    refused("config.queries=.*crops/99: no such folder", queries="crops/99")
    refused("config.queries=.* set it to folders", queries=",")
    refused("config.queries=.* set it to folders", queries="strong,original")
    refused("config.whitening=.*: no such folder", whitening=str(tmp_path / "nowhere"))
    refused("config.whitening=.*: no images", whitening=str(tmp_path / "empty"))
    refused("config.distractors=.*: no images", distractors=str(tmp_path / "empty"))
    refused("config.imsize to 8 or more", imsize=7)
    refused("config.workers", workers=0)
    for folder, name in (("original", "200000.jpg"), ("strong", "210001.jpg")):
        save(Image.new("RGB", (20, 20)), tmp_path / "odd" / folder / name)
    refused("210001.jpg has no original", data=str(tmp_path / "odd"))
    (tmp_path / "odd" / "strong" / "210001.jpg").unlink()
    (tmp_path / "odd" / "strong" / "200001.jpg").write_bytes(b"no picture")
    refused("200001.jpg can't be read as a picture", data=str(tmp_path / "odd"))
    convnet = Backbone(build_backbone("resnet18"), {}, {"architecture": {"arch": "resnet18"}})
    refused("needs a vision transformer", backbone=convnet)
