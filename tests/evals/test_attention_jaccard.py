import jax
import numpy as np
import pytest
from PIL import Image

from dino_jax.errors import UserError
from dino_jax.evals import attention, attention_jaccard
from dino_jax.evals.common.label_maps import write_labels
from dino_jax.models import build_backbone
from dino_jax.weights.backbone import Backbone


@pytest.fixture(scope="module")
def backbone():
    model = build_backbone("vit_nano", patch_size=8, image_size=16)
    variables = model.init(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))
    card = {
        "architecture": {"arch": "vit_nano", "in_channels": 3},
        "preprocessing": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize": 16, "crop": 16},
    }
    return Backbone(model, variables, card)


def settings(root, **values):
    config = attention_jaccard.default_config()
    config.update({"data": str(root), **values})
    return config


def instances(*boxes, shape=(35, 45)):
    """Labels 1.. of boxes (top, bottom, left, right), each with a void outline a pixel wide."""
    labels = np.zeros(shape, np.uint8)
    for number, (top, bottom, left, right) in enumerate(boxes, start=1):
        labels[top:bottom, left:right] = 255
        labels[top + 1 : bottom - 1, left + 1 : right - 1] = number
    return labels


def make_voc(root, annotations):
    rng = np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationObject", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for name, labels in annotations.items():
        pixels = rng.integers(0, 256, (*labels.shape, 3), np.uint8)
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg")
        write_labels(root / "SegmentationObject" / f"{name}.png", labels)
    (root / "ImageSets/Segmentation/val.txt").write_text("".join(f"{name}\n" for name in annotations))
    return root


def best_scores(backbone, root, name, labels):
    """The protocol once more, object by object and head by head: the best Jaccard index of each object."""
    image = np.asarray(Image.open(root / "JPEGImages" / f"{name}.jpg"))[
        : len(labels) // 8 * 8, : labels.shape[1] // 8 * 8
    ]
    maps = attention.attention_maps(backbone, (image[None] / np.float32(255) - 0.5) / 0.5)[0]
    scores = []
    for number in sorted(set(labels[: len(image), : image.shape[1]].ravel()) - {0, 255}):
        inside = labels[: len(image), : image.shape[1]] == number
        scores.append(0)
        for one in maps:
            mask = np.kron(attention.mass_masks(one, 0.6), np.ones((8, 8))) > 0
            scores[-1] = max(scores[-1], (mask & inside).sum() / (mask | inside).sum())
    return scores


def test_each_object_counts_with_its_best_head(backbone, tmp_path, capsys):
    annotations = {
        "a": instances((4, 20, 4, 30), (22, 32, 10, 26)),
        "empty": instances(),
        "b": instances((10, 30, 2, 14), (3, 9, 18, 28), (33, 35, 0, 45), shape=(35, 28)),  # the last one is cut off
    }
    root = make_voc(tmp_path / "VOC2012", annotations)
    results = attention_jaccard.run(backbone, settings(root), tmp_path / "out")
    scores = [best_scores(backbone, root, name, annotations[name]) for name in ("a", "b")]
    assert [len(one) for one in scores] == [2, 2]
    assert results["images"] == 2
    assert results["objects"] == 4
    assert results["figures"]["jaccard"] == pytest.approx(100 * np.mean([np.mean(one) for one in scores]))
    assert results["figures"]["jaccard_objects"] == pytest.approx(100 * np.mean(sum(scores, [])))
    assert f"{results['figures']['jaccard']:.2f}" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "objects.png") as sheet:
        assert sheet.width > 7 * 120  # image, mean, four heads, mask


def test_averages_over_images_and_over_objects_differ(backbone, tmp_path):
    annotations = {"a": instances((0, 32, 0, 40)), "b": instances((4, 10, 4, 10), (20, 26, 4, 10), (4, 10, 30, 36))}
    root = make_voc(tmp_path / "VOC2012", annotations)
    figures = attention_jaccard.run(backbone, settings(root, rows=0), tmp_path / "out")["figures"]
    (large,), small = (best_scores(backbone, root, name, labels) for name, labels in annotations.items())
    assert figures["jaccard"] == pytest.approx(50 * (large + np.mean(small)))
    assert figures["jaccard_objects"] == pytest.approx(25 * (large + sum(small)))
    assert not (tmp_path / "out").exists()  # no rows, no sheet


def test_mistakes_are_named(backbone, tmp_path):
    def fails(message, change, **values):
        root = make_voc(tmp_path / str(len(list(tmp_path.iterdir()))), {"a": instances((4, 20, 4, 30))})
        change(root)
        with pytest.raises(UserError, match=message) as error:
            attention_jaccard.run(backbone, settings(root, **values), tmp_path / "out")
        assert "\n" not in str(error.value)

    objects = "SegmentationObject"
    fails("SegmentationObject is missing", lambda root: (root / objects).rename(root / "masks"))
    fails("ImageSets/Segmentation/test.txt is missing", lambda root: None, split="test")
    fails("val.txt is empty", lambda root: (root / "ImageSets/Segmentation/val.txt").write_text(""))
    fails("b.jpg can't be read", lambda root: (root / "ImageSets/Segmentation/val.txt").write_text("b\n"))
    fails("a.png can't be read", lambda root: (root / objects / "a.png").unlink())
    fails("a.png has colors", lambda root: Image.new("RGB", (45, 35)).save(root / objects / "a.png"))
    fails(
        "45 x 30 instead of 45 x 35 pixels",
        lambda root: write_labels(root / objects / "a.png", instances(shape=(30, 45))),
    )
    fails("no object in any", lambda root: write_labels(root / objects / "a.png", instances()))
    with pytest.raises(UserError, match="config.data is empty"):
        attention_jaccard.run(backbone, settings(""), tmp_path / "out")
