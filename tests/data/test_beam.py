"""Apache Beam's DirectRunner with two worker processes writes what the local path writes.

Beam holds back Pillow, protobuf and pyarrow, so it has an environment of its own: `make test-beam`.
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from processes import Process, xla_flags
from zoo import encoded, photo

from dino_jax.commands import check, evaluate
from dino_jax.commands.prepare import MANIFEST, RECORDS, prepare
from dino_jax.data import beam, examination, summary
from dino_jax.data.pixels import Pixels
from dino_jax.data.sources import open_source
from dino_jax.errors import UserError
from dino_jax.evals import features
from dino_jax.evals.common import extraction
from dino_jax.storage import Store
from dino_jax.weights import official, tensor_files

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


@pytest.fixture
def slices_of_five(monkeypatch):
    monkeypatch.setattr(check, "SLICE", 5)


def checked(spec, path, options, pixels):
    return check.check_on_beam(spec, str(path), 16, pixels, options)


def locally(spec, pixels):
    source = open_source(spec)
    findings = examination.check(source, canvas_size=16, pixels=pixels, workers=0)
    return {"source": spec, **summary.summarize(source, findings)}


def test_two_workers_report_what_the_local_path_reports(tmp_path):
    """The command itself, whose slices have 1,024 images."""
    root = tmp_path / "in"
    for i in range(1030):
        path = root / "01234"[i % 5] / f"{i // 5:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photo(0 if i in (0, 1029) else i + 1)[:6, :5]))
    (root / "4/204.png").write_bytes(b"text")
    command = ["-m", "dino_jax", "check", f"folder:{root}", "--canvas_size=16"]
    ours = [*command, f"--report={tmp_path / 'beam.json'}", f"--beam={TWO}"]
    theirs = [*command, f"--report={tmp_path / 'local.json'}", "--workers=0"]
    outputs = [Process(tmp_path / f"{k}.log", *one).finish(code=1) for k, one in enumerate((ours, theirs))]
    assert outputs[1] in outputs[0]
    assert (tmp_path / "beam.json").read_bytes() == (tmp_path / "local.json").read_bytes()
    found = json.loads((tmp_path / "beam.json").read_text())
    assert found["duplicates"] == [["0/000.png", "4/205.png"]]
    assert list(found["bad"]) == ["4/204.png"]
    assert sorted(path.name for path in tmp_path.glob("*.json*")) == ["beam.json", "local.json"]


def test_damaged_images_and_copies_are_found_across_slices(folder, tmp_path, slices_of_five):
    found = checked(f"folder:{folder}", tmp_path / "report.json", HERE, Pixels(3))
    assert found == locally(f"folder:{folder}", Pixels(3))
    assert found["duplicates"] == [["a/00.png", "b/23.png"]]
    assert list(found["bad"]) == ["a/04.png", "b/21.png"]


def test_a_check_that_was_cut_off_goes_on(folder, tmp_path, slices_of_five, monkeypatch):
    looked, examine = [], check.examine_all

    def until_the_fourth(source, records, *settings):
        if len(looked) == 3:
            raise UserError("the disk is gone")
        looked.append(records)
        return examine(source, records, *settings)

    monkeypatch.setattr(check, "examine_all", until_the_fourth)
    with pytest.raises(UserError, match="^the disk is gone$"):
        checked(f"folder:{folder}", tmp_path / "report.json", HERE, Pixels(3))
    first = list(looked)
    looked.clear()
    found = checked(f"folder:{folder}", tmp_path / "report.json", HERE, Pixels(3))
    assert sorted(map(list, first + looked)) == [list(range(k, k + 5)) for k in range(0, 25, 5)]
    assert found == locally(f"folder:{folder}", Pixels(3))
    assert not (tmp_path / "report.json.parts").exists()


def test_values_of_deep_images_are_summed_up_alike(tmp_path, slices_of_five, monkeypatch):
    monkeypatch.setattr(summary, "DEEP_IMAGES", 4)
    (tmp_path / "in").mkdir()
    for i in range(12):
        np.save(tmp_path / "in" / f"{i:02d}.npy", np.random.default_rng(i).integers(0, 999 + i, (9, 7, 2), np.uint16))
    spec = f"folder:{tmp_path / 'in'}"
    found = checked(spec, tmp_path / "report.json", HERE, Pixels(2, "uint16"))
    assert found == locally(spec, Pixels(2, "uint16"))
    assert found["values"]["percentiles"][1] > 900


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of a small ViT."""
    card = {"arch": "vit_nano", "patch_size": 8, "in_channels": 3, "image_size": 16, "embed_dim": 64}
    rng, like = np.random.default_rng(0), official.backbone_like(card)["params"]
    drawn = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), like)
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    tensor_files.write(path, official.to_official(drawn))
    return str(path)


