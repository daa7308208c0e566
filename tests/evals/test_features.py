import csv

import numpy as np
import pytest
from backbones import random_vit
from PIL import Image

from dino_jax.errors import UserError
from dino_jax.evals import features as protocol
from dino_jax.evals.common.linear_heads import Kind
from dino_jax.models import build_backbone
from dino_jax.weights.backbone import Backbone


@pytest.fixture(scope="module")
def backbone():
    return random_vit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five pictures of noise in two classes; the third is damaged."""
    root = tmp_path_factory.mktemp("images")
    for i in range(5):
        path = root / ("cat", "été, dog")[i > 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(noise).save(path) if i != 2 else path.write_bytes(b"damaged")
    return root


def settings(folder, **values):
    config = protocol.default_config()
    config.update({"source": f"folder:{folder}", "workers": 0, "batch_size": 2} | values)
    return config


def test_a_row_an_image_with_its_name_beside(backbone, folder, tmp_path, capsys):
    results = protocol.run(backbone, settings(folder), tmp_path)
    features = np.load(tmp_path / "features.npy", mmap_mode="r")
    assert features.dtype == np.float32
    assert features.shape == (4, results["dim"]) == (4, backbone.model.embed_dim)
    with open(tmp_path / "images.csv", newline="", encoding="utf-8") as file:
        listed = list(csv.DictReader(file))
    assert [row["record"] for row in listed] == ["0", "1", "3", "4"]
    assert [row["class"] for row in listed] == ["cat", "cat", "été, dog", "été, dog"]
    for row, feature in zip(listed, features, strict=True):
        image = backbone.preprocess([(folder / row["name"]).read_bytes()])
        # One image at a time or two: the same sums in another order, float32.
        np.testing.assert_allclose(backbone(image).cls[0], feature, atol=1e-5)
    assert results["undecodable"] == ["cat/2.png"]
    assert str(tmp_path / "features.npy") in capsys.readouterr().out

    back = protocol.read_set(tmp_path / "features.npy")
    assert np.array_equal(back.features, features)
    assert back.labels.tolist() == [0, 0, 1, 1]
    assert back.classes[3] == "été, dog"


def test_array_record_holds_the_same_numbers(backbone, folder, tmp_path):
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    for form in protocol.FORMATS:
        protocol.run(backbone, settings(folder, format=form), tmp_path)
    records = ArrayRecordDataSource([str(tmp_path / "features.array_record")])
    rows = np.stack([np.frombuffer(records[i], "<f4") for i in range(len(records))])
    assert np.array_equal(rows, np.load(tmp_path / "features.npy"))


def test_what_is_taken_of_the_images(backbone):
    images = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    last = backbone.last_blocks(images, 2)

    def read(pooling, blocks):
        return np.asarray(protocol.reader(backbone.model, Kind(blocks, pooling))(backbone.variables, images))

    expected = {
        ("cls", 1): last[1].cls,
        ("cls", 2): np.concatenate([last[0].cls, last[1].cls], 1),
        ("mean", 1): last[1].patches.mean(1),
        ("mean", 2): np.concatenate([one.patches.mean(1) for one in last], 1),
    }
    for (pooling, blocks), features in expected.items():
        np.testing.assert_allclose(read(pooling, blocks), features, atol=1e-5)
    both = read("cls_mean", 1)
    assert both.shape[1] == 2 * last[1].cls.shape[1]
    np.testing.assert_allclose(
        np.sort(both), np.sort(np.concatenate([last[1].cls, last[1].patches.mean(1)], 1)), atol=1e-5
    )


def test_other_choices_are_not_taken_from_what_is_there(backbone, folder, tmp_path):
    cls, mean = (
        protocol.extract_set(backbone, settings(folder, pooling=pooling), tmp_path)[0].features
        for pooling in ("cls", "mean")
    )
    assert not np.allclose(cls, mean)


def test_mistakes_are_named(backbone, folder, tmp_path):
    for values, message in (
        ({"source": ""}, "config.source"),
        ({"format": "csv"}, "npy or array_record"),
        ({"pooling": "max"}, "cls, mean, cls_mean"),
        ({"blocks": 99}, "config.blocks"),
        ({"batch_size": 0}, "batch_size"),
    ):
        with pytest.raises(UserError, match=message):
            protocol.run(backbone, settings(folder, **values), tmp_path)
    with pytest.raises(UserError, match="resnet18 pools one vector"):
        protocol._check_kind(
            Backbone(build_backbone("resnet18"), {}, {"architecture": {"arch": "resnet18"}}), "mean", 1
        )


def test_files_that_do_not_fit_together_are_refused(tmp_path):
    np.save(tmp_path / "features.npy", np.zeros((3, 4), np.float32))
    with pytest.raises(UserError, match="dino-jax evaluate features"):
        protocol.read_set(tmp_path / "features.npy")
    (tmp_path / "images.csv").write_text("record,name,label,class\n0,a,-1,\n")
    with pytest.raises(UserError, match="lists 1 images"):
        protocol.read_set(tmp_path / "features.npy")
