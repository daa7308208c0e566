import io
import os
import pickle

import numpy as np
import pytest
from PIL import Image
from tfds_sets import write_tfds

from dino_jax.data import demo_images
from dino_jax.data.sources import SCHEMES, Example, Source, open_source
from dino_jax.data.sources.array_record import write_array_record
from dino_jax.errors import UserError
from dino_jax.evals.common import images, ranking


def image_bytes(value, format="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (value, value, value)).save(buffer, format)
    return buffer.getvalue()


def put(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image_bytes(value))


def names(source):
    return [source.name(i).replace(os.sep, "/") for i in range(len(source))]


def labels(source):
    return [source[i].label for i in range(len(source))]


def test_class_folders_at_any_depth(tmp_path):
    for i, path in enumerate(["dog/b.JPG", "dog/deep/er/a.png", "cat/x.webp", "ant/1.jpeg"]):
        put(tmp_path / path, i)
    (tmp_path / "empty").mkdir()
    (tmp_path / "dog/notes.txt").write_text("not an image")
    (tmp_path / "dog/._b.JPG").write_text("what macOS leaves on foreign disks")
    source = open_source(f"folder:{tmp_path}")
    assert names(source) == ["ant/1.jpeg", "cat/x.webp", "dog/b.JPG", "dog/deep/er/a.png"]
    assert labels(source) == [0, 1, 2, 2] == [source.label(i) for i in range(4)]
    assert source.num_classes == 3
    assert source.class_names == ["ant", "cat", "dog"]
    assert source[2].image == image_bytes(0)
    assert pickle.loads(pickle.dumps(source))[3] == source[3]


def test_one_rule_says_what_is_an_image(tmp_path, capsys):
    for path in ("dog/a.jfif", "dog/b.jpe", "cat/c.DIB", "@eaDir/d.jpg", "lost+found/e.jpg", "dog/._f.png", ".g/h.png"):
        put(tmp_path / path)
    for path in ("dog/c.heic", "dog/d.heic", "notes.txt", "cat/README"):
        (tmp_path / path).write_bytes(b"")
    source = open_source(f"folder:{tmp_path}")
    assert names(source) == ["cat/c.DIB", "dog/a.jfif", "dog/b.jpe"]
    assert source.class_names == ["cat", "dog"]
    assert "passed over 4 files that are no images (2 x .heic, 1 x .txt, 1 x no extension)" in capsys.readouterr().err
    assert [path.name for path in images.image_paths(str(tmp_path / "dog"))] == ["a.jfif", "b.jpe"]
    assert "passed over 2 files" in capsys.readouterr().err
    assert [path.name for path in ranking.image_files(tmp_path, "--config.data")] == ["c.DIB", "a.jfif", "b.jpe"]


def test_pictures_on_the_command_line_may_have_a_comma_in_their_name(tmp_path):
    put(tmp_path / "Paris, 2020.png")
    put(tmp_path / "b.png")
    assert images.image_paths(str(tmp_path / "Paris, 2020.png")) == [tmp_path / "Paris, 2020.png"]
    both = f"{tmp_path}/b.png, {tmp_path}/b.png"
    assert images.image_paths(both) == [tmp_path / "b.png"] * 2


def test_a_folder_of_digits_is_not_a_number_of_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "2024/a/x.png")
    put(tmp_path / "2024/a/y.png")
    assert len(open_source("folder:2024")) == 2
    assert len(open_source("folder:2024:1")) == 1


def test_a_folder_of_array_records_says_what_to_write(tmp_path):
    with pytest.raises(UserError, match=rf"is a folder: write array_record:{tmp_path}/\*"):
        open_source(f"array_record:{tmp_path}")


def test_an_image_beside_the_folders_means_no_labels(tmp_path):
    put(tmp_path / "a.png")
    put(tmp_path / "cat/b.png")
    source = open_source(f"folder:{tmp_path}")
    assert names(source) == ["a.png", "cat/b.png"]
    assert labels(source) == [-1, -1]
    assert source.num_classes == 0


def test_links_are_followed_but_a_loop_ends(tmp_path):
    put(tmp_path / "outside/c.png")
    put(tmp_path / "set/cat/a.png")
    put(tmp_path / "set/dog/b.png")
    (tmp_path / "set/cat/loop").symlink_to(tmp_path / "set")
    (tmp_path / "set/cat/other_class").symlink_to(tmp_path / "set/dog")
    (tmp_path / "set/linked").symlink_to(tmp_path / "outside")
    (tmp_path / "set/dog/nowhere.png").symlink_to(tmp_path / "gone.png")
    assert names(open_source(f"folder:{tmp_path}/set")) == [
        "cat/a.png",
        "dog/b.png",
        "dog/nowhere.png",  # in the list, so that it is named when it can't be read
        "linked/c.png",
    ]


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    """Simulated, since who runs the tests as root may read anything."""
    put(tmp_path / "cat/a.png")
    scan = os.scandir

    def refusing(path):
        if str(path).endswith("cat"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match="cannot read cat: Permission denied"):
        open_source(f"folder:{tmp_path}")


def test_a_wrong_folder_is_explained(tmp_path):
    (tmp_path / "table.csv").write_text("1")
    for spec, words in [
        (f"folder:{tmp_path}/gone", "no such folder"),
        (f"folder:{tmp_path}/table.csv", "a file, not a folder"),
        (f"folder:{tmp_path}", "1 x .csv"),
        ("folder:", "expected folder:PATH"),
        ("imagenet", "expected folder:PATH"),
        (f"array_record:{tmp_path}/gone*", "no file"),
        (f"array_record:{tmp_path}/table.csv", "layout"),
        ("demo:validation", "train and test"),
        (f"tfds:{tmp_path}", "tfds build"),
        ("tfds:", "expected folder:PATH"),
    ]:
        with pytest.raises(UserError, match=words) as error:
            open_source(spec)
        assert "data.source" in str(error.value)
        assert "\n" not in str(error.value)