def settings(folder, **changes):
    config = features.default_config()
    config.update({"source": f"folder:{folder}", "batch_size": 4, "workers": 0} | changes)
    return config


def test_two_workers_extract_the_features_of_the_local_path(folder, weights, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(extraction, "PART", 8)
    monkeypatch.setenv("XLA_FLAGS", xla_flags(jax.device_count()))  # batches are divided among as many devices
    evaluate.evaluate("features", weights, settings(folder), tmp_path / "local")
    features.extract_on_beam(weights, None, settings(folder), tmp_path / "beam", TWO)
    evaluate.evaluate("features", weights, settings(folder), tmp_path / "beam")
    assert "features of 25 images from" in capfd.readouterr().err  # none was computed by this process
    ours, theirs = files(tmp_path / "beam"), files(tmp_path / "local")
    assert ours.keys() == theirs.keys()
    assert ours[Path("images.csv")] == theirs[Path("images.csv")]  # in the order of the source
    rows = np.load(tmp_path / "beam" / "features.npy")
    np.testing.assert_array_equal(rows, np.load(tmp_path / "local" / "features.npy"))
    assert len(np.unique(rows, axis=0)) == len(rows) - 1 == 22


def test_features_that_are_there_are_not_extracted_again(folder, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "PART", 8)
    features.extract_on_beam(weights, None, settings(folder), tmp_path, HERE)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "features").iterdir()}
    assert len(before) == 4
    gone = sorted(before)[1]
    gone.unlink()
    features.extract_on_beam(weights, None, settings(folder), tmp_path, HERE)
    after = {path: path.stat().st_mtime_ns for path in before}
    assert [path for path in before if after[path] != before[path]] == [gone]


def test_mistakes_of_the_protocol_are_one_line(folder, weights, tmp_path):
    with pytest.raises(UserError, match="^blocks 99: vit_nano has"):
        features.extract_on_beam(weights, None, settings(folder, blocks=99), tmp_path, HERE)
    command = ["evaluate.py", "knn", f"--checkpoint={weights}", f"--out={tmp_path}", f"--beam={HERE}"]
    assert "error: --beam is for the protocol features" in Process(tmp_path / "log", *command).finish(code=2)


def test_files_and_reports_go_to_object_stores(folder, tmp_path, slices_of_five):
    """In fsspec's store in memory, so that the workers are threads."""
    prepare(f"folder:{folder}", tmp_path, **STORED)
    ours = prepare(f"folder:{folder}", "memory://bucket/out/", **STORED, beam_options=HERE)
    store = Store("memory://bucket/out")
    assert {Path(name): store.read(name) for name in store.sizes()} == files(tmp_path)
    assert sum(shard.bytes for shard in ours.values()) == sum(map(len, map(store.read, ours)))
    found = checked(f"folder:{folder}", "memory://bucket/report.json", HERE, Pixels(3))
    assert found == locally(f"folder:{folder}", Pixels(3)) == json.loads(Store("memory://bucket").read("report.json"))
    assert len(Store("memory://bucket").sizes()) == len(ours) + 2


def test_workers_that_see_other_images_end_the_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("dino_jax.commands.prepare.names_digest", lambda source: "other")
    with pytest.raises(UserError, match=r"^--beam: a worker sees other images .* until the end$"):
        prepare(f"folder:{folder}", tmp_path / "out", **STORED, beam_options=TWO)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["shards"] == []


def test_workers_that_write_elsewhere_are_noticed(folder, tmp_path, monkeypatch):
    """As without a common disk: what they wrote is not here."""
    run = beam.for_each
    monkeypatch.setattr(beam, "for_each", lambda *job: (run(*job), shutil.rmtree(tmp_path / "out" / RECORDS)))
    with pytest.raises(UserError, match="5 of their 5 files are not in .*out: give paths that are the same"):
        prepare(f"folder:{folder}", tmp_path / "out", **STORED, beam_options=HERE)


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
