"""Runs with their workdir in a bucket: what holds in a local folder holds there."""

import json
import subprocess
import time
from pathlib import Path

import buckets
import numpy as np
import pytest
from absl import flags
from buckets import bucket
from ml_collections import ConfigDict
from processes import Process, two_processes
from tiny import tiny_config, tiny_flags

from benchmarks import chaos
from dino_jax import load_backbone, storage
from dino_jax.checkpoints import mirror
from dino_jax.commands import convert, diagnose, evaluate, replay, report, suggest
from dino_jax.errors import UserError
from dino_jax.lease import exclusive
from dino_jax.ownership import LOCK
from dino_jax.storage import Store
from dino_jax.training import loop, nonfinite

EPOCHS, STEPS = 4, 20
# Of `diagnose` and `convert`.
FLAGS = {"json": True, "prototypes": None, "to": "timm", "num_heads": None, "image_size": None, "in_channels": None}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["gs", "s3"])
def place(request):
    with bucket(request.param) as found:
        yield found


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A finished run in a local folder."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    trainer(folder, folder.with_suffix(".log")).finish()
    return folder


@pytest.fixture(scope="module")
def killed(place, tmp_path_factory):
    """A run in a bucket that was killed while its second checkpoint was sent, and then finished: (URL, both logs)."""
    url, logs = f"{place.url}/killed", tmp_path_factory.mktemp("logs")
    with place.faulty(holding("killed/checkpoints/8/manifest.json")):
        process = trainer(url, logs / "first.log")
        wait_for(lambda: len([name for name in Store(url).sizes() if name.startswith("checkpoints/8/")]) > 10)
        process.end()
        process.popen.wait()
    assert chaos.unfinished(url) == ["8"]
    return url, [process.output, trainer(url, logs / "second.log").finish()]


def trainer(workdir, log, **changes):
    arguments = tiny_flags(**({"epochs": EPOCHS, "checkpoint__every_steps": 4} | changes))
    return Process(log, "train.py", *arguments, f"--workdir={workdir}")


def holding(words):
    """A fault: the request that writes the object with these words in its name gets no answer."""
    name = words.encode()

    def fault(method, path, body):
        writes = method in ("PUT", "POST") and (name in body[:2000] or words in path.replace("%2F", "/"))
        return buckets.slow(600) if writes else None

    return fault


def wait_for(condition):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def losses(text):
    rows = [json.loads(line) for line in text.splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def copied(url, name):
    """A copy of a run in the bucket."""
    source, target = Store(url), Store(f"{url.rpartition('/')[0]}/{name}")
    for one in source.sizes():
        target.write(one, source.read(one))
    return target


def test_a_run_that_is_killed_while_it_sends_a_checkpoint_ends_with_the_same_bits(killed, reference):
    url, (first, second) = killed
    assert "resuming after step 4" in second
    assert chaos.digests(url) == chaos.digests(reference)
    assert chaos.last_saved(url) == STEPS
    assert not chaos.left_over(url)


def test_its_files_are_those_of_a_local_run(killed, reference):
    """keep_last and all; each step is logged once."""
    names = [name for name in chaos.names(killed[0]) if not name.startswith(("checkpoints/", "export/"))]
    assert names == ["config.json", "health.json", "metrics.jsonl"]
    kept = {name.split("/")[1] for name in chaos.names(killed[0]) if name.startswith("checkpoints/")}
    assert kept == {path.name for path in (reference / "checkpoints").iterdir()}
    logged = Store(killed[0]).read("metrics.jsonl").decode()
    assert losses(logged) == losses((reference / "metrics.jsonl").read_text())
    assert len(losses(logged)) == STEPS == sum('"loss"' in line for line in logged.splitlines())


@pytest.mark.parametrize("what", ["", "/export", "/checkpoints"])
def test_its_backbone_loads(killed, reference, what, place):
    url = killed[0]
    if what == "/checkpoints":  # without an export
        store = copied(url, "no_export")
        store.remove([name for name in store.sizes() if name.startswith("export/")])
        url, what = store.url, ""
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 1)).astype(np.float32)
    found, expected = load_backbone(url + what), load_backbone(reference)
    assert np.array_equal(found(images).cls, expected(images).cls)
    assert found.card["provenance"]["step"] == STEPS


