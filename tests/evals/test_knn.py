import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import processes
import pytest
from backbones import Pooled
from PIL import Image
from tolerances import assert_close

from dino_jax.data.sources import open_source
from dino_jax.distributed.sharding import make_mesh
from dino_jax.errors import UserError
from dino_jax.evals import knn
from dino_jax.evals.common import neighbors
from dino_jax.evals.common.extraction import FeatureTable
from dino_jax.weights.backbone import Backbone

ROOT = Path(__file__).parents[2]


def blobs(seed, rows, dim=6, classes=4):
    """Rows around one direction for each class, near enough to each other that votes are mixed."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    centers = np.random.default_rng(0).standard_normal((classes, dim))
    return (centers[labels] + rng.standard_normal((rows, dim))).astype(np.float32), labels


def plain_knn(train, labels, test, k, temperature, classes):
    """The protocol as a page would state it: float64, everything at once."""
    train, test = (x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test))
    similarity = test @ train.T
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    votes = np.zeros((len(test), classes))
    for row, places in enumerate(nearest):
        np.add.at(votes[row], labels[places], np.exp(similarity[row, places] / temperature))
    return np.argsort(-votes, axis=1, kind="stable")[:, : min(5, k)]  # a hit counts among these


@pytest.mark.parametrize(
    ("k", "figures"),
    [(1, (9.5, 9.5)), (2, (9.5, 18.25)), (3, (9.0, 25.75)), (4, (9.0, 37.0)), (5, (9.5, 47.25)), (20, (9.75, 44.25))],
)
def test_few_neighbors_as_the_official_code(k, figures):
    """The official `knn_classifier` on 400 random queries among ten classes, at temperature 0.07."""
    with np.load(Path(__file__).parent / "knn_few_neighbors.npz") as data:
        arguments = [data[f"{split}{part}"] for split in ("train", "test") for part in ("", "_labels")]
    assert knn.knn_accuracy(*arguments, ks=(k,), num_classes=10)[k] == pytest.approx(figures)


@pytest.mark.parametrize(
    ("folders", "message"), [(["train", "val"], "splits of a data set"), (["only"], "a single class")]
)
def test_classes_that_make_figures_meaningless_are_refused(tmp_path, folders, message):
    for folder in folders:
        (tmp_path / folder).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / folder / "a.png")
    source = open_source(f"folder:{tmp_path}")
    with pytest.raises(UserError, match=message):
        knn.check_classes(source, source)


def test_matches_reference(golden):
    arrays, meta = golden("knn")
    data = [arrays[f"in/{split}_{part}"] for split in ("train", "test") for part in ("features", "labels")]
    for key, expected in arrays.items():
        setting = re.fullmatch(r"k(\d+)_T([\d.]+?)(?:_nc(\d+))?", key)
        if not setting:
            continue
        k, temperature, classes = int(setting[1]), float(setting[2]), int(setting[3] or meta["config"]["classes"])
        result = knn.knn_accuracy(*data, ks=(k,), temperature=temperature, num_classes=classes)[k]
        bounds = arrays.get(f"{key}_bounds", np.repeat(expected, 2))
        assert bounds[0] - 1e-4 <= result[0] <= bounds[1] + 1e-4, key
        assert bounds[2] - 1e-4 <= result[1] <= bounds[3] + 1e-4, key


def test_matches_dinov2(golden2):
    """Its votes are a softmax over the most neighbors asked for, of which the first k count."""
    arrays, meta = golden2("evals2")
    train, labels, test, truth = (
        arrays[f"in/{split}_{part}"] for split in ("train", "test") for part in ("features", "labels")
    )
    ks, temperature, classes = (10, 20, 100, 200), meta["T"], meta["config"]["classes"]
    similarity, row = neighbors.nearest(train, test, max(ks))
    accuracy = knn.knn_accuracy(train, labels, test, truth, ks, temperature, classes)
    for k in ks:
        votes = knn.class_votes(similarity, labels[row], k, temperature, classes)
        assert_close(votes, arrays, f"knn_probas_k{k}", meta)
        top1, top5 = arrays[f"knn_top1_top5_k{k}"]
        assert accuracy[k][0] == pytest.approx(top1, rel=1e-4)
        # Classes without votes are tied: the fifth is any of them.
        own = np.take_along_axis(arrays[f"knn_probas_k{k}"], truth[:, None], axis=1)
        certain = 100 * ((arrays[f"knn_probas_k{k}"] >= own).sum(1) <= 5).mean()
        possible = 100 * ((arrays[f"knn_probas_k{k}"] > own).sum(1) < 5).mean()
        assert certain - 1e-4 <= min(accuracy[k][1], top5) <= max(accuracy[k][1], top5) <= possible + 1e-4


@pytest.mark.parametrize(
    ("train", "test", "bank_chunk", "votes_chunk"), [(103, 41, 10, 7), (64, 1, 64, 8), (9, 5, 4, 2)]
)
def test_streaming_equals_plain(monkeypatch, train, test, bank_chunk, votes_chunk):
    monkeypatch.setattr(neighbors, "BANK_CHUNK", bank_chunk)
    monkeypatch.setattr(neighbors, "SIMILARITIES", 7 * bank_chunk)
    monkeypatch.setattr(knn, "VOTES_CHUNK", votes_chunk)
    features, labels = blobs(1, train)
    queries, _ = blobs(2, test)
    ks = (1, 5, min(train, 50))
    predicted = knn.knn_predict(features, labels, queries, ks, 0.1, 4)
    for k in ks:
        expected = plain_knn(features, labels, queries, k, 0.1, 4)
        assert np.array_equal(predicted[k], expected)


def test_length_of_features_does_not_matter():
    features, labels = blobs(1, 60)
    queries, _ = blobs(2, 20)
    plain = knn.knn_predict(features, labels, queries, (7,))[7]
    lengths = np.random.default_rng(3).uniform(0.1, 100, (60, 1))
    assert np.array_equal(knn.knn_predict(features * lengths, labels, queries * 1e3, (7,))[7], plain)


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 7])
def test_top5_with_any_number_of_classes(classes):
    features, labels = blobs(1, 80, classes=classes)
    queries, truth = blobs(2, 50, classes=classes)
    top1, top5 = knn.knn_accuracy(features, labels, queries, truth, (10,), num_classes=classes)[10]
    predicted = knn.knn_predict(features, labels, queries, (10,), num_classes=classes)[10]
    assert predicted.shape == (50, min(5, classes))
    assert top1 == pytest.approx(100 * np.mean(predicted[:, 0] == truth))
    assert top5 == 100 if classes <= 5 else top5 >= top1


def test_small_temperature_does_not_overflow():
    features, labels = blobs(1, 60)
    queries, truth = blobs(2, 30)
    nearest = knn.knn_accuracy(features, labels, queries, truth, (1, 20), temperature=1e-4)
    assert nearest[20][0] == nearest[1][0]


def test_few_shots_are_so_many_of_each_class_and_differ_between_draws():
    labels = np.random.default_rng(0).integers(0, 7, 200)
    labels[labels == 3] = 2
    labels[:2] = 3  # a class with two images gives both
    rng = np.random.default_rng(0)
    draws = [knn.few_shots(labels, 5, rng) for _ in range(2)]
    for rows in draws:
        assert np.array_equal(np.bincount(labels[rows]), [5, 5, 5, 2, 5, 5, 5])
        assert len(set(rows.tolist())) == len(rows)
    assert not np.array_equal(*draws)
    assert np.array_equal(knn.few_shots(labels, 5, np.random.default_rng(0)), draws[0])


def test_figures_of_few_shots_are_those_of_the_banks_drawn():
    table = FeatureTable(*blobs(1, 90), np.arange(90))
    queries = FeatureTable(*blobs(2, 60), np.arange(60))
    config = knn.default_config()
    config.update(k=(3, 50), shots=(2,), draws=4)
    figures = knn.classify(table, queries, config, 4, make_mesh())
    rng, expected = np.random.default_rng((config.seed, 2)), []
    for _ in range(4):
        rows = knn.few_shots(table.labels, 2, rng)
        ranked = plain_knn(table.features[rows], table.labels[rows], queries.features, 8, 0.07, 4)
        expected.append(100 * np.mean(ranked[:, 0] == queries.labels))
    few = figures[knn.Bank(shots=2, k=8)]  # of the 50 asked for there are 8
    assert few["top1"] == pytest.approx(np.mean(expected))
    assert few["top1_std"] == pytest.approx(np.std(expected, ddof=1)) != 0

    unit = table.features / np.linalg.norm(table.features, axis=1, keepdims=True)
    means = np.stack([unit[table.labels == c].mean(0) for c in range(4)])
    nearest = (queries.features @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T).argmax(1)
    assert figures[knn.Bank(0, 0)]["top1"] == pytest.approx(100 * np.mean(nearest == queries.labels))


@pytest.mark.slow
def test_eight_devices_equal_one():
    program = """
