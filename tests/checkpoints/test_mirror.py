"""What of a folder is sent to a store and fetched from it, and in which order. The store is this process's memory."""

import json

import pytest

from dino_jax import atomic
from dino_jax.checkpoints import mirror, mirrored, write_manifest
from dino_jax.errors import UserError
from dino_jax.storage import Store


@pytest.fixture
def store(request):
    return Store(f"memory://{request.node.name}/run")


def checkpoint(local, step, value="a"):
    """A folder with a manifest, as a save leaves it."""
    folder = local / "checkpoints" / str(step)
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "data").write_text(value)
    write_manifest(folder)
    return folder


def fill(store, *steps):
    with mirrored(store.url) as run:
        (run.local / "metrics.jsonl").write_text("{}")
        for step in steps:
            checkpoint(run.local, step)


def test_a_local_folder_is_its_own_mirror(tmp_path):
    with mirrored(tmp_path / "run") as run:
        assert run.local == tmp_path / "run"
        run.flush()
        assert run.on_writer(store) is store
    assert not run.local.exists()


def test_files_come_back_and_the_manifest_is_sent_last(store, monkeypatch):
    sent, write, upload = [], Store.write, Store.upload
    monkeypatch.setattr(Store, "write", lambda self, name, data: [sent.append(name), write(self, name, data)])
    monkeypatch.setattr(Store, "upload", lambda self, files: [sent.extend(files), upload(self, files)])
    fill(store, 4)
    assert sent == ["metrics.jsonl", "checkpoints/4/state/data", "checkpoints/4/manifest.json"]
    with mirrored(store.url) as run:
        assert (run.local / "metrics.jsonl").read_text() == "{}"
        assert (run.local / "checkpoints/4/state/data").read_text() == "a"
    assert len(sent) == 3  # nothing has changed


def test_what_is_being_written_is_not_sent(store):
    with mirrored(store.url) as run:
        for name in (".hidden", "export.tmp/card.json", "checkpoints/4.orbax-checkpoint-tmp/a", "export.previous/a"):
            (run.local / name).parent.mkdir(parents=True, exist_ok=True)
            (run.local / name).touch()
    assert not store.sizes()


def test_changes_are_sent_now_and_then_and_by_flush(store, monkeypatch):
    with mirrored(store.url) as run:
        atomic.rewrite_json(run.local / "health.json", 1)
        run.flush()
        assert json.loads(store.read("health.json")) == 1
    monkeypatch.setattr(mirror, "PERIOD", 0.05)
    with mirrored(store.url) as run:
        atomic.rewrite_json(run.local / "health.json", 2)
        for _ in range(1000):
            if store.read("health.json") != b"1\n":
                break
        assert json.loads(store.read("health.json")) == 2


def test_an_older_checkpoint_is_not_fetched_but_counts_and_can_be_removed(store):
    fill(store, 4, 8)
    with mirrored(store.url) as run:
        assert not any((run.local / "checkpoints/4").iterdir())
        run.flush()
        assert len(store.sizes("checkpoints/4")) == 2
        (run.local / "checkpoints/4").rmdir()
    assert not store.sizes("checkpoints/4")
    assert store.sizes("checkpoints/8")


def test_damaged_checkpoints_are_fetched_until_one_is_intact(store):
    fill(store, 4, 8, 12)
    store.write("checkpoints/12/state/data", b"b")
    with mirrored(store.url) as run:
        assert (run.local / "checkpoints/12/state/data").read_text() == "b"
        assert (run.local / "checkpoints/8/state/data").read_text() == "a"
        assert not any((run.local / "checkpoints/4").iterdir())
        (run.local / "checkpoints/12").rename(run.local / "checkpoints/12.damaged")
    assert not store.sizes("checkpoints/12")
    assert store.read("checkpoints/12.damaged/state/data") == b"b"


def test_an_unfinished_checkpoint_is_removed_by_the_owner_only(store):
    fill(store, 4, 8)
    store.remove(["checkpoints/8/manifest.json"])
    with mirrored(store.url):
        assert store.sizes("checkpoints/8")
    with mirrored(store.url, lambda: None) as run:
        assert not store.sizes("checkpoints/8")
        assert (run.local / "checkpoints/4/state/data").is_file()


def test_other_files_beside_the_checkpoints_are_left_alone(store):
    store.write("checkpoints/notes.txt", b"mine")
    store.write("checkpoints/mine/a", b"mine")
    fill(store, 4)
    with mirrored(store.url, lambda: None):
        pass
    assert store.read("checkpoints/notes.txt") == store.read("checkpoints/mine/a") == b"mine"


def test_what_no_run_reads_is_not_fetched(store):
    for name in ("eval/knn/features/a.npz", "tensorboard/events"):
        store.write(name, b"large")
    with mirrored(f"{store.url}/") as run:
        assert not list(run.local.iterdir())
    assert list(store.sizes()) == ["eval/knn/features/a.npz", "tensorboard/events"]


def test_files_are_sent_after_an_error_and_the_error_names_the_url(store):
    def fail():
        with mirrored(store.url) as run:
            (run.local / "replay-8.json").write_text("{}")
            raise UserError(f"see {run.local / 'replay-8.json'}")

    with pytest.raises(UserError, match=f"^see {store.url}/replay-8.json$"):
        fail()
    assert store.read("replay-8.json") == b"{}"


def test_who_no_longer_owns_the_folder_sends_nothing(store):
    def lost():
        raise UserError("lost")

    with pytest.raises(UserError, match="lost"), mirrored(store.url, lost) as run:
        (run.local / "a").touch()
    assert not store.sizes()


def test_a_store_that_does_not_keep_what_it_is_sent_is_noticed(store, monkeypatch):
    monkeypatch.setattr(Store, "upload", lambda self, files: None)
    with pytest.raises(UserError, match=r"does not hold what it was sent \(checkpoints/4/state/data\)"):
        fill(store, 4)
    assert "checkpoints/4/manifest.json" not in store.sizes()