def test_a_new_scheme_is_a_class_and_a_line_in_the_table(monkeypatch):
    class Gray(Source):
        syntax = "gray:COUNTx"
        num_classes = 2

        def __init__(self, count):
            self.count = count

        @classmethod
        def from_spec(cls, rest):
            return cls(int(rest[:-1])) if rest[:-1].isdigit() else None

        def __len__(self):
            return self.count

        def __getitem__(self, i):
            return Example(np.full((2, 2), i, np.uint8), i % 2)

        def name(self, i):
            return f"gray {i}"

    monkeypatch.setitem(SCHEMES, "gray", Gray)
    source = open_source("gray:7x")
    assert [source.label(i) for i in range(len(source))] == [0, 1, 0, 1, 0, 1, 0]
    assert source.identity(3) == "gray 3"
    for spec in ("gray:", "grey:3x"):
        with pytest.raises(UserError, match=r"expected folder:PATH, .* or gray:COUNTx$"):
            open_source(spec)


def test_identity_changes_with_the_file(tmp_path):
    put(tmp_path / "cat/a.png")
    put(tmp_path / "dog/b.png")
    source = open_source(f"folder:{tmp_path}:1")
    before = [source.identity(i) for i in range(2)]
    os.utime(tmp_path / "cat/a.png", ns=(0, 1))
    (tmp_path / "dog/b.png").unlink()
    assert source.identity(0) != before[0]
    assert source.identity(1) == "dog/b.png is not there"


def test_few_labels_keeps_the_first_of_each_class(tmp_path):
    for path in ["a/1.png", "a/2.png", "a/3.png", "b/1.png", "c/1.png", "c/2.png", "c/3.png"]:
        put(tmp_path / path)
    few = open_source(f"folder:{tmp_path}:2")
    assert names(few) == ["a/1.png", "a/2.png", "b/1.png", "c/1.png", "c/2.png"]
    assert labels(few) == [0, 0, 1, 2, 2]
    assert few.num_classes == 3
    assert few.class_names == ["a", "b", "c"]
    put(tmp_path / "flat.png")
    with pytest.raises(UserError, match="no labels"):
        open_source(f"folder:{tmp_path}:2")


@pytest.mark.parametrize("stored_as", ["bytes", "array"])
def test_array_record_keeps_images_and_labels(tmp_path, stored_as):
    class Memory:
        num_classes = 4

        def __len__(self):
            return 6

        def __getitem__(self, i):
            image = image_bytes(i) if stored_as == "bytes" else np.full((4, 5, 1 + 2 * (i % 2)), i, np.uint8)
            return Example(image, i % 4)

    write_array_record(Memory(), str(tmp_path / "part-0"))
    write_array_record(Memory(), str(tmp_path / "part-1"))
    source = pickle.loads(pickle.dumps(open_source(f"array_record:{tmp_path}/part-*")))
    assert len(source) == 12
    assert labels(source) == [0, 1, 2, 3, 0, 1] * 2
    assert source.num_classes == 4
    assert len(open_source(f"array_record:{tmp_path}/part-*:1")) == 4
    for i in range(12):
        assert np.all(np.asarray(Image.open(io.BytesIO(source[i].image))) == i % 6)


def test_array_record_of_bare_images_has_no_labels(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / "bare"), "group_size:1")
    writer.write(image_bytes(7, "JPEG"))
    writer.close()
    source = open_source(f"array_record:{tmp_path}/bare")
    assert source[0] == Example(image_bytes(7, "JPEG"), -1)
    assert source.num_classes == 0


def test_tfds_gives_encoded_images_and_labels(tmp_path):
    folder = write_tfds(tmp_path, image_bytes, train=6)
    source = pickle.loads(pickle.dumps(open_source(f"tfds:{folder}:train")))
    assert source.num_classes == 3
    values = []
    for i in range(len(source)):
        image, label = source[i]
        assert isinstance(image, bytes)
        values.append(int(np.asarray(Image.open(io.BytesIO(image)))[0, 0, 0]))
        assert label == values[-1] % 3
    assert sorted(values) == list(range(6))
    assert len(open_source(f"tfds:{folder}:train[:50%]")) == 3
    assert len(open_source(f"tfds:{folder}")) == 6
    with pytest.raises(UserError, match="data.source"):
        open_source(f"tfds:{folder}:validation")


def test_demo_images_are_placed_at_random_but_fixed():
    source = open_source("demo:test")
    images, masks = demo_images.demo_images("test"), demo_images.demo_masks("test")
    side = demo_images.CANVAS
    assert images.shape == (2000, side, side, 1)
    assert masks.shape == (2000, side, side)
    assert source.num_classes == 10
    assert np.array_equal(source[17].image, images[17])
    assert np.array_equal(masks, images[..., 0] > demo_images.MASK_THRESHOLD)
    rows, columns = np.nonzero(masks[17])
    assert max(np.ptp(rows), np.ptp(columns)) < demo_images.MAX_SIDE
    centers = np.array([np.mean(np.nonzero(mask), axis=1) for mask in masks[:200]])
    assert np.all(centers.std(axis=0) > 1.5)


def test_demo_splits_and_few_labels():
    assert len(open_source("demo")) == 12000
    few = open_source("demo:train:30")
    assert np.bincount(labels(few)).tolist() == [30] * 10
    assert few[0].label == open_source("demo:train")[0].label