import jax, numpy as np, sys
from dino_jax.evals import knn
from dino_jax.evals.common import neighbors
from dino_jax.data.sources import open_source
from dino_jax.distributed.sharding import make_mesh
neighbors.BANK_CHUNK, neighbors.SIMILARITIES = 10, 300
rng = np.random.default_rng(0)
train, labels, test = rng.standard_normal((203, 5)), rng.integers(0, 9, 203), rng.standard_normal((37, 5))
devices = jax.devices()
assert len(devices) == 8
one, eight = (knn.knn_predict(train, labels, test, (1, 5, 150), mesh=make_mesh(devices[:n])) for n in (1, 8))
assert all(np.array_equal(one[k], eight[k]) for k in one)
"""
    flags = {"XLA_FLAGS": processes.xla_flags(8), "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", program], env={**os.environ, **flags}, check=True, timeout=120)


@pytest.mark.parametrize("k", [0, 61, "a", 2.5])
def test_impossible_k_is_named(k):
    features, labels = blobs(1, 60)
    with pytest.raises(UserError, match=f"k={k} .*--config"):
        knn.knn_accuracy(features, labels, features, labels, (10, k))


def test_unlabeled_rows_are_refused():
    features, labels = blobs(1, 60)
    labels[3] = -1
    with pytest.raises(UserError, match="class"):
        knn.knn_accuracy(features, labels, features, labels, (10,))


def colors_that(apply):
    card = {
        "architecture": {"in_channels": 3},
        "preprocessing": {"resize": 8, "crop": 8, "mean": [0.5] * 3, "std": [0.5] * 3},
    }
    return Backbone(Pooled(apply), {}, card)


@pytest.fixture
def colors():
    """A backbone that sees the mean color."""
    return colors_that(lambda variables, images: images.mean((1, 2)))


@pytest.fixture
def folders(tmp_path):
    """Class folders of a train and a test split, each class with its own color; one training file is damaged."""
    for split, rows in (("train", 6), ("test", 2)):
        for number, name in enumerate(("red", "green", "blue")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(rows):
                color = [40, 40, 40]
                color[number] += 100 + 9 * i
                Image.new("RGB", (9, 12), tuple(color)).save(tmp_path / split / name / f"{i}.png")
    (tmp_path / "train" / "red" / "0.png").write_bytes(b"damaged")
    return tmp_path


def settings(folders, **values):
    config = knn.default_config()
    config.update({"train": f"folder:{folders}/train", "test": f"folder:{folders}/test", "k": (1, 5), "workers": 0})
    config.shots = (1, 2, 6)  # 6 is all of them
    config.update(values)
    return config


def test_run_reports_figures_and_what_it_left_out(colors, folders, capsys):
    results = knn.run(colors, settings(folders, batch_size=4), folders)
    perfect = {"top1": 100, "top5": 100}
    shown = {"k=1", "k=5", "class_means", "k=1 shots=2", "k=5 shots=2", "class_means shots=2", "k=1 shots=1"}
    assert set(results["figures"]) == shown | {"k=3 shots=1", "class_means shots=1"}  # of 5 there are 3
    for which, figure in results["figures"].items():
        assert figure == (perfect | {"top1_std": 0, "top5_std": 0} if "shots" in which else perfect)
    assert results["images"] == {"train": 17, "test": 6}
    assert results["undecodable"] == {"train": 1, "test": 0}
    assert results["settings"]["crop"] == 8
    printed = capsys.readouterr()
    assert os.path.join("red", "0.png") in printed.err
    assert "100.00" in printed.out

    # Another k is a matter of what is there already, and settles on it as if it were computed.
    def fail(*_):
        raise AssertionError("extracted again")

    again = knn.run(colors_that(fail), settings(folders, batch_size=4, k=(3,), shots=(2,), draws=1), folders)
    assert again["images"] == results["images"]
    assert results["images_per_second"] > 0
    assert again["images_per_second"] is None
    assert again["undecodable"] == results["undecodable"]
    assert again["figures"]["k=3"] == perfect
    assert "train: features of 18 images from" in capsys.readouterr().err


def test_mistakes_are_named(colors, folders):
    for values, message in (
        ({"test": ""}, "config.test is empty"),
        ({"train": f"folder:{folders}/train/red"}, "no labels"),
        ({"test": f"folder:{folders}"}, "different class folders"),
        ({"k": (1, 20)}, "k=20"),
        ({"temperature": 0.0}, "temperature"),
        ({"batch_size": 0}, "batch_size"),
        ({"shots": (0,)}, "shots"),
        ({"draws": 0}, "draws"),
    ):
        with pytest.raises(UserError, match=message):
            knn.run(colors, settings(folders, **values), folders)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nearest", "--config.k=3"], "one of knn, "),
        (["knn", "--config.tran=x"], "train"),
        (["knn", "--checkpoint=/nowhere"], "/nowhere"),
    ],
)
def test_command_line_says_what_is_wrong_in_one_line(arguments, message):
    done = subprocess.run([sys.executable, "evaluate.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
