"""Workdirs in object stores: a run works in a local folder, and a thread keeps the store's copy up to date.

Small files (config, metrics, TensorBoard, pictures, reports) are sent whole when they have changed. Folders with a
manifest (checkpoints and the export) are sent when they are complete, with their manifest last: without one, a folder
in a store is unfinished. When a run begins, it fetches the small files and the newest intact checkpoint.
"""

import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dino_jax.checkpoints.integrity import MANIFEST, damage
from dino_jax.errors import UserError, listed
from dino_jax.ownership import LOCK
from dino_jax.storage import Store, fetched, is_remote, local_folder

PERIOD = 15.0  # seconds between two looks for changed files
EXPORT, CHECKPOINTS = "export", "checkpoints"
COMPLETE = re.compile(rf"({EXPORT}|{CHECKPOINTS}/\d+(\.damaged)?)/")  # folders that are sent whole, before the file
STEP = re.compile(rf"{CHECKPOINTS}/(0|[1-9][0-9]*)")
RESULTS = (LOCK, "eval/", "tensorboard/")  # what is never read again, and may be large: features, earlier events
NOT_FETCHED = (*RESULTS, f"{CHECKPOINTS}/", f"{EXPORT}/")
NOT_SENT = re.compile(r"(^|/)\.|(\.tmp|\.previous|\.orbax-checkpoint-tmp)/$")  # what is being written
Covers = Callable[[Path, int], bool]


class Mirror:
    """The files of a workdir or an output folder, in `local`."""

    def __init__(self, local: Path):
        self.local = local

    def flush(self) -> None:
        """Returns when the store has all files that are complete. Raises UserError if it does not take them."""

    def on_writer(self, tree: Any) -> Any:
        """Returns a tree of arrays as this process has to give it to Orbax. All processes must call it."""
        return tree


@contextmanager
def mirrored(
    folder: str | Path,
    require_owned: Callable[[], None] | None = None,
    covers: Covers = lambda export, step: False,
) -> Iterator[Mirror]:
    """Yields the local side of a folder: the folder itself, or a temporary copy of one in a store.

    The copy begins with the store's small files, its export and its newest intact checkpoint. Process 0 sends what
    changes, also after an error in the block. All processes may call it; each has a copy of its own.

    Args:
        folder: a local path or a URL.
        require_owned: raises UserError if this process may no longer write (`lease.exclusive`). Without it, unfinished
            folders in the store are left alone, because another process may be sending them.
        covers: of an export's folder and a checkpoint's step, whether the export makes the checkpoint unnecessary.

    Raises UserError if the store cannot be used.
    """
    if not is_remote(folder):
        yield Mirror(Path(folder))
        return
    store = Store(str(folder))
    with local_folder(store.url) as local:
        mirror = _StoreMirror(store, local, require_owned)
        mirror.fetch(covers)
        with mirror.sending():
            yield mirror


def fetched_run(path: str | Path, covers: Covers) -> AbstractContextManager[Path]:
    """Yields a local copy of what `weights.load` reads of a folder: of a run, an export, or Hugging Face's.

    covers: see `mirrored`.
    """

    def fill(store: Store, local: Path) -> None:
        sizes = store.sizes()
        whole = "card.json" in sizes  # an export
        wanted = [name for name in sizes if whole or "/" not in name]
        store.download([name for name in wanted if not name.startswith(RESULTS)], local)
        _fetch_complete(store, local, sizes, covers)

    return fetched(path, fill)