def test_an_evaluation_reads_and_writes_there(killed, reference, tmp_path):
    settings = {"train": "demo:train:4", "test": "demo:test:4", "k": (5,), "batch_size": 8, "workers": 0}
    config = evaluate.PROTOCOLS["knn"].default_config()
    config.update(settings)
    assert evaluate.results_folder(f"{killed[0]}/") == killed[0]
    evaluate.evaluate("knn", killed[0], ConfigDict(config), f"{killed[0]}/eval/knn")
    evaluate.evaluate("knn", str(reference), ConfigDict(config), tmp_path)
    store = Store(f"{killed[0]}/eval/knn")
    found, expected = json.loads(store.read("results.json")), json.loads((tmp_path / "results.json").read_text())
    own = ("time", "checkpoint", "model", "seconds", "images_per_second")
    assert {key: found[key] for key in expected if key not in own} == {
        key: expected[key] for key in expected if key not in own
    }
    assert store.read(LOCK) is None
    evaluate.evaluate("knn", killed[0], ConfigDict(config), f"{killed[0]}/eval/knn")  # with features from there


def test_other_commands_read_a_run_there(killed, tmp_path, capsys, monkeypatch):
    store = copied(killed[0], "read")
    report.main([store.url])
    assert b"<svg" in store.read("report.html")
    assert f"written to {store.url}/report.html" in capsys.readouterr().out
    monkeypatch.setattr(flags, "FLAGS", ConfigDict(FLAGS))
    diagnose.main([store.url])
    assert json.loads(capsys.readouterr().out)["step"] == STEPS
    convert.main([store.url, str(tmp_path / "a.safetensors")])
    assert (tmp_path / "a.safetensors").is_file()


def test_a_step_is_replayed_from_there(killed, tmp_path):
    config = tiny_config(epochs=EPOCHS)
    source = loop.open_source(config.data.source)
    batch = next(iter(loop.batches_from(STEPS - 1, source, config)))
    file = nonfinite.write_replay_file(tmp_path, config, source, STEPS, STEPS - 4, [], batch.index)
    Store(killed[0]).write(file.name, file.read_bytes())
    rows = losses(Store(killed[0]).read("metrics.jsonl").decode())
    assert replay.replay(f"{killed[0]}/{file.name}").metrics["loss"] == pytest.approx(rows[STEPS], rel=1e-5)
    Store(killed[0]).remove([file.name])


