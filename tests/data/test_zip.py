"""Images in a zip archive."""

import io
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image

from dino_jax.data.pipeline import train_batches
from dino_jax.data.pixels import Pixels
from dino_jax.data.sources import open_source, read_example
from dino_jax.errors import UserError


def png(value):
    buffer = io.BytesIO()
    Image.fromarray(np.full((9, 7, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


NAMES = ["dog/b.JPG", "dog/deep/a.png", "cat/x.png"]


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for i, name in enumerate([*NAMES, "__MACOSX/dog/._b.JPG", "dog/notes.txt"]):
            file.writestr(name, png(i))
    return path


def test_images_and_class_folders(archive):
    source = open_source(f"zip:{archive}")
    assert source.names == ["cat/x.png", "dog/b.JPG", "dog/deep/a.png"]
    assert [source[i].image for i in range(3)] == [png(2), png(0), png(1)]
    assert [source.label(i) for i in range(3)] == [0, 1, 1]
    assert source.class_names == ["cat", "dog"]
    assert pickle.loads(pickle.dumps(source))[1] == source[1]


def test_the_batches_are_those_of_the_unpacked_folder(archive, tmp_path):
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path / "folder", NAMES)
    reading = {"batch_size": 2, "canvas_size": 16, "pixels": Pixels(3), "seed": 1}
    with (
        train_batches(open_source(f"zip:{archive}"), workers=1, **reading) as ours,
        train_batches(open_source(f"folder:{tmp_path}/folder"), **reading) as theirs,
    ):
        for _ in range(4):
            np.testing.assert_array_equal(next(ours).canvas, next(theirs).canvas)


def test_faults(archive, tmp_path):
    content = archive.read_bytes()
    (tmp_path / "cut.zip").write_bytes(content[: len(content) // 2])
    (tmp_path / "flipped.zip").write_bytes(content[:60] + bytes([content[60] ^ 255]) + content[61:])
    with zipfile.ZipFile(tmp_path / "text.zip", "w") as file:
        file.writestr("a.txt", "text")
    for name, words in [("cut.zip", "no zip archive, or cut off"), ("text.zip", "no images among its 1 files")]:
        with pytest.raises(UserError, match=words):
            open_source(f"zip:{tmp_path}/{name}")
    with pytest.raises(UserError, match="No such file"):
        open_source(f"zip:{tmp_path}/none.zip")
    damaged = open_source(f"zip:{tmp_path}/flipped.zip")
    with pytest.raises(OSError, match=r"BadZipFile|error"):
        read_example(damaged, damaged.names.index("dog/b.JPG"))  # the first one in the file
