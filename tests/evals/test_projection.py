import csv
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageColor

from dino_jax.errors import UserError
from dino_jax.evals import projection
from dino_jax.evals.common.pca import principal_components
from dino_jax.evals.features import FeatureSet, write_list, write_npy
from dino_jax.weights.backbone import Backbone

CARD = {"preprocessing": {"resize": 16, "crop": 16}}
NAMES = {0: "ant", 1: "bee", 2: "cat"}
BACKBONE = Backbone(None, {}, CARD)


@pytest.fixture
def features(tmp_path):
    """A file of 60 features, in three groups along two directions."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3, dtype=np.int32), 20)
    centers = np.eye(3, 8) * 5
    rows = (centers[labels] + 0.2 * rng.standard_normal((60, 8))).astype(np.float32)
    records = np.arange(60, dtype=np.int32) * 2
    names = [f"{i}.png" for i in records]
    write_list(FeatureSet(rows, records, labels, names, [NAMES[i] for i in labels]), tmp_path / "images.csv")
    return write_npy(rows, tmp_path / "features.npy")


def settings(**values):
    config = projection.default_config()
    config.update(values)
    return config


def pixels(figure):
    """The figure as it is written, int [H, W, 3]."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)


def test_points_are_written_and_drawn(features, tmp_path, capsys):
    results = projection.run(BACKBONE, settings(features=str(features)), tmp_path)
    with open(results["files"][0], newline="", encoding="utf-8") as file:
        listed = list(csv.DictReader(file))
    assert [row["name"] for row in listed[:2]] == ["0.png", "2.png"]
    points = np.array([(row["x"], row["y"]) for row in listed], float)
    unit = np.load(features) / np.linalg.norm(np.load(features), axis=1, keepdims=True)
    np.testing.assert_allclose(points, principal_components(unit, 2)[0], rtol=1e-4, atol=1e-5)  # 6 digits are written
    assert 0.5 < sum(results["figures"]["explained"]) <= 1
    assert results["images"] == 60
    assert results["images_per_second"] is None
    json.dumps(results)
    assert str(tmp_path / "pca.png") in capsys.readouterr().out

    with Image.open(results["pictures"][0]) as picture:
        again = pixels(projection.draw(points, labels_of(listed), NAMES, title_of(results)))
        assert picture.size == again.shape[1::-1]
        assert (np.asarray(picture.convert("RGB")) != again).mean() < 0.01  # edges of dots: 6 digits are written


def labels_of(rows):
    return np.array([int(row["label"]) for row in rows])


def title_of(results):
    return f"60 images, principal components, {100 * sum(results['figures']['explained']):.0f}% of the variance"


def test_picture_has_x_to_the_right_y_up_and_a_legend():
    points = np.array([(0, 0), (0, 1), (2, 0)])
    figure = projection.draw(points, np.arange(3), NAMES, "title")
    drawn = pixels(figure)
    width = int(figure.axes[0].get_window_extent().x1)  # without the legend
    colors = [ImageColor.getrgb(color) for color in projection.COLORS[:3]]
    centers = [np.argwhere((drawn[:, :width] == color).all(-1)).mean(0) for color in colors]
    up, right = centers[1] - centers[0], centers[2] - centers[0]
    np.testing.assert_allclose(right, -2 * up[::-1], atol=2)  # one scale; smoothing moves a center by a pixel
    assert right[1] > 0 > up[0]
    assert all((drawn[:, width:] == color).all(-1).any() for color in colors)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(NAMES.values())
    assert not projection.draw(points, np.arange(3), {}, "title").legends


def test_umap_gets_the_settings_and_its_points_are_drawn(features, tmp_path, monkeypatch):
    seen = {}

    class UMAP:
        def __init__(self, **given):
            seen.update(given)

        def fit_transform(self, rows):
            np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
            return rows[:, :2]

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=UMAP))
    results = projection.run(BACKBONE, settings(features=str(features), method="umap", neighbors=7, seed=3), tmp_path)
    assert (seen["n_neighbors"], seen["random_state"], seen["metric"]) == (7, 3, "cosine")
    assert results["pictures"] == [str(tmp_path / "umap.png")]


def test_without_umap_the_way_out_is_named(features, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(UserError, match=r"pip install 'dino_jax\[umap\]'"):
        projection.run(BACKBONE, settings(features=str(features), method="umap"), tmp_path)


def test_without_matplotlib_the_way_out_is_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'dino_jax\[plots\]'"):
        projection.run(BACKBONE, settings(features="nowhere"), tmp_path)


def test_a_class_name_is_drawn_as_it_is():
    names = {0: "_private", 1: "$x$", 2: "$x", 3: "a name that is much too long for the legend"}
    figure = projection.draw(np.eye(4)[:, :2], np.arange(4), names, "title")
    pixels(figure)  # fails where matplotlib takes a name for a formula
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ["_private", "$x$", "$x", "a name that is much too lon..."]


def test_of_many_images_some_are_drawn(features, tmp_path, capsys):
    results = projection.run(BACKBONE, settings(features=str(features), most=25), tmp_path)
    assert results["images"] == 25
    with open(results["files"][0], newline="", encoding="utf-8") as file:
        listed = list(csv.DictReader(file))
    assert all(row["class"] == NAMES[int(row["name"].removesuffix(".png")) // 40] for row in listed)
    assert "25 of 60" in capsys.readouterr().err


@pytest.mark.parametrize("classes", [0, 1, 10, 11, 500])
def test_any_number_of_classes_and_points_that_coincide(classes):
    labels = np.arange(max(1, classes)) - (classes == 0)
    names = {i: f"class {i}" for i in range(classes)}
    figure = projection.draw(np.ones((len(labels), 2)), labels, names, "title")
    height, width, _ = pixels(figure).shape
    for legend in figure.legends:
        texts = [text.get_text() for text in legend.get_texts()]
        assert len(texts) == min(classes, projection.NAMED)
        assert texts[-1] == (
            f"... and {classes - projection.NAMED + 1} more" if classes > 30 else f"class {classes - 1}"
        )
        extent = legend.get_window_extent()
        assert 0 < extent.x0 < extent.x1 < width
        assert 0 < extent.y0 < extent.y1 < height
    assert len(set(projection.class_colors(sorted(names)).values())) == classes


def test_mistakes_are_named(features, tmp_path):
    for values, message in (
        ({}, "config.source"),
        ({"source": "demo"}, "config.features"),
        ({"method": "tsne"}, "pca or umap"),
        ({"most": 1}, "config.most"),
        ({"features": str(tmp_path / "none.npy")}, "dino-jax evaluate features"),
    ):
        given = {"features": str(features)} if values else {}
        with pytest.raises(UserError, match=message):
            projection.run(BACKBONE, settings(**(given | values)), tmp_path)