class _StoreMirror(Mirror):
    """A mirror in a store."""

    def __init__(self, store: Store, local: Path, require_owned: Callable[[], None] | None):
        super().__init__(local)
        self._store, self._require_owned = store, require_owned
        self._sent: dict[str, tuple[int, int]] = {}  # small file -> its time and size
        self._complete: dict[str, str] = {}  # folder -> its manifest
        self._working, self._stop = threading.Lock(), threading.Event()

    def fetch(self, covers: Covers) -> None:
        """Fills the local folder."""
        sizes = self._store.sizes()
        self.local.mkdir(exist_ok=True)
        self._store.download([name for name in sizes if not name.startswith(NOT_FETCHED)], self.local)
        fetched = _fetch_complete(self._store, self.local, sizes, covers)
        self._complete = {name: _manifest(self.local / name) for name in fetched}
        self._sent = dict(self._small_files())
        if self._require_owned and jax.process_index() == 0:
            unfinished = {one[0] for one in map(STEP.match, sizes) if one and f"{one[0]}/{MANIFEST}" not in sizes}
            self._store.remove([name for name in sizes if _folder_of(name) in unfinished])

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Sends changes during the block and once more after it, on process 0."""
        if jax.process_index() > 0:
            yield
            return
        thread = threading.Thread(target=self._send_now_and_then, name="mirror", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            self._end(thread)
            try:
                self.flush()
            except UserError as error:  # the block's own error is more important
                print(f"not all files are in {self._store.url}: {error}", file=sys.stderr, flush=True)
            raise
        self._end(thread)
        self.flush()

    def flush(self) -> None:
        """See `Mirror.flush`. Other processes than 0 do nothing."""
        if jax.process_index() == 0:
            self._send()

    def on_writer(self, tree: Any) -> Any:
        """Returns NumPy arrays, which Orbax writes on process 0 alone, as the processes share no folder."""
        return tree if jax.process_count() == 1 else jax.tree.map(_whole, tree)

    def _end(self, thread: threading.Thread) -> None:
        self._stop.set()
        thread.join()

    def _send_now_and_then(self) -> None:
        while not self._stop.wait(PERIOD):
            try:
                self._send()
            except (UserError, OSError) as error:  # `flush` ends the run if it stays
                print(f"not all files are in {self._store.url}: {error}", file=sys.stderr, flush=True)

    def _send(self) -> None:
        with self._working:
            if self._require_owned:
                self._require_owned()
            # Listed first, so that the metrics up to a checkpoint are in the store before it counts as finished.
            complete = {name: _manifest(self.local / name) for name in self._local_folders()}
            self._send_small_files()
            for name, manifest in complete.items():
                if self._complete.get(name) != manifest:
                    self._send_folder(name, manifest)
            for name in [name for name in self._complete if name != EXPORT and not (self.local / name).is_dir()]:
                self._remove_folder(name)
                del self._complete[name]

    def _small_files(self) -> Iterator[tuple[str, tuple[int, int]]]:
        for folder, folders, files in os.walk(self.local):
            names = {one: (Path(folder) / one).relative_to(self.local).as_posix() for one in [*folders, *files]}
            unsent = [one for one in folders if NOT_SENT.search(f"{names[one]}/") or COMPLETE.match(f"{names[one]}/")]
            folders[:] = sorted(set(folders) - set(unsent))
            for file in sorted(files):
                if not NOT_SENT.search(names[file]):
                    with suppress(FileNotFoundError):  # removed in the meantime
                        stat = (Path(folder) / file).stat()
                        yield names[file], (stat.st_mtime_ns, stat.st_size)

    def _send_small_files(self) -> None:
        for name, state in self._small_files():
            if self._sent.get(name) != state:
                with suppress(FileNotFoundError):
                    self._store.write(name, (self.local / name).read_bytes())
                    self._sent[name] = state

    def _local_folders(self) -> list[str]:
        """Returns the folders that are sent whole. An empty one stands for a checkpoint that was not fetched."""
        paths = [self.local / EXPORT, *sorted((self.local / CHECKPOINTS).glob("*"))]
        names = [path.relative_to(self.local).as_posix() for path in paths if next(os.walk(path), ("", [], []))[1]]
        return [name for name in names if COMPLETE.fullmatch(f"{name}/")]

    def _send_folder(self, name: str, manifest: str) -> None:
        """Replaces a folder. It is unfinished until its manifest is there again."""
        paths = [path for path in (self.local / name).rglob("*") if path.is_file() and path.name != MANIFEST]
        files = {path.relative_to(self.local).as_posix(): path for path in paths}
        sizes = {file: path.stat().st_size for file, path in files.items()}
        self._remove_folder(name)
        self._store.upload(files)
        there = self._store.sizes(name)
        if changed := sorted(file for file, size in sizes.items() if there.get(file) != size):
            raise UserError(f"{self._store.url} does not hold what it was sent ({listed(changed)}): check the store")
        if manifest:
            self._store.write(f"{name}/{MANIFEST}", manifest.encode())
        self._complete[name] = manifest

    def _remove_folder(self, name: str) -> None:
        there = self._store.sizes(name)
        self._store.remove([file for file in there if file == f"{name}/{MANIFEST}"])
        self._store.remove([file for file in there if file != f"{name}/{MANIFEST}"])


def _fetch_complete(store: Store, local: Path, sizes: dict[str, int], covers: Covers) -> list[str]:
    """Fetches the export and the newest intact checkpoint, and returns the names of these folders.

    Newer checkpoints that are damaged are fetched too, to be reported and set aside. Older ones become empty folders,
    so that they count for `keep_last`.
    """
    finished = {name.removesuffix(f"/{MANIFEST}") for name in sizes if name.endswith(f"/{MANIFEST}")}
    fetched = []
    if EXPORT in finished:
        _fetch_folder(store, local, EXPORT, sizes)
        fetched.append(EXPORT)
    steps = sorted((int(one[1]) for one in map(STEP.fullmatch, finished) if one), reverse=True)
    if not steps or (fetched and covers(local / EXPORT, steps[0])):
        return fetched
    intact = False
    for step in steps:
        folder = f"{CHECKPOINTS}/{step}"
        (local / folder).mkdir(parents=True)
        if not intact:
            _fetch_folder(store, local, folder, sizes)
            intact = damage(local / folder) is None
        fetched.append(folder)
    return fetched


def _fetch_folder(store: Store, local: Path, folder: str, sizes: dict[str, int]) -> None:
    """Fetches a folder, and what differs from its manifest once more: an answer may have been cut off."""
    names = [name for name in sizes if _folder_of(name) == folder]
    store.download(names, local)
    if damage(local / folder):
        store.download(names, local)


def _folder_of(name: str) -> str:
    found = COMPLETE.match(name)
    return found[1] if found else ""


def _manifest(folder: Path) -> str:
    """Returns the text of a manifest; "" where it is missing or damaged beyond reading."""
    try:
        return (folder / MANIFEST).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _whole(x: Any) -> Any:
    if not isinstance(x, jax.Array):
        return x
    # A copy, because a CPU device may alias the host's memory, and the next step overwrites the state.
    return np.array(x if x.is_fully_replicated else multihost_utils.process_allgather(x, tiled=True))
