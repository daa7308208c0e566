"""Apache Beam's DirectRunner with two worker processes writes what the local path writes.

Beam holds back Pillow, protobuf and pyarrow, so it has an environment of its own: `make test-beam`.
"""

import json

import numpy as np
import pytest
from PIL import Image
from processes import Process
from zoo import encoded, photo

from dino_jax.commands.prepare import MANIFEST, RECORDS, prepare
from dino_jax.data import beam
from dino_jax.data.pixels import Pixels
from dino_jax.errors import UserError

pytest.importorskip("apache_beam")
pytestmark = pytest.mark.slow
TWO = "--runner=DirectRunner --direct_num_workers=2 --direct_running_mode=multi_processing"
HERE = "--runner=DirectRunner"
STORED = {"canvas_size": 24, "pixels": Pixels(3), "shard_images": 5, "workers": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """25 images of two classes in slices of 5; two of them are damaged, and two in other slices are equal."""
    root = tmp_path_factory.mktemp("in")
    for i in range(25):
        path = root / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(photo(0 if i == 23 else i)))
    (root / "a/04.png").write_bytes(b"text")
    (root / "b/21.png").write_bytes(encoded(photo(21))[:-30])
    return root


def files(out):
    return {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def changed(out):
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.array_record")}


def test_two_workers_write_the_files_of_the_local_path(folder, tmp_path):
    local = prepare(f"folder:{folder}", tmp_path / "local", **STORED)
    ours = prepare(f"folder:{folder}", tmp_path / "beam", **STORED, beam_options=TWO)
    assert ours == local
    assert files(tmp_path / "beam") == files(tmp_path / "local")  # the manifest, too, and nothing else
    assert sum(len(shard.left_out) for shard in ours.values()) == 2


def test_a_killed_run_goes_on_with_the_missing_files(tmp_path):
    for i in range(20):
        noise = np.random.default_rng(i).integers(0, 256, (900, 900, 3), np.uint8)
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(noise).save(tmp_path / "in" / f"{i:02d}.png", compress_level=1)
    out = tmp_path / "out"
    arguments = ["-m", "dino_jax", "prepare", f"folder:{tmp_path / 'in'}", str(out)]
    arguments += ["--shard_images=1", "--canvas_size=500", f"--beam={TWO}"]
    first = Process(tmp_path / "first.log", *arguments)
    first.wait_for_file(out / RECORDS)
    while not any((out / RECORDS).glob("*.json")):
        assert first.popen.poll() is None, first.output
    first.end()
    first.popen.wait()
    recorded = {path.stem for path in (out / RECORDS).glob("*.json")}
    before = {name: time for name, time in changed(out).items() if name in recorded}
    assert 0 < len(before) < 20

    assert "20 images in 20 files" in Process(tmp_path / "second.log", *arguments).finish()
    assert before.items() <= changed(out).items()
    assert not (out / RECORDS).exists()
    settings = STORED | {"canvas_size": 500, "shard_images": 1}
    prepare(f"folder:{tmp_path / 'in'}", tmp_path / "local", **settings)
    assert files(out) == files(tmp_path / "local")


def test_what_the_local_path_began_beam_ends(folder, tmp_path):
    out = tmp_path / "out"
    prepare(f"folder:{folder}", out, **STORED)
    whole, before = files(out), changed(out)
    names = sorted(before)
    (out / names[1]).write_bytes(b"damaged")
    (out / names[3]).unlink()
    prepare(f"folder:{folder}", out, **STORED, beam_options=HERE)
    assert files(out) == whole
    assert {name for name, time in changed(out).items() if time != before[name]} == {names[1], names[3]}


def test_workers_that_see_other_images_end_the_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("dino_jax.commands.prepare.names_digest", lambda source: "other")
    with pytest.raises(UserError, match=r"^--beam: a worker sees other images .* until the end$"):
        prepare(f"folder:{folder}", tmp_path / "out", **STORED, beam_options=TWO)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["shards"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--runner=DirectRunner --direct_workers=2", "--direct_workers is no pipeline option"),
        ("DirectRunner", "DirectRunner is no pipeline option"),
        ("--direct_num_workers=two", "invalid int value: 'two'"),
        ("--runner=Direct2", "Unexpected pipeline runner: Direct2"),
        ("--runner='", "No closing quotation"),
    ],
)
def test_a_mistake_in_the_options_is_one_line(options, message):
    with pytest.raises(UserError, match=message) as raised:
        beam.for_each(print, [1], options)
    assert str(raised.value).startswith("--beam=")
    assert "\n" not in str(raised.value)