def test_a_damaged_object_is_detected_and_the_checkpoint_before_is_used(killed, tmp_path):
    store = copied(killed[0], "damaged")
    newest = f"checkpoints/{STEPS}/state/ocdbt.process_0/d/"
    name, size = max(((n, s) for n, s in store.sizes().items() if n.startswith(newest)), key=lambda one: one[1])
    data = bytearray(store.read(name))
    data[size // 2] ^= 1
    store.write(name, bytes(data))
    store.remove([one for one in store.sizes() if one.startswith("export/")])
    output = trainer(store.url, tmp_path / "log").finish()
    assert f"{STEPS} is damaged ({name.removeprefix(f'checkpoints/{STEPS}/')} has changed): skipped" in output
    assert f"resuming after step {STEPS - 4}" in output
    assert store.read(f"checkpoints/{STEPS}.damaged/manifest.json")
    assert chaos.digests(store.url) == chaos.digests(killed[0])


def test_a_truncated_object_is_detected(killed):
    store = copied(killed[0], "truncated")
    name = max((one for one in store.sizes() if one.startswith("export/variables/ocdbt")), key=store.sizes().get)
    store.write(name, store.read(name)[:-1])
    with pytest.raises(UserError, match=f"export {store.url}/export is damaged .* has changed"):
        load_backbone(store.url)


def test_an_answer_that_is_cut_off_is_asked_for_again(killed, place, capfd):
    left = [3]

    def fault(method, path, body):
        if method == "GET" and "process_0" in path and left[0] and "prefix" not in path:
            left[0] -= 1
            return buckets.cut
        return None

    with place.faulty(fault):
        load_backbone(killed[0])
    assert left == [0]
    assert "damaged" not in capfd.readouterr().err


def test_suggested_settings_are_kept_there(place, monkeypatch):
    calls = []

    def write(program, check):
        calls.append(program)
        [output] = [one.partition("=")[2] for one in program if one.startswith("--output=")]
        Path(output).write_text("# a recipe")
        return subprocess.CompletedProcess(program, 0)

    monkeypatch.setattr(suggest.subprocess, "run", write)
    for _ in range(2):
        arguments = ["--config=auto", f"--workdir={place.url}/auto", "--config.data.source=demo"]
        with suggest.automatic(arguments) as (recipe, *others):
            assert Path(recipe.partition("=")[2]).read_text() == "# a recipe"
            assert others == arguments[1:]
    assert len(calls) == 1
    assert Store(f"{place.url}/auto").read("suggested.py") == b"# a recipe"


def test_a_second_run_is_refused(place):
    with (
        exclusive(f"{place.url}/owned", "--workdir"),
        pytest.raises(UserError, match="is in use by process .* or give another --workdir"),
    ):
        loop.train(tiny_config(), f"{place.url}/owned")


@pytest.mark.parametrize(
    ("place", "what"),
    [("gs", buckets.error(503)), ("s3", buckets.reset), ("gs", buckets.slow(4))],
    ids=["gs-503", "s3-reset", "gs-slow"],
    indirect=["place"],
)
def test_a_store_that_fails_for_a_while_is_waited_for(place, reference, tmp_path, what):
    url = f"{place.url}/{tmp_path.name}"
    process = trainer(url, tmp_path / "log")
    process.wait_for("step 3/")
    with place.faulty(lambda method, path, body: what):
        time.sleep(20)
    output = process.finish()
    assert f"{url}: no answer of the store" in output or f"{url}: the store refuses" in output or "slow" in str(what)
    assert chaos.digests(url) == chaos.digests(reference)
    assert not chaos.left_over(url)


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_a_store_that_stays_away_ends_the_run_with_a_line_and_keeps_the_checkpoint(place, monkeypatch, tmp_path):
    url, gone = f"{place.url}/{tmp_path.name}", []
    monkeypatch.setattr(storage, "PATIENCE", 0.0)

    def stay_away(path, folder, manifest, send=mirror._StoreMirror._send_folder):
        if folder == "checkpoints/8":
            gone.append(folder)
            place.proxy.fault = lambda method, path, body: buckets.error(503)
        send(path, folder, manifest)

    monkeypatch.setattr(mirror._StoreMirror, "_send_folder", stay_away)
    with pytest.raises(UserError, match=f"{url}: the store has refused"):
        loop.train(tiny_config(epochs=EPOCHS), url)
    place.proxy.fault = None
    assert gone
    assert chaos.last_saved(url) == 4


@pytest.mark.parametrize("place", ["gs"], indirect=True)
def test_two_processes_without_a_common_folder_save_and_resume(place, tmp_path):
    """Some arrays are in parts on both, others whole on each."""
    url = f"{place.url}/two"
    for epochs in (2, EPOCHS):
        changes = [{"epochs": epochs, "fsdp": 4, **one} for one in two_processes()]
        logs = [tmp_path / f"{epochs}-{i}" for i in range(2)]
        both = [
            Process(log, "train.py", *tiny_flags(**one), f"--workdir={url}", devices=2)
            for log, one in zip(logs, changes, strict=True)
        ]
        outputs = [process.finish() for process in both]
    assert "resuming after step 10" in outputs[0]
    assert chaos.last_saved(url) == STEPS
    assert load_backbone(f"{url}/export").card["provenance"]["step"] == STEPS
