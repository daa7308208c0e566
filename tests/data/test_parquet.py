"""Parquet files and Hugging Face data sets: the same images as a folder, classes, order and readable faults."""

import io
import json
import pickle
from functools import partial

import numpy as np
import pytest
from PIL import Image

from dino_jax.data.pipeline import train_batches
from dino_jax.data.pixels import Pixels
from dino_jax.data.sources import base, open_source, parquet, read_example, spread
from dino_jax.errors import UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
READING = {"batch_size": 4, "canvas_size": 24, "pixels": Pixels(3), "seed": 1}


def jpeg(value):
    buffer = io.BytesIO()
    rng = np.random.default_rng(value)
    Image.fromarray(rng.integers(0, 256, (24, 30, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def table(rows, images=None, **columns):
    images = images or [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in rows]
    return pa.table({"image": images, **columns})


def write(folder, files=3, each=7, group=3):
    """Files in the layout of Hugging Face, with class names in the metadata."""
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog", "eel"], "_type": "ClassLabel"}}
    folder.mkdir(exist_ok=True)
    for k in range(files):
        rows = range(k * each, (k + 1) * each)
        made = table(rows, label=[i % 3 for i in rows])
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(made, folder / f"train-{k:05}.parquet", row_group_size=group)
    return f"parquet:{folder}/train-*.parquet"


def folder_of(path, count):
    path.mkdir()
    for i in range(count):
        (path / f"{i:06}.jpg").write_bytes(jpeg(i))
    return f"folder:{path}"


def test_images_and_labels_in_order(tmp_path):
    source = open_source(write(tmp_path))
    assert len(source) == 21
    assert [source[i].image for i in range(21)] == [jpeg(i) for i in range(21)]
    assert [source.label(i) for i in range(21)] == [source[i].label for i in range(21)] == [i % 3 for i in range(21)]
    assert (source.num_classes, list(source.class_names)) == (3, ["cat", "dog", "eel"])
    assert source.name(8) == "8.jpg"
    assert source.groups.tolist() == [3, 3, 1] * 3
    assert pickle.loads(pickle.dumps(source))[20] == source[20]
    assert len(open_source(f"parquet:{tmp_path}/train-{{00000..00001}}.parquet")) == 14


def test_columns_of_bytes_and_texts(tmp_path):
    rows = pa.table({"scan": [jpeg(0), jpeg(1), jpeg(2)], "thumb": [b"", b"", b""], "what": ["b", None, "a"]})
    pq.write_table(rows, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"several columns of bytes, scan, thumb .* \?image=COLUMN"):
        open_source(f"parquet:{tmp_path}/a.parquet")
    source = open_source(f"parquet:{tmp_path}/a.parquet?image=scan?label=what")
    assert [source[i].image for i in range(3)] == [jpeg(i) for i in range(3)]
    assert [source.label(i) for i in range(3)] == [1, -1, 0]
    assert source.class_names == ["a", "b"]


def test_labels_that_are_no_classes(tmp_path, capsys):
    labels = [0, -1, None, 2**40, 2]
    pq.write_table(table(range(5), label=pa.array(labels)), tmp_path / "a.parquet")
    source = open_source(f"parquet:{tmp_path}/a.parquet")
    assert ([source.label(i) for i in range(5)], source.num_classes) == ([0, -1, -1, -1, 2], 3)
    assert "label: 3 of 5 images have no label" in capsys.readouterr().err
    pq.write_table(table(range(3), label=pa.array(["10", "9", "9"]).dictionary_encode()), tmp_path / "b.parquet")
    assert open_source(f"parquet:{tmp_path}/b.parquet").class_names == ["9", "10"]
    assert open_source(f"parquet:{write(tmp_path / 'c').partition(':')[2]}?label=label").class_names[0] == "cat"


def test_several_declared_labels_are_left_to_the_user(tmp_path, capsys):
    features = {name: {"names": ["x", "y"], "_type": "ClassLabel"} for name in ("fine", "coarse")}
    made = table(range(2), fine=[0, 1], coarse=[1, 0])
    made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(made, tmp_path / "a.parquet")
    assert open_source(f"parquet:{tmp_path}/a.parquet").num_classes == 0
    assert "fine and coarse may be the labels" in capsys.readouterr().err
    assert open_source(f"parquet:{tmp_path}/a.parquet?label=coarse").label(0) == 1


def test_names_without_paths_are_files_and_rows(tmp_path):
    images = [{"bytes": jpeg(i), "path": "same.jpg"} for i in range(3)]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        pq.write_table(table(range(3), images), tmp_path / folder / "x.parquet", row_group_size=2)
    source = open_source(f"parquet:{tmp_path}/*/x.parquet")
    assert [source.name(i) for i in range(6)] == [f"{folder}/x.parquet/{i}" for folder in "ab" for i in range(3)]
    assert len({source.identity(i) for i in range(6)}) == 6


def test_labels_from_a_csv_and_a_few_of_each_class(tmp_path):
    spec = write(tmp_path)
    (tmp_path / "labels.csv").write_text("name,label\n" + "".join(f"{i}.jpg,{i // 4}\n" for i in range(7)))
    labeled = open_source(f"{spec}?labels={tmp_path}/labels.csv")
    assert [labeled[i] for i in range(7)] == [(jpeg(i), i // 4) for i in range(7)]
    few = open_source(f"{spec}:2")
    assert [few[i].image for i in range(len(few))] == [jpeg(i) for i in range(6)]
    assert few.groups.tolist() == [3, 3]


@pytest.mark.parametrize("workers", [0, 2])
def test_canvases_are_those_of_a_folder_bit_for_bit(tmp_path, workers):
    spec = write(tmp_path / "parquet")
    folder = open_source(folder_of(tmp_path / "folder", 21))
    by_record = {}
    with train_batches(folder, **READING) as batches:
        for _ in range(12):
            batch = next(batches)
            by_record |= {int(i): canvas for i, canvas in zip(batch.index, batch.canvas, strict=True)}
    with train_batches(open_source(spec), workers=workers, **READING) as batches:
        for _ in range(6):
            batch = next(batches)
            for record, canvas in zip(batch.index, batch.canvas, strict=True):
                np.testing.assert_array_equal(canvas, by_record[int(record)])


def test_two_processes_and_a_resumed_run_see_the_same_batches(tmp_path):
    source = open_source(write(tmp_path))
    read = partial(train_batches, source, **READING)
    with read() as whole, read(start_step=7) as resumed:
        batches = [next(whole) for _ in range(12)]
        for step, batch in enumerate(batches[7:]):
            for ours, theirs in zip(next(resumed), batch, strict=True):
                np.testing.assert_array_equal(ours, theirs, err_msg=str(step))
    for p in range(2):
        with read(process_index=p, process_count=2) as share:
            for batch in batches[:8]:
                part = next(share)
                np.testing.assert_array_equal(part.canvas, batch.canvas[part.position])
                np.testing.assert_array_equal(part.index, batch.index[part.position])


def test_a_part_of_a_source_keeps_its_groups(tmp_path):
    source = open_source(write(tmp_path))
    part = spread(source, 10)
    assert part.groups.sum() == len(part) == 10
    assert len(part.groups) <= 9
    assert base.Source.groups is None


def test_rows_without_a_good_image_are_replaced_and_counted(tmp_path):
    images = [{"bytes": jpeg(i), "path": None} for i in range(8)]
    images[2], images[5] = None, {"bytes": b"<html>", "path": None}
    pq.write_table(table(range(8), images), tmp_path / "a.parquet")
    with train_batches(open_source(f"parquet:{tmp_path}/a.parquet"), **READING) as batches:
        bad = {int(record) for batch in (next(batches), next(batches)) for record in batch.bad}
    assert bad == {-1, 2, 5}


@pytest.mark.parametrize("harm", ["gone", "cut", "replaced"])
def test_a_file_that_is_harmed_during_the_run_is_bad_images(tmp_path, harm):
    write(tmp_path, files=10)
    source, path = open_source(f"parquet:{tmp_path}/*.parquet"), tmp_path / "train-00004.parquet"
    if harm == "gone":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:500])
    else:
        pq.write_table(table([0]), path)
    with train_batches(source, **READING) as batches:
        bad = {int(record) for _ in range(18) for record in next(batches).bad}
    assert bad == {-1, *range(28, 35)}


def test_a_flipped_byte_under_a_checksum_is_found(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(table(range(4)), path, compression="none", use_dictionary=False, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[content.find(jpeg(2)) + 300] ^= 255
    path.write_bytes(content)
    with pytest.raises(OSError, match="checksum"):
        read_example(open_source(f"parquet:{tmp_path}/a.parquet"), 2)


def test_groups_are_read_once_and_few_are_kept(tmp_path, monkeypatch, capsys):
    spec = write(tmp_path, files=6, each=20, group=4)
    monkeypatch.setattr(parquet, "MEMORY", 25 * 4 * len(jpeg(0)))
    source = open_source(spec)
    assert 10 <= source.window < len(source.groups) == 30
    reads = []
    monkeypatch.setattr(source, "_read", lambda group, read=source._read: reads.append(group) or read(group))
    with train_batches(source, **READING) as batches:
        for _ in range(120 // 4 * 2):
            next(batches)
    assert len(reads) < 2.5 * 30  # two epochs, batches that are read ahead, threads where windows meet
    monkeypatch.setattr(parquet, "MEMORY", 100)
    assert open_source(spec).window == 4
    assert "each of data.workers keeps 4, up to" in capsys.readouterr().err


def spoilt(tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    pq.write_table(table([0]).slice(0, 0), tmp_path / "empty.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "text.parquet").read_bytes()[:-20])
    (tmp_path / "page.parquet").write_text("<html>not found</html>")
    pq.write_table(table([0]), tmp_path / "good-1.parquet")
    pq.write_table(pa.table({"photo": [jpeg(0)]}), tmp_path / "good-2.parquet")
    pq.write_table(pa.table({"image": [jpeg(0)]}), tmp_path / "plain.parquet")
    pq.write_table(table([0], label=[0.5]), tmp_path / "half.parquet")
    classes = {"label": {"names": ["cat"], "_type": "ClassLabel"}}
    made = table([0], label=[1]).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": classes}})})
    pq.write_table(made, tmp_path / "more.parquet")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("text.parquet", "no column of bytes among text: name one with"),
        ("empty.parquet", "no rows in 1 files"),
        ("cut.parquet", "cut.parquet is no whole Parquet file: copy it again"),
        ("page.parquet", "page.parquet is no whole Parquet file"),
        ("gone-*.parquet", "no file .*gone-"),
        ("good-*.parquet", "good-2.parquet has no column image, which .*good-1.parquet has"),
        ("good-1.parquet?label=cls", "no column cls among image"),
        ("text.parquet?image=text", "no column text of bytes"),
        ("good-1.parquet?imge=image", "no option imge, only image and label"),
        ("half.parquet?label=label", "the column label is double, not integers or texts"),
        ("more.parquet", "label 1 in label, whose classes are 0 to 0"),
        ("good-1.parquet,{folder}/plain.parquet", "plain.parquet has another type of images, labels or classes than"),
        ("", r"is a folder: write parquet:.*\*.parquet"),
    ],
)
def test_mistakes_are_one_line(tmp_path, spec, message):
    spoilt(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        open_source(f"parquet:{tmp_path}/{spec.format(folder=tmp_path)}")
    assert "\n" not in str(error.value)


def saved(folder, count=9):
    datasets = pytest.importorskip("datasets")
    features = {"id": datasets.Value("int32"), "photo": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])}
    photos = [{"bytes": jpeg(i), "path": None} for i in range(count)]
    rows = {"id": list(range(count)), "photo": photos, "kind": [i % 2 for i in range(count)]}
    split = datasets.Dataset.from_dict(rows, datasets.Features(features))
    datasets.DatasetDict({"train": split}).save_to_disk(folder)


def test_a_hugging_face_folder(tmp_path):
    saved(tmp_path / "saved")
    source = open_source(f"hf:{tmp_path}/saved")
    assert [source[i] for i in range(9)] == [(jpeg(i), i % 2) for i in range(9)]
    assert [source.label(i) for i in range(9)] == [i % 2 for i in range(9)]
    assert source.class_names == ["a", "b"]
    assert source.name(3) == f"{tmp_path}/saved:train row 3"
    folder = open_source(folder_of(tmp_path / "folder", 9))
    with train_batches(source, workers=1, **READING) as ours, train_batches(folder, **READING) as theirs:
        for _ in range(4):
            np.testing.assert_array_equal(next(ours).canvas, next(theirs).canvas)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of `datasets`, as its library writes it, with photos in one split and paths of photos in the other."""
    datasets = pytest.importorskip("datasets")

    class Photos(datasets.GeneratorBasedBuilder):
        def _info(self):
            kinds = datasets.Value("string")
            return datasets.DatasetInfo(features=datasets.Features({"photo": datasets.Image(), "kind": kinds}))

        def _split_generators(self, manager):
            return [datasets.SplitGenerator(split, {"split": split}) for split in ("train", "val")]

        def _generate_examples(self, split):
            photos = [{"bytes": jpeg(i), "path": None} for i in range(9)]
            if split == "val":
                photos = [{"bytes": None, "path": f"{tmp_path}/{i}.jpg"} for i in range(2)] + [None]
            for i, photo in enumerate(photos):
                yield i, {"photo": photo, "kind": "ab"[i % 2]}

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    Photos(dataset_name="photos", repo_id="lab/photos", hash="0123").download_and_prepare()
    return datasets


def test_a_hugging_face_set_of_the_cache(cache, monkeypatch):
    monkeypatch.setattr(cache, "load_dataset", None)  # it asks the network
    assert not cache.config.HF_HUB_OFFLINE, "the library was imported without offline mode"
    source = open_source("hf:lab/photos?label=kind")
    assert [source[i] for i in range(9)] == [(jpeg(i), i % 2) for i in range(9)]
    assert source.class_names == ["a", "b"]
    assert open_source("hf:lab/photos").num_classes == 0
    assert len(open_source("hf:lab/photos:val?config=default")) == 3
    assert len(open_source("hf:lab/photos:train[:4]")) == 4
    assert len(open_source("hf:lab/photos?label=kind:2")) == 4
    assert source.groups is None
    assert pickle.loads(pickle.dumps(source))[7] == source[7]


def test_hugging_face_mistakes_are_one_line(cache, tmp_path):
    saved(tmp_path / "saved")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "state.json").write_text("{")
    for spec, message in [
        ("lab/other", r"does not have it .*load it once with datasets.load_dataset\('lab/other'\)"),
        ("lab/photos:test", "does not have it .*train.*val"),
        ("lab/photos?config=large", r"load_dataset\('lab/photos', 'large'\)"),
        (f"{tmp_path}/saved:val", "no split val, only train"),
        (f"{tmp_path}/damaged", "damaged .* save_to_disk again"),
        (f"{tmp_path}/saved?label=photo", "the column photo is struct, not integers or texts"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            open_source(f"hf:{spec}")
        assert "\n" not in str(error.value)


def test_hugging_face_rows_that_point_to_files(cache, tmp_path):
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    source = open_source("hf:lab/photos:val")
    assert source[0].image == jpeg(0)
    for record, message in [(1, "No such file"), (2, "the row has no image")]:
        with pytest.raises(OSError, match=message):
            read_example(source, record)
