"""WebDataset shards: the same images as in a folder, whatever the layout of the tar, and readable faults."""

import io
import json
import os
import pickle
import tarfile
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from dino_jax.data.pipeline import train_batches
from dino_jax.data.pixels import Pixels
from dino_jax.data.sources import open_source
from dino_jax.data.sources.files import expand_braces
from dino_jax.data.sources.tar import split_name
from dino_jax.errors import UserError


def jpeg(value):
    buffer = io.BytesIO()
    rng = np.random.default_rng(value)
    Image.fromarray(rng.integers(0, 256, (24, 30, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def write(path, members, form=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def shards(folder, count=3, each=5):
    """Shards with .jpg and .cls."""
    for k in range(count):
        members = []
        for i in range(k * each, (k + 1) * each):
            members += [(f"{i:06}.jpg", jpeg(i)), (f"{i:06}.cls", str(i % 4).encode())]
        write(folder / f"train-{k:03}.tar", members)
    return f"wds:{folder}/train-{{000..{count - 1:03}}}.tar"


def test_images_and_labels_in_order(tmp_path):
    source = open_source(shards(tmp_path))
    assert len(source) == 15
    assert [source[i].image for i in range(15)] == [jpeg(i) for i in range(15)]
    assert [source.label(i) for i in range(15)] == [i % 4 for i in range(15)]
    assert source.num_classes == 4
    assert source.name(7) == "train-001.tar/000007"
    assert pickle.loads(pickle.dumps(source))[9] == source[9]
    assert [open_source(f"wds:{tmp_path}/train-*.tar")[i] for i in range(15)] == [source[i] for i in range(15)]


def test_the_batches_are_those_of_a_folder_bit_for_bit(tmp_path):
    spec = shards(tmp_path)
    (tmp_path / "folder").mkdir()
    for i in range(15):
        (tmp_path / "folder" / f"{i:06}.jpg").write_bytes(jpeg(i))
    reading = {"batch_size": 5, "canvas_size": 32, "pixels": Pixels(3), "seed": 1, "start_step": 2}
    with (
        train_batches(open_source(spec), **reading) as ours,
        train_batches(open_source(f"folder:{tmp_path}/folder"), **reading) as theirs,
    ):
        for _ in range(4):
            one, other = next(ours), next(theirs)
            np.testing.assert_array_equal(one.canvas, other.canvas)
            np.testing.assert_array_equal(one.index, other.index)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_folders_and_dots(tmp_path, form):
    folder = "a.folder/" + "long/" * 15
    name = f"{folder}{'x' * 90}" if form != tarfile.USTAR_FORMAT else f"{folder}x"
    members = [
        (f"{name}.seg.png", b"second"),
        (f"{name}.json", json.dumps({"label": 3}).encode()),
        (f"{folder}y.JPG", b"third"),
        ("._y.jpg", b"macOS"),
        ("notes.txt", b"text"),
    ]
    source = open_source(f"wds:{write(tmp_path / 'a.tar', members, form)}")
    assert [source[i].image for i in range(len(source))] == [b"second", b"third"]
    assert [source.label(i) for i in range(len(source))] == [3, -1]
    assert source.keys == [name, f"{folder}y"]


def test_the_index_is_kept_and_renewed(tmp_path, monkeypatch):
    spec = shards(tmp_path, count=1)
    first = open_source(spec)
    index = tmp_path / "train-000.tar.index.json"
    assert index.is_file()
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)  # not needed again
        assert [open_source(spec)[i] for i in range(5)] == [first[i] for i in range(5)]
    index.write_text(index.read_text()[:-20])  # damaged: built again
    assert len(open_source(spec)) == 5
    write(tmp_path / "train-000.tar", [("a.jpg", jpeg(99))])
    assert open_source(spec)[0].image == jpeg(99)


def test_reading_a_small_index_takes_little_memory(tmp_path):
    write(tmp_path / "a.tar", [("1.jpg", jpeg(1))])
    open_source(f"wds:{tmp_path}/a.tar")
    tracemalloc.start()
    try:
        open_source(f"wds:{tmp_path}/a.tar")
        assert tracemalloc.get_traced_memory()[1] < 2**24  # it was 2 GiB a thread
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_has_its_index_in_the_cache(tmp_path, monkeypatch):
    data, cache = tmp_path / "data", tmp_path / "cache"
    data.mkdir()
    spec = shards(data)
    data.chmod(0o500)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    assert len(open_source(spec)) == 15
    assert len(list((cache / "dino_jax" / "indexes").iterdir())) == 3


@pytest.mark.parametrize("keep", [0.5, 0.7, 0.93])
def test_a_truncated_shard_keeps_the_images_before_the_cut(tmp_path, capsys, keep):
    spec = shards(tmp_path, count=2, each=20)
    path = tmp_path / "train-001.tar"
    content = path.read_bytes().rstrip(b"\0")  # without the zeros that end it
    path.write_bytes(content[: int(keep * len(content))])
    source = open_source(spec)
    assert 20 < len(source) <= 40
    assert "1 damaged shards" in capsys.readouterr().err
    whole = [i for i in range(len(source) - 1) if source[i].image == jpeg(i)]
    assert len(whole) == len(source) - 1


def test_samples_without_a_label_are_counted(tmp_path, capsys):
    members = [("a.jpg", b"1"), ("a.cls", b"2"), ("b.jpg", b"2"), ("c.jpg", b"3"), ("c.cls", b"cat")]
    source = open_source(f"wds:{write(tmp_path / 'a.tar', members)}")
    assert [source.label(i) for i in range(3)] == [2, -1, -1]
    assert "2 of 3 samples have no label" in capsys.readouterr().err


def test_mistakes_are_one_line(tmp_path):
    (tmp_path / "no.tar").write_bytes(b"this is no tar file" * 100)
    write(tmp_path / "empty.tar", [("a.txt", b"text")])
    for spec, words in [
        ("none.tar", "no file .*none.tar"),
        ("{0..3}.tar", "no file .*0.tar"),
        ("*.parquet", "no file"),
        ("no.tar", "is no tar file"),
        ("empty.tar", "no images in 1 tar files"),
    ]:
        with pytest.raises(UserError, match=words):
            open_source(f"wds:{tmp_path}/{spec}")


def test_names():
    assert expand_braces("a-{08..11}-{0..1}.tar")[:3] == ["a-08-0.tar", "a-08-1.tar", "a-09-0.tar"]
    assert len(expand_braces("a-{08..11}-{0..1}.tar")) == 8
    assert split_name("a.b/c.d.PNG") == ("a.b/c", "d.png")
