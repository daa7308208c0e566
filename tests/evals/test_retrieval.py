import json
import os
import pickle
import shutil

import jax
import numpy as np
import pytest
from PIL import Image, ImageFilter
from skimage import data

from dino_jax.errors import UserError
from dino_jax.evals import retrieval
from dino_jax.evals.common import ranking
from dino_jax.evals.common.extraction import cls_features
from dino_jax.models import build_backbone
from dino_jax.weights.backbone import Backbone

PHOTOS = ("astronaut", "coffee", "chelsea", "rocket", "immunohistochemistry", "hubble_deep_field")
NAMES = [f"{kind}_{photo}" for photo in PHOTOS for kind in ("easy", "hard", "junk")]


def make_backbone():
    model = build_backbone("vit_nano", patch_size=8, image_size=32)
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    card = {
        "architecture": {"arch": "vit_nano", "patch_size": 8, "in_channels": 3},
        "preprocessing": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }
    return Backbone(model, variables, card)


@pytest.fixture(scope="module")
def backbone():
    return make_backbone()


def inner(picture, share):
    """The picture without this share of it at each edge."""
    width, height = picture.size
    box = (share * width, share * height, (1 - share) * width, (1 - share) * height)
    return picture.crop(tuple(round(edge) for edge in box))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Photos cropped a little (easy) and blurred (hard), and noise (junk); queries lie in another photo."""
    root = tmp_path_factory.mktemp("buildings")
    folder = root / "roxford5k"
    (folder / "jpg").mkdir(parents=True)
    gnd = []
    for number, name in enumerate(PHOTOS):
        photo = Image.fromarray(getattr(data, name)()).convert("RGB")
        photo = photo.resize((120, 160) if number % 2 else (160, 120))
        noise = np.random.default_rng(number).integers(0, 256, (60, 45, 3), np.uint8)
        for kind, picture in (
            ("easy", inner(photo, 0.03)),
            ("hard", photo.filter(ImageFilter.GaussianBlur(2))),
            ("junk", Image.fromarray(noise)),
        ):
            picture.save(folder / "jpg" / f"{kind}_{name}.jpg", quality=95)
        canvas = Image.fromarray(getattr(data, PHOTOS[number - 1])()).convert("RGB").resize((300, 250))
        canvas.paste(photo, (20, 30))
        canvas.save(folder / "jpg" / f"query_{name}.jpg", quality=95)
        box = [19.6, 30.2, 20.0 + photo.width, 30.0 + photo.height]
        places = {kind: [3 * number + place] for place, kind in enumerate(("easy", "hard", "junk"))}
        gnd.append({"bbx": np.array(box) if number % 2 else box, **places})
    gnd[0]["hard"] = np.array(gnd[0]["hard"])
    gnd[1]["easy"] = np.array([], np.int64)  # one query that the level easy leaves out
    truth = {"imlist": NAMES, "qimlist": [f"query_{name}" for name in PHOTOS], "gnd": gnd}
    write_truth(folder, truth)
    return root


def write_truth(folder, truth):
    (folder / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth, protocol=2))


def settings(root, **values):
    config = retrieval.default_config()
    config.update({"data": str(root), "imsize": 48, "batch_size": 4, "workers": 2, "sheet": 3, **values})
    return config


def test_scores_are_the_reference_ones(golden):
    arrays, meta = golden("evals")
    gnd = meta["retrieval_gnd"]
    for level, kinds in retrieval.LEVELS.items():
        positives, ignored = ([sum((query[kind] for kind in some), []) for query in gnd] for some in kinds)
        precision, at_k = retrieval.score_queries(arrays["retrieval/in/ranks"], positives, ignored)
        # Both are float64: only the order of a few additions may differ.
        np.testing.assert_allclose(precision, arrays[f"retrieval/{level}_aps"], rtol=1e-12)
        np.testing.assert_allclose(np.nanmean(precision), arrays[f"retrieval/{level}_map"], rtol=1e-12)
        np.testing.assert_allclose(np.nanmean(at_k, axis=0), arrays[f"retrieval/{level}_mp@1_5_10"], rtol=1e-12)


def test_run_finds_the_same_building(backbone, root, tmp_path, capsys):
    results = retrieval.run(backbone, settings(root), tmp_path)
    figures = results["figures"]
    # Even random weights find nearly the same pixels again; six right answers among eighteen images by chance would
    # give an mAP of some 20.
    assert figures["easy"]["mAP"] > 80
    assert figures["hard"]["mAP"] > 80
    assert figures["medium"]["mP@1"] > 80
    assert results["queries"] == {"easy": 5, "medium": 6, "hard": 6}
    assert results["images"] == {"database": 18, "queries": 6}
    assert results["settings"]["scales"] == (1.0,)
    table = capsys.readouterr().out
    assert f"{figures['hard']['mAP']:.2f}" in table
    with Image.open(results["pictures"][0]) as sheet:
        green = (np.asarray(sheet) == ranking.CORRECT).all(-1).sum()
        assert sheet.width > 11 * ranking.TILE
        assert green > 3 * ranking.TILE  # the frame of at least one right answer
    json.dumps(results)

    # Whole queries show mostly another photo than the one they are about.
    whole = retrieval.run(backbone, settings(root, crop_queries=False), tmp_path / "whole")
    assert whole["figures"]["medium"]["mAP"] < figures["medium"]["mAP"] - 20


def test_paris_is_seen_at_three_scales(backbone, root, tmp_path):
    shutil.copytree(root / "roxford5k", tmp_path / "rparis6k")
    os.rename(tmp_path / "rparis6k" / "gnd_roxford5k.pkl", tmp_path / "rparis6k" / "gnd_rparis6k.pkl")
    results = retrieval.run(backbone, settings(tmp_path, dataset="rparis6k"), tmp_path)
    assert results["settings"]["scales"] == pytest.approx((1, 0.70710678, 0.5))
    assert results["figures"]["medium"]["mAP"] > 80
    oxford, paris = retrieval.default_config(), retrieval.default_config()
    oxford.data = paris.data = "somewhere"
    paris.dataset = "rparis6k"
    assert (retrieval._check(oxford)[0], retrieval._check(paris)[0]) == (224, 512)


def test_features_are_not_extracted_twice(backbone, root, tmp_path, monkeypatch):
    monkeypatch.setattr(ranking, "PART", 2)
    loaded, load = [], retrieval._load

    def spy(photo, *args):
        if len(loaded) == stop:
            raise UserError("cut off")
        loaded.append(photo.path.name)
        return load(photo, *args)

    monkeypatch.setattr(retrieval, "_load", spy)
    stop = 17
    with pytest.raises(UserError, match="cut off"):
        retrieval.run(backbone, settings(root, workers=1), tmp_path)
    kept = len(list((tmp_path / "features").iterdir()))
    assert kept >= 2
    stop = -1
    first = retrieval.run(backbone, settings(root, workers=1), tmp_path)
    assert len(loaded) < 17 + 24 - 8  # two parts of two batches are there
    assert first["images_per_second"] > 0
    loaded.clear()
    again = retrieval.run(backbone, settings(root), tmp_path)
    assert not loaded
    assert again["figures"] == first["figures"]
    assert again["images_per_second"] is None

    # Other weights, another size: nothing of it may be taken for the same.
    stop = 0
    other = jax.tree.map(lambda x: x * 1.5, backbone.variables)
    for changed, size in ((Backbone(backbone.model, other, backbone.card), 48), (backbone, 40)):
        with pytest.raises(UserError, match="cut off"):
            retrieval.run(changed, settings(root, imsize=size), tmp_path)


def test_batches_hold_one_shape_and_rare_shapes_come_first():
    shapes = [(8, 8)] * 5 + [(8, 16)] + [(8, 8)] * 2 + [(16, 8)] * 2
    batches = retrieval.batches_of_one_shape(shapes, 4)
    assert [batch.tolist() for batch in batches] == [[5], [8, 9], [0, 1, 2, 3], [4, 6, 7]]


def test_size_is_what_pillow_makes_of_it():
    rng = np.random.default_rng(0)
    for width, height in [*rng.integers(1, 400, (300, 2)).tolist(), (1024, 3), (3, 1024), (224, 224), (100, 224)]:
        picture = Image.new("1", (width, height))
        picture.thumbnail((224, 224))
        assert retrieval.fit(width, height, 224) == picture.size


def test_cutting_loses_only_what_the_model_leaves_out(backbone):
    scales = (1.0, 1 / np.sqrt(2))
    see = jax.jit(retrieval.multi_scale(cls_features(backbone.model), scales, 8))
    whole = np.random.default_rng(0).standard_normal((1, 47, 39, 3)).astype(np.float32)
    rows, columns = (retrieval.smallest_side(side, scales, 8) for side in whole.shape[1:3])
    assert (rows, columns) == (46, 34)  # 5 and 4 patches at the two scales, and 4 and 3
    # float32: the same sums of the same numbers, in another order where the program is another.
    np.testing.assert_allclose(
        see(backbone.variables, whole[:, :rows, :columns]), see(backbone.variables, whole), rtol=1e-5, atol=1e-5
    )
    assert len({retrieval.smallest_side(side, scales, 16) for side in range(256, 513)}) < 50
    assert retrieval.smallest_side(11, scales, 8) == 0  # less than a patch at the smaller scale


def test_smaller_versions_are_bilinear_without_antialiasing():
    images = np.random.default_rng(0).standard_normal((2, 24, 32, 3)).astype(np.float32)
    scale = 1 / np.sqrt(2)
    (seen,) = [retrieval.multi_scale(lambda variables, x: x, (scale,), 8)(None, images)]

    def shrink(x, axis, length):
        position = (np.arange(length) + 0.5) / scale - 0.5  # torch's align_corners=False
        left = np.floor(position).astype(int)
        right = position - left
        shape = [-1 if i == axis else 1 for i in range(x.ndim)]
        return x.take(left, axis) * (1 - right).reshape(shape) + x.take(left + 1, axis) * right.reshape(shape)

    np.testing.assert_allclose(seen, shrink(shrink(images, 1, 16), 2, 16), rtol=1e-5, atol=1e-5)


class Hostile:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_ground_truth_runs_nothing(tmp_path, protocol):
    path = tmp_path / "gnd.pkl"
    path.write_bytes(pickle.dumps({"imlist": ["a"], "qimlist": [Hostile()], "gnd": []}, protocol=protocol))
    with pytest.raises(UserError, match="system: refused"):
        retrieval.read_ground_truth(path)
    # NumPy's ndarray with a buffer of pointers would read any memory.
    path.write_bytes(pickle.dumps(np.array([{}]), protocol=protocol))
    with pytest.raises(UserError, match=r"refused|damaged"):
        retrieval.read_ground_truth(path)


def test_a_place_in_the_memo_cannot_ask_for_all_memory(tmp_path):
    """The unpickler allocates 16 bytes for each place up to the highest."""
    path = tmp_path / "gnd.pkl"
    path.write_bytes(b"\x80\x04]r" + (100_000_000).to_bytes(4, "little") + b".")
    with pytest.raises(UserError, match="damaged"):
        retrieval.read_ground_truth(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL))
def test_ground_truth_may_hold_arrays(tmp_path, protocol):
    truth = {
        "imlist": np.array(["a", "b"]),
        "qimlist": ["q"],
        "gnd": [{"bbx": np.array([1.5, 2, 3, 4]), "easy": np.array([1]), "hard": [np.int64(0)], "junk": np.array([])}],
    }
    path = tmp_path / "gnd.pkl"
    path.write_bytes(pickle.dumps(truth, protocol=protocol))
    read = retrieval.read_ground_truth(path)
    assert read["imlist"] == ["a", "b"]
    assert read["gnd"] == [{"bbx": [1.5, 2, 3, 4], "easy": [1], "hard": [0], "junk": []}]


def test_mistakes_are_named(backbone, root, tmp_path):
    folder = shutil.copytree(root / "roxford5k", tmp_path / "roxford5k")
    truth = json.loads(json.dumps(retrieval.read_ground_truth(folder / "gnd_roxford5k.pkl")))

    def refused(message, **values):
        with pytest.raises(UserError, match=message) as caught:
            retrieval.run(backbone, settings(tmp_path, **values), tmp_path / "out")
        assert "\n" not in str(caught.value)

    def changed(**values):
        write_truth(folder, {**truth, **values})

    refused("config.data is empty", data="")
    refused("roxford5k, rparis6k", dataset="oxford")
    refused("No such file", data=str(tmp_path / "nowhere"))
    refused("config.scales", scales=(1.0, 1.5))
    refused("config.batch_size", batch_size=0)
    refused("smaller than a patch", imsize=7)
    query = {**truth["gnd"][0], "bbx": [400, 0, 500, 90]}
    changed(gnd=[query, *truth["gnd"][1:]])
    refused("outside the image of 300 x 250")
    changed(gnd=[{**query, "easy": [99]}, *truth["gnd"][1:]])
    refused("do not fit")
    changed(gnd=truth["gnd"][1:])
    refused("do not fit")
    changed(gnd=[{"bbx": query["bbx"]}] * 6)
    refused("no 'easy'")
    (folder / "gnd_roxford5k.pkl").write_bytes(b"\x80\x04nonsense")
    refused("is damaged")
    changed()
    photo = folder / "jpg" / "easy_coffee.jpg"
    photo.write_bytes(photo.read_bytes()[:2000])
    refused("easy_coffee.jpg can't be decoded")
    photo.write_bytes(b"no picture")
    refused("easy_coffee.jpg can't be read")
    photo.unlink()
    (folder / "jpg" / "query_rocket.jpg").unlink()
    refused("2 of 24 images are missing, such as .*easy_coffee")
