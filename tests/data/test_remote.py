"""Sources in object stores: the same batches as from local files, from servers on this machine."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from buckets import bucket, cut, error
from PIL import Image
from tfds_sets import write_tfds

from dino_jax import storage
from dino_jax.commands.prepare import prepare
from dino_jax.data.pipeline import train_batches
from dino_jax.data.pixels import Pixels
from dino_jax.data.sources import open_source
from dino_jax.errors import UserError
from dino_jax.storage import Store

READING = {"batch_size": 4, "canvas_size": 24, "pixels": Pixels(3), "seed": 1}
COUNT = 12


@pytest.fixture(scope="module", params=["gs", "s3"])
def store(request):
    with bucket(request.param) as found:
        yield found


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The same images in every container, in class folders where it has folders."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    root = tmp_path_factory.mktemp("local")
    images = [jpeg(i) for i in range(COUNT)]
    for i, content in enumerate(images):
        (root / "files" / f"class{i // 6}").mkdir(exist_ok=True, parents=True)
        (root / "files" / f"class{i // 6}" / f"{i:03}.jpg").write_bytes(content)
    with zipfile.ZipFile(root / "all.zip", "w") as archive:
        for path in sorted((root / "files").rglob("*.jpg")):
            archive.write(path, path.relative_to(root / "files"))
    for k in range(2):
        with tarfile.open(root / f"shard-{k}.tar", "w") as tar:
            for i in range(6 * k, 6 * k + 6):
                for suffix, content in (("jpg", images[i]), ("cls", str(k).encode())):
                    member = tarfile.TarInfo(f"{i:03}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    rows = [{"bytes": content, "path": None} for content in images]
    pq.write_table(
        pa.table({"image": rows, "label": [i // 6 for i in range(COUNT)]}), root / "all.parquet", row_group_size=5
    )
    prepare(f"folder:{root}/files", root / "records", canvas_size=0, pixels=Pixels(3), shard_images=8, workers=0)
    return root


def jpeg(value):
    buffer = io.BytesIO()
    rng = np.random.default_rng(value)
    Image.fromarray(rng.integers(0, 256, (24, 30, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def sent(local, store, name):
    """Sends a folder of files; returns its URL."""
    url = f"{store.url}/{name}"
    paths = [path for path in Path(local).rglob("*") if path.is_file()]
    Store(url).upload({path.relative_to(local).as_posix(): path for path in paths})
    return url


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


SPECS = [
    "folder:{}/files",
    "zip:{}/all.zip",
    "wds:{}/shard-{{0..1}}.tar",
    "wds:{}/shard-*.tar",
    "parquet:{}/*.parquet",
    "array_record:{}/records/*.array_record",
]


@pytest.mark.parametrize("spec", SPECS)
def test_batches_are_those_of_the_local_files(local, store, cache, spec):
    url = sent(local, store, "data")
    ours, theirs = open_source(spec.format(url)), open_source(spec.format(local))
    assert [ours.name(i) for i in range(COUNT)] == [theirs.name(i) for i in range(COUNT)]
    assert len({ours.identity(i) for i in range(COUNT)}) == COUNT
    with train_batches(ours, **READING) as remote, train_batches(theirs, **READING) as here:
        for _ in range(5):
            for a, b in zip(next(remote), next(here), strict=True):
                np.testing.assert_array_equal(a, b)


def test_workers_read_from_the_store(local, store, cache):
    url = sent(local, store, "data")
    for spec in (f"folder:{url}/files", f"wds:{url}/shard-{{0..1}}.tar"):
        with (
            train_batches(open_source(spec), workers=1, **READING) as ours,
            train_batches(open_source(spec), **READING) as theirs,
        ):
            for _ in range(3):
                np.testing.assert_array_equal(next(ours).canvas, next(theirs).canvas)


def test_the_index_of_a_tar_is_kept_beside_it(local, store, cache):
    url = sent(local, store, "indexed")
    open_source(f"wds:{url}/shard-{{0..1}}.tar")
    assert json.loads(Store(url).read("shard-0.tar.index.json"))["samples"][0][0] == "000"
    before = len(store.proxy.requests)
    open_source(f"wds:{url}/shard-{{0..1}}.tar")
    assert len(store.proxy.requests) - before < 12, "no header is read again"
    Store(url).upload({"shard-0.tar": local / "shard-1.tar"})
    assert open_source(f"wds:{url}/shard-0.tar").name(0) == "shard-0.tar/006", "a changed tar is indexed again"


def test_copies_are_made_once_and_need_room(local, store, cache, monkeypatch):
    url = sent(local, store, "copied")
    spec = f"array_record:{url}/records/*.array_record"
    open_source(spec)
    copies = {path.name: path.stat().st_mtime_ns for path in (cache / "dino_jax" / "files").iterdir()}
    assert len(copies) == 2
    open_source(spec)
    assert {path.name: path.stat().st_mtime_ns for path in (cache / "dino_jax" / "files").iterdir()} == copies
    for path in (cache / "dino_jax" / "files").iterdir():
        path.unlink()
    monkeypatch.setattr("dino_jax.data.sources.files.SPARE", 1.0)
    with pytest.raises(UserError, match="has no room for copies of them: set XDG_CACHE_HOME"):
        open_source(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("folder:{}/none", "no images among its 0 objects"),
        ("wds:{}/none-*.tar", "no file .*none-"),
        ("wds:{}/none.tar", "none.tar cannot be read"),
        ("parquet:{}/none.parquet", "none.parquet cannot be read"),
        ("zip:{}/none.zip", "cannot be read"),
        ("array_record:{}/none.array_record", "none.array_record cannot be read"),
        ("zip:{}/shard-0.tar", "no zip archive"),
        ("parquet:{}/shard-0.tar", "no whole Parquet file"),
        ("wds:{}/all.parquet", "no tar file"),
    ],
)
def test_mistakes_are_one_line(local, store, cache, spec, message):
    url = sent(local, store, "data")
    with pytest.raises(UserError, match=message) as found:
        open_source(spec.format(url))
    assert "\n" not in str(found.value)


def test_an_image_that_is_gone_is_replaced(local, store, cache):
    url = sent(local, store, "gone")
    source = open_source(f"folder:{url}/files")
    Store(url).remove([f"files/{source.name(3)}"])
    with train_batches(source, **READING) as batches:
        bad = {int(record) for _ in range(3) for record in next(batches).bad}
    assert bad == {-1, 3}


@pytest.mark.parametrize(
    ("store", "fault"), [("gs", error(503)), ("s3", cut)], ids=["gs-503", "s3-cut"], indirect=["store"]
)
def test_a_store_that_refuses_is_asked_again(local, store, cache, fault, monkeypatch):
    """Every object is refused once while it is read."""
    monkeypatch.setattr(storage, "PATIENCE", 10.0)  # readers ahead of the test outlive the server
    url = sent(local, store, "refused")
    source = open_source(f"folder:{url}/files")
    refused = set()

    def once(method, path, body):
        if method == "GET" and ".jpg" in path and path not in refused:
            refused.add(path)
            return fault
        return None

    with store.faulty(once), train_batches(source, **READING) as batches:
        bad = {int(record) for _ in range(3) for record in next(batches).bad}
    assert bad == {-1}
    assert refused


def test_prepare_writes_to_a_bucket_and_goes_on_there(store, local, monkeypatch):
    out, settings = f"{store.url}/prepared", {"canvas_size": 16, "pixels": Pixels(3), "shard_images": 5, "workers": 0}
    prepare(f"folder:{local}/files", local / "prepared", **settings)
    whole = {path.name: path.read_bytes() for path in (local / "prepared").iterdir()}
    done = prepare(f"folder:{local}/files", out, **settings)
    assert {name: Store(out).read(name) for name in Store(out).sizes()} == whole

    names = sorted(done)
    Store(out).write(names[0], b"damaged")
    Store(out).remove([names[2]])
    sent = []
    monkeypatch.setattr(Store, "upload", lambda self, files, real=Store.upload: sent.extend(files) or real(self, files))
    assert prepare(f"folder:{local}/files", out, **settings) == done
    assert sorted(sent) == [names[0], names[2]]
    assert {name: Store(out).read(name) for name in Store(out).sizes()} == whole
    with pytest.raises(UserError, match="another canvas_size .16, now 8"):
        prepare(f"folder:{local}/files", out, **settings | {"canvas_size": 8})


@pytest.fixture(scope="module")
def tfds_set(tmp_path_factory):
    """The folder of a TFDS set with two splits."""
    return write_tfds(tmp_path_factory.mktemp("tfds"), jpeg, train=9, test=3)


@pytest.mark.parametrize(("split", "copied"), [("train[:50%]", 1), ("train[:2]+test", 2), ("all", 2)])
def test_a_tfds_set_in_a_bucket_gives_the_images_of_the_local_one(tfds_set, store, cache, split, copied):
    url = sent(tfds_set, store, "tfds/tiny/1.0.0")
    theirs, ours = open_source(f"tfds:{tfds_set}:{split}"), open_source(f"tfds:{url}:{split}")
    assert [ours[i] for i in range(len(ours))] == [theirs[i] for i in range(len(theirs))]
    assert ours.num_classes == 3
    assert sum("array_record" in path.name for path in (cache / "dino_jax" / "files").iterdir()) == copied


def test_a_tfds_set_that_is_not_in_the_bucket_is_one_line(tfds_set, store, cache):
    url = sent(tfds_set, store, "tfds/tiny/1.0.0")
    with pytest.raises(UserError, match=f"^data.source.*tfds:{url}:validation: "):
        open_source(f"tfds:{url}:validation")
    with pytest.raises(UserError, match="no dataset_info.json: name the folder that holds it"):
        open_source(f"tfds:{store.url}/tfds/tiny")
