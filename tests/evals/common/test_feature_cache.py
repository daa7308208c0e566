"""The feature cache under `extract_source`: hits, misses, damage, and changes that it must notice."""

import os
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from dino_jax.data.pixels import Pixels
from dino_jax.data.sources import Example, Source, open_source
from dino_jax.distributed.sharding import make_mesh
from dino_jax.errors import UserError
from dino_jax.evals.common import extraction, feature_cache
from dino_jax.weights.backbone import Backbone

CARD = {"architecture": {}}


def mean_color(variables, images):
    return images.mean((1, 2))


@pytest.fixture
def folder(tmp_path):
    """22 pictures in two classes, each of its own gray; one is damaged."""
    for i in range(22):
        path = tmp_path / "images" / "ab"[i // 11] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 8), (10 * i,) * 3).save(path)
    path.parent.joinpath("13.png").write_bytes(b"damaged")
    return tmp_path / "images"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(extraction, "PART", 8)  # with batches of 4: records 0..7, 8..15, 16..21


@pytest.fixture
def read(monkeypatch):
    """Names of the images that were read, decoded and extracted."""
    names, load = [], extraction.eval_batches

    def spy(source, **settings):
        names.extend(source.name(i) for i in range(len(source)))
        return load(source, **settings)

    monkeypatch.setattr(extraction, "eval_batches", spy)
    return names


def table(source, where, key="key", apply=mean_color):
    settings = {"batch_size": 4, "resize": 8, "crop": 8, "pixels": Pixels(3), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    store = feature_cache.FeatureCache(where, key) if where else None
    return extraction.extract_source(apply, {}, source, "test", make_mesh(), cache=store, **settings)


def test_a_second_run_computes_nothing_and_says_so(folder, tmp_path, read, capsys):
    source = open_source(f"folder:{folder}")
    plain, first = table(source, None), table(source, tmp_path / "cache")
    read.clear()
    capsys.readouterr()
    second = table(source, tmp_path / "cache")
    assert not read
    for x, y, z in zip(plain, first, second, strict=True):
        assert x.dtype == y.dtype == z.dtype
        assert np.array_equal(x, y)
        assert np.array_equal(y, z)
    assert second.records.tolist() == [i for i in range(22) if i != 13]
    assert second.labels.tolist() == [int(i > 10) for i in second.records]
    said = capsys.readouterr().err
    assert f"test: features of 22 images from {tmp_path / 'cache'}" in said
    assert os.path.join("b", "13.png") in said


def test_a_run_that_was_cut_off_goes_on_at_its_last_part(folder, tmp_path, read, monkeypatch, capsys):
    source, extract, parts = open_source(f"folder:{folder}"), extraction.extract_batches, []

    def fails_third(*args):
        parts.append(extract(*args))
        if len(parts) == 3:
            raise KeyboardInterrupt
        return parts[-1]

    monkeypatch.setattr(extraction, "extract_batches", fails_third)
    with pytest.raises(KeyboardInterrupt):
        table(source, tmp_path / "cache")
    monkeypatch.setattr(extraction, "extract_batches", extract)
    read.clear()
    whole = table(source, tmp_path / "cache")
    assert read == [source.name(i) for i in range(16, 22)]
    np.testing.assert_array_equal(whole.features, table(source, None).features)
    assert "features of 16 of 22 images" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_part_is_computed_again(folder, tmp_path, read, capsys, damage):
    source = open_source(f"folder:{folder}")
    whole = table(source, tmp_path / "cache")
    middle = feature_cache.FeatureCache(tmp_path / "cache", "key").path(extraction.identities(source, np.arange(8, 16)))
    stored = bytearray(middle.read_bytes())
    if damage == "flip":
        at = stored.index(whole.features[9].tobytes())
        stored[at] ^= 1
    middle.write_bytes({"cut": stored[:-30], "flip": stored, "empty": b""}[damage])
    read.clear()
    again = table(source, tmp_path / "cache")
    assert read == [source.name(i) for i in range(8, 16)]
    assert np.array_equal(again.features, whole.features)
    assert np.array_equal(again.records, whole.records)
    assert f"{middle} is damaged" in capsys.readouterr().err
    read.clear()
    table(source, tmp_path / "cache")
    assert not read


def test_what_changed_is_not_taken_for_the_same(folder, tmp_path, read):
    where = tmp_path / "cache"
    source = open_source(f"folder:{folder}")
    table(source, where)

    def reads(source, key="key"):
        read.clear()
        table(source, where, key)
        return [int(os.path.basename(name)[:2]) for name in read]

    assert reads(source, "other weights") == list(range(22))
    Image.new("RGB", (9, 8), (1, 2, 3)).save(folder / "b" / "13.png")  # mended
    assert reads(open_source(f"folder:{folder}")) == list(range(8, 16))
    picture = folder / "b" / "20.png"
    bytes_before, times = picture.read_bytes(), picture.stat()
    picture.write_bytes(bytes_before[::-1])  # of the same size
    os.utime(picture, ns=(times.st_atime_ns, times.st_mtime_ns + 1000))
    assert reads(open_source(f"folder:{folder}")) == list(range(16, 22))
    shutil.copytree(folder / "a", folder / "A")  # another class, which shifts all numbers
    whole = table(open_source(f"folder:{folder}"), where)
    assert whole.labels.max() == 2
    assert whole.labels[whole.records == 32] == 2
    few = open_source(f"folder:{folder}:2")
    assert np.array_equal(table(few, where).records, table(few, None).records)


class Records(Source):
    """Three images of one shade, as from a file of records."""

    num_classes = 1

    def __init__(self, shade):
        self.shade = shade

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return Example(np.full((8, 8, 3), self.shade, np.uint8), 0)

    def name(self, i):
        return f"record {i}"


def test_records_of_the_same_name_with_another_content_are_not_the_same(tmp_path):
    first, second = (table(Records(shade), tmp_path) for shade in (0, 255))
    assert not np.array_equal(first.features, second.features)


def test_fingerprint_sees_weights_card_and_settings():
    def of(weight, card=CARD, *settings):
        return feature_cache.fingerprint(Backbone(None, {"params": {"w": np.array([weight])}}, card), *settings)

    prints = {of(1.0), of(1.5), of(1.0, {"architecture": {"arch": "x"}}), of(1.0, CARD, {"crop": 8}), of(1.0, CARD, 8)}
    assert len(prints) == 5
    assert of(1.0) == of(1.0)


def test_no_room_is_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="--out"):
        feature_cache.FeatureCache(tmp_path / "file" / "features", "key").save(["a"], features=np.zeros(3))


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    feature_cache.FeatureCache(tmp_path / "features", "key").save(["a"], features=np.zeros(3))
    assert not list(tmp_path.iterdir())
