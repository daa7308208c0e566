"""Object stores: whole objects, patience, and one line for what patience does not help."""

import subprocess
import sys
import time

import buckets
import pytest
from buckets import bucket

from dino_jax import storage
from dino_jax.errors import UserError
from dino_jax.storage import Store


@pytest.fixture(scope="module", params=["gs", "s3"])
def place(request):
    with bucket(request.param) as found:
        yield found


@pytest.fixture
def store(place, request):
    return Store(f"{place.url}/{request.node.name.replace('[', '-').replace(']', '')}")


def times(n, what, when=lambda method, path: True):
    """A fault of the first n requests that fit."""
    left = [n]

    def fault(method, path, body):
        if left[0] and when(method, path):
            left[0] -= 1
            return what
        return None

    return fault


def test_objects_are_written_read_listed_and_removed(store, tmp_path):
    assert store.read("a") is None
    assert store.sizes() == {}
    store.write("a", b"1")
    store.write("a", b"22")
    files = {"d/empty": tmp_path / "empty", "d/big": tmp_path / "big"}
    files["d/empty"].touch()
    files["d/big"].write_bytes(b"x" * 6_000_000)
    store.upload(files)
    assert store.sizes() == {"a": 2, "d/big": 6_000_000, "d/empty": 0}
    assert store.sizes("d") == {"d/big": 6_000_000, "d/empty": 0}
    assert not store.is_file()
    assert Store(f"{store.url}/a").is_file()
    store.download(["d/big", "d/empty", "gone"], tmp_path / "back")
    assert (tmp_path / "back/d/big").read_bytes() == files["d/big"].read_bytes()
    assert (tmp_path / "back/d/empty").stat().st_size == 0
    assert not (tmp_path / "back/gone").exists()
    store.remove(["a", "gone", "d/big"])
    assert list(store.sizes()) == ["d/empty"]


def test_a_folder_is_no_prefix(store):
    for name in ("1/a", "10/a", "1"):
        store.write(name, b"")
    assert list(store.sizes("1")) == ["1/a"]
    assert not Store(store.url[:-1]).sizes()


def test_a_copy_stays_in_its_folder(store, monkeypatch):
    monkeypatch.setattr(store._fs, "find", lambda path, detail: {f"{path}/../a": {"size": 1, "type": "file"}})
    assert not store.sizes()


@pytest.mark.parametrize("data", [b"", b"a\r", b"a\n", b"a\r\n", b"\x00--"])
def test_all_bytes_arrive(store, data):
    store.write("a", data)
    assert store.read("a") == data


@pytest.mark.parametrize("what", [buckets.error(503), buckets.error(500), buckets.reset], ids=["503", "500", "reset"])
def test_a_store_that_refuses_is_asked_again(place, store, what):
    with place.faulty(times(2, what)):
        store.write("a", b"1")
    with place.faulty(times(2, what)):
        assert store.read("a") == b"1"


@pytest.mark.slow
@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_a_store_that_refuses_for_long_is_asked_again_with_a_line(place, store, capfd, monkeypatch):
    monkeypatch.setattr(storage, "SLOW", 0.5)
    with place.faulty(times(14, buckets.error(503))):  # more than the libraries themselves repeat a request
        store.write("a", b"1")
    assert store.read("a") == b"1"
    said = capfd.readouterr().err
    assert f"{store.url}: the store refuses" in said or f"{store.url}: no answer of the store for" in said


@pytest.mark.slow
@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_a_store_that_stays_away_ends_with_a_line(place, store, monkeypatch):
    monkeypatch.setattr(storage, "PATIENCE", 0.0)
    with (
        place.faulty(lambda method, path, body: buckets.error(503)),
        pytest.raises(UserError, match="the store has refused for .* start the same command again"),
    ):
        store.write("a", b"1")


def test_a_slow_store_is_waited_for_with_a_line(place, store, capfd, monkeypatch):
    monkeypatch.setattr(storage, "SLOW", 0.3)
    began = time.monotonic()
    with place.faulty(times(1, buckets.slow(1.5))):
        store.write("a", b"1")
    assert time.monotonic() - began >= 1.5
    assert "no answer of the store for" in capfd.readouterr().err


def test_an_answer_that_is_cut_off_is_not_taken_for_the_object(place, store):
    store.write("a", bytes(range(256)) * 100)
    with place.faulty(times(1, buckets.cut, when=lambda method, path: method == "GET")):
        assert store.read("a") == bytes(range(256)) * 100


def test_no_permission_ends_at_once_with_a_line(place, store):
    with (
        place.faulty(lambda method, path, body: buckets.error(403)),
        pytest.raises(UserError, match="the store refuses .* credentials"),
    ):
        store.write("a", b"1")


def test_a_bucket_that_does_not_exist_is_named(place):
    absent = place.url.replace("bucket", "absent")
    with pytest.raises(UserError, match=f"{absent}/x: no such bucket"):
        Store(f"{absent}/x").write("a", b"1")


def test_a_missing_library_is_blamed_on_its_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"gcsfs is not installed: pip install 'dino_jax\[gcs\]'"):
        Store("gs://bucket/run")


def test_an_unknown_scheme_is_named():
    with pytest.raises(UserError, match="nonsense://a/b cannot be used"):
        Store("nonsense://a/b")


def test_a_copy_is_local_and_does_not_last(store):
    store.write("d/a", b"1")
    with storage.fetched(store.url) as local:
        assert (local / "d/a").read_bytes() == b"1"
    assert not local.exists()
    with storage.fetched(f"{store.url}/d/a") as local:
        assert local.read_bytes() == b"1"
    with storage.fetched(f"{store.url}/none") as local:
        assert not local.exists()


def test_errors_name_the_url_and_not_the_copy(store):
    with pytest.raises(UserError, match=f"^{store.url}/x is bad$"), storage.local_folder(store.url) as local:
        raise UserError(f"{local}/x is bad")


def test_copies_of_killed_processes_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(storage.tempfile, "tempdir", str(tmp_path))
    with storage.local_folder("gs://bucket/a") as in_use:
        dead = in_use.parents[2].with_name(f"dino_jax-{storage.os.getuid()}-dead")
        (dead / "gs").mkdir(parents=True)
        with storage.local_folder("gs://bucket/b"):
            assert not dead.exists()
            assert in_use.parent.exists()
    assert not list(tmp_path.iterdir())


def test_a_thread_that_waits_for_the_store_does_not_keep_a_process_alive():
    """Readers are ahead of a run that ends while the store is away."""
    program = """
from concurrent.futures import ThreadPoolExecutor
from dino_jax.storage import Store

store, pool = Store("memory://bucket/run"), ThreadPoolExecutor(1)

def refuse(path):
    raise OSError("away")

store._fs.cat_file = refuse
pool.submit(store.read, "a")
"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "the store refuses (away): next attempt in 1 s" in done.stderr
    assert time.monotonic() - began < 60
