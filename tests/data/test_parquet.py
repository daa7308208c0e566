"""Parquet files and Hugging Face data sets: the same images as a folder, classes, order and readable faults."""

import io
import json
import pickle
from functools import partial

import numpy as np
import pytest
from PIL import Image

from dino_jax.data.order import shuffled
from dino_jax.data.pipeline import train_batches
from dino_jax.data.pixels import Pixels
from dino_jax.data.sources import base, open_source, spread
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
    assert source.name(8) == "train-00001.parquet/1"
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


def test_labels_from_a_csv_and_a_few_of_each_class(tmp_path):
    spec = write(tmp_path)
    (tmp_path / "labels.csv").write_text(
        "name,label\n" + "".join(f"train-00000.parquet/{i},{i // 4}\n" for i in range(7))
    )
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


class Grouped(base.Source):
    """Records in groups of these sizes, without images."""

    num_classes = 0

    def __init__(self, *groups):
        self.groups = np.array(groups)

    def __len__(self):
        return int(self.groups.sum())


def test_every_epoch_has_every_record_once_in_an_order_of_its_own(monkeypatch):
    monkeypatch.setattr("dino_jax.data.order.WINDOW", 20)
    source = Grouped(*[7, 1, 0, 12] * 10)
    order, n = shuffled(source, seed=3), len(source)
    epochs = [[order[e * n + i] for i in range(n)] for e in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [shuffled(source, seed=3)[2 * n + i] for i in range(n)] == epochs[2], "no earlier position is needed"
    assert [shuffled(source, seed=4)[i] for i in range(n)] != epochs[0]


def test_windows_bound_the_groups_in_use(monkeypatch):
    monkeypatch.setattr("dino_jax.data.order.WINDOW", 40)
    order, group = shuffled(Grouped(*[10] * 100), seed=0), np.repeat(np.arange(100), 10)
    for start in range(0, 1000, 40):
        assert len({group[order[i]] for i in range(start, start + 40)}) == 4


def test_the_order_without_groups_is_that_of_grain():
    import grain

    source = open_source("demo:test:3")
    ours, theirs = shuffled(source, 5), grain.MapDataset.range(len(source)).seed(5).shuffle().repeat()
    assert [ours[i] for i in range(90)] == [theirs[i] for i in range(90)]


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


def spoilt(tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    pq.write_table(table([0]).slice(0, 0), tmp_path / "empty.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "text.parquet").read_bytes()[:-20])
    (tmp_path / "page.parquet").write_text("<html>not found</html>")
    pq.write_table(table([0]), tmp_path / "good-1.parquet")
    pq.write_table(pa.table({"photo": [jpeg(0)]}), tmp_path / "good-2.parquet")


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
    ],
)
def test_mistakes_are_one_line(tmp_path, spec, message):
    spoilt(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        open_source(f"parquet:{tmp_path}/{spec}")
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


def test_a_hugging_face_set_that_is_not_there(tmp_path):
    saved(tmp_path / "saved")
    for spec in (f"{tmp_path}/saved:val", "no/such-set"):
        with pytest.raises(UserError, match=r"datasets\.load_dataset") as error:
            open_source(f"hf:{spec}")
        assert "\n" not in str(error.value)
