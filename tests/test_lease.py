"""One writer for each folder in an object store."""

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import buckets
import pytest
from buckets import bucket

from dino_jax import lease
from dino_jax.errors import UserError
from dino_jax.lease import exclusive
from dino_jax.ownership import LOCK
from dino_jax.storage import Store


@pytest.fixture(scope="module", params=["gs", "s3"])
def place(request):
    with bucket(request.param) as found:
        yield found


@pytest.fixture
def store(place, request, monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.2)
    monkeypatch.setattr(lease, "EXPIRES", 1.5)
    monkeypatch.setattr(lease, "SETTLES", 0.1)
    return Store(f"{place.url}/{request.node.name.split('[')[0]}")


def left_behind(store, **changes):
    """The lease of a process that was killed."""
    owner = {"host": "elsewhere", "pid": 1, "machine": "another", "since": "then", "id": "0"} | changes
    store.write(LOCK, json.dumps(owner).encode())


def test_a_second_owner_is_refused_and_the_first_does_not_notice(store):
    with exclusive(store.url, "--workdir") as require_owned:
        with (
            pytest.raises(UserError, match=f"is in use by process {os.getpid()} on .*another --workdir"),
            exclusive(store.url, "--workdir"),
        ):
            pass
        require_owned()
    assert store.read(LOCK) is None


def test_an_owner_elsewhere_that_is_silent_is_waited_for_and_replaced(store, capfd):
    left_behind(store)
    began = time.monotonic()
    with exclusive(store.url, "--workdir") as require_owned:
        assert time.monotonic() - began >= lease.EXPIRES
        time.sleep(3 * lease.BEAT)
        require_owned()
    assert "belongs to process 1 on elsewhere since then: waiting up to" in capfd.readouterr().err


def test_a_dead_owner_of_this_machine_is_replaced_at_once(store, monkeypatch):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left_behind(store, machine=lease._machine(), pid=dead.pid)
    monkeypatch.setattr(lease, "EXPIRES", 1000.0)
    with exclusive(store.url, "--workdir"):
        pass


def test_an_owner_that_was_replaced_notices_and_leaves_the_lease_alone(store, capfd):
    with exclusive(store.url, "--workdir") as require_owned:
        left_behind(store)
        time.sleep(4 * lease.BEAT)
        with pytest.raises(UserError, match="now belongs to another process"):
            require_owned()
    assert json.loads(store.read(LOCK))["host"] == "elsewhere"
    assert "now belongs to another process" in capfd.readouterr().err


def test_of_many_that_start_at_once_one_owns(store):
    owners, refused, ready = [], [], threading.Barrier(4)

    def start():
        ready.wait()
        try:
            with exclusive(store.url, "--workdir") as require_owned:
                time.sleep(2 * lease.EXPIRES)
                require_owned()
                owners.append(1)
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(owners) == 1
    assert len(refused) == 3


def test_a_store_that_refuses_for_a_while_costs_no_lease(place, store):
    with exclusive(store.url, "--workdir") as require_owned:
        with place.faulty(lambda method, path, body: buckets.error(503)):
            time.sleep(1)
        time.sleep(3)
        require_owned()


def test_an_owner_that_no_store_hears_is_not_replaced(place, store, monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 2.0)
    monkeypatch.setattr(lease, "EXPIRES", 6.0)

    def start():
        with exclusive(store.url, "--workdir"):
            pass

    with exclusive(store.url, "--workdir") as require_owned:
        with ThreadPoolExecutor() as pool:
            refused = pool.submit(start)
            time.sleep(0.3)
            with place.faulty(lambda method, path, body: buckets.error(503)):
                time.sleep(8)
            with pytest.raises(UserError, match="is in use"):
                refused.result()
        require_owned()


def test_a_folder_without_permission_is_refused_with_a_line(place, store):
    with (
        place.faulty(lambda method, path, body: buckets.error(403)),
        pytest.raises(UserError, match="the store refuses .*credentials"),
        exclusive(store.url, "--workdir"),
    ):
        pass
