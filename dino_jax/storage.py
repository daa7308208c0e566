"""Object stores (gs://, s3:// and whatever fsspec knows): whole objects, and patience with a store that refuses.

A store has no folders, no renames and no locks, but each object is replaced as a whole. Everything that this package
keeps in a store goes through a `Store`. Libraries that write files work in a local folder, see `checkpoints.mirrored`.
"""

import errno
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from dino_jax import atomic
from dino_jax.errors import UserError, missing_extras
from dino_jax.ownership import owned
from dino_jax.progress import unless_done

T = TypeVar("T")
LIBRARIES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs"}
PATIENCE = 600.0  # seconds for which a store that refuses is asked again
LONGEST_WAIT = 30.0  # seconds between two attempts
SLOW = 10.0  # seconds without an answer after which a line says so
BLOCK = 8 * 2**20  # bytes that are read ahead of an open object
# What objects have that changes with their content, in several stores.
VERSION_KEYS = ("generation", "ETag", "etag", "md5Hash", "mtime", "LastModified", "updated")
AT_ONCE = 8  # objects that are sent or fetched at the same time
NO_RIGHTS = (400, 401, 403)  # HTTP codes that no repetition changes
NO_CREDENTIALS = ("DefaultCredentialsError", "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")
# Set when the process ends, before threads are joined: those that read ahead must not keep it alive. ThreadPoolExecutor
# is told in the same way, and `atexit` comes later.
ENDING = threading.Event()
threading._register_atexit(ENDING.set)  # type: ignore[attr-defined]
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def is_remote(path: str | Path) -> bool:
    """Returns whether a path names an object store, such as gs://bucket/run."""
    return "://" in str(path)


class Store:
    """The objects whose names begin with a URL. All names are relative to it.

    An operation that fails is repeated for PATIENCE seconds, with a line on stderr for each attempt. Raises UserError,
    which names the URL, if the store stays away, the bucket does not exist, or this machine has no right to use it.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        with missing_extras():
            scheme = self.url.partition("://")[0]
            if scheme in LIBRARIES:
                import_module(LIBRARIES[scheme])
        from fsspec.core import url_to_fs

        try:
            # Listings are never cached, because other processes change the store.
            self._fs, root = url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise UserError(f"{url} cannot be used ({error}): give a local path, gs:// or s3://") from error
        self._root = root.rstrip("/")

    def read(self, name: str) -> bytes | None:
        """Returns an object, or None if there is none."""
        return self._patiently(lambda: _or_none(lambda: self._fs.cat_file(self._path(name))))

    def read_part(self, name: str, start: int, stop: int) -> bytes:
        """Returns the bytes of an object from `start` to `stop`. Raises FileNotFoundError if there is none."""
        return self._patiently(lambda: self._fs.cat_file(self._path(name), start=start, end=stop))

    def open(self, name: str) -> Any:
        """Opens an object to read and seek in. Raises FileNotFoundError if there is none."""
        return self._patiently(lambda: self._fs.open(self._path(name), "rb", block_size=BLOCK))

    def status(self, name: str) -> tuple[int, str]:
        """Returns an object's size and what changes with its content. Raises FileNotFoundError if there is none."""
        found = self._patiently(lambda: self._fs.info(self._path(name)))
        if found["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return found["size"], str(next((found[key] for key in VERSION_KEYS if found.get(key)), ""))

    def matching(self, pattern: str) -> list[str]:
        """Returns the names of the objects that match a pattern with *, sorted."""
        found = self._patiently(lambda: self._fs.glob(self._path(pattern)))
        return sorted(name[len(self._root) + 1 :] for name in found)

    def entries(self) -> tuple[dict[str, int], list[str]]:
        """Returns the objects right below the URL, name -> bytes, and the names of the folders there."""
        found = self._patiently(lambda: _or_none(lambda: self._fs.ls(self._root, detail=True))) or []
        start = len(self._root) + 1
        named = [(one["name"].rstrip("/")[start:], one) for one in found]
        files = {name: one["size"] for name, one in named if name and one["type"] == "file"}
        return files, sorted(name for name, one in named if name and one["type"] == "directory")

    def download_to(self, name: str, path: Path) -> None:
        """Fetches an object. Raises FileNotFoundError if there is none, UserError if the disk is full."""
        with atomic.disk_errors(path, "make room there, or set XDG_CACHE_HOME to a larger disk"):
            self._patiently(lambda: self._fs.get_file(self._path(name), str(path)))

    def write(self, name: str, data: bytes) -> None:
        """Creates or replaces an object."""
        self._patiently(lambda: self._fs.pipe_file(self._path(name), data), writes=True)

    def create(self, name: str, data: bytes) -> bool:
        """Creates an object. Returns False if there is one already, as far as the store checks that."""

        def attempt() -> bool:
            try:
                self._fs.pipe_file(self._path(name), data, mode="create")
            except FileExistsError:
                return False
            return True

        return self._patiently(attempt, writes=True)

    def is_file(self) -> bool:
        """Returns whether the URL itself names an object."""
        return bool(self._patiently(lambda: self._fs.isfile(self._root)))

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Returns name -> bytes of all objects, or of those in a folder."""
        found = self._patiently(lambda: _or_none(lambda: self._fs.find(self._path(folder), detail=True))) or {}
        start, inside = len(self._root) + 1, f"{self._path(folder)}/"
        sizes = {name: one["size"] for name, one in sorted(found.items()) if one["type"] == "file"}
        # An object may have any name. The copies of those that are given away stay in their folder.
        return {
            name[start:]: size
            for name, size in sizes.items()
            if name.startswith(inside) and ".." not in name.split("/")
        }

    def upload(self, files: Mapping[str, Path]) -> None:
        """Sends files, name -> path."""
        self._each(files, lambda name: self._fs.put_file(str(files[name]), self._path(name)), writes=True)

    def download(self, names: Iterable[str], folder: Path) -> None:
        """Fetches objects to `folder`/name. Those that are gone in the meantime are left out."""
        names = list(names)
        with atomic.disk_errors(folder, "make room there, or set TMPDIR to a larger disk"):
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
            self._each(names, lambda name: _or_none(lambda: self._fs.get_file(self._path(name), str(folder / name))))

    def remove(self, names: Iterable[str]) -> None:
        """Removes objects; those that are gone already are no error."""
        self._each(names, lambda name: _or_none(lambda: self._fs.rm_file(self._path(name))))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _each(self, names: Iterable[str], act: Callable[[str], Any], writes: bool = False) -> None:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda name: self._patiently(partial(act, name), writes), names))

    def _patiently(self, act: Callable[[], T], writes: bool = False) -> T:
        began, wait = time.monotonic(), 1.0
        while True:
            try:
                waiting = f"{self.url}: no answer of the store for {SLOW:.0f} s: waiting for it"
                with unless_done(SLOW, _say, waiting):
                    return act()
            except Exception as error:
                reason = " ".join(f"{error}".split())[:200] or type(error).__name__
                if isinstance(error, OSError) and error.errno in DISK_FULL:
                    raise
                if isinstance(error, FileNotFoundError) and (not writes or error.filename):  # of a local file
                    raise
                if isinstance(error, FileNotFoundError):
                    raise UserError(f"{self.url}: no such bucket: create it, or correct the path") from error
                if _is_final(error):
                    raise UserError(
                        f"{self.url}: the store refuses ({reason}): check this machine's credentials and their rights "
                        "on the bucket"
                    ) from error
                if time.monotonic() - began > PATIENCE:
                    raise UserError(
                        f"{self.url}: the store has refused for {PATIENCE / 60:.0f} minutes ({reason}): check it, then "
                        "start the same command again"
                    ) from error
            _say(f"{self.url}: the store refuses ({reason}): next attempt in {wait:.0f} s")
            if ENDING.wait(wait):
                raise UserError(f"{self.url}: the store still refuses ({reason}) as this process ends")
            wait = min(2 * wait, LONGEST_WAIT)


@contextmanager
def fetched(path: str | Path, fill: Callable[[Store, Path], None] | None = None) -> Iterator[Path]:
    """Yields a local copy of a file or folder in a store; a local path as it is.

    What does not exist in the store does not exist locally. A UserError of the block names the URL, not the copy.

    fill: fetches what is wanted of a folder to a local path; by default all.
    """
    if not is_remote(path):
        yield Path(path)
        return
    store = Store(str(path))
    with local_folder(store.url) as local:
        if store.is_file():
            folder, _, name = store.url.rpartition("/")
            Store(folder).download([name], local.parent)
        elif fill:
            fill(store, local)
        else:
            store.download(store.sizes(), local)
        yield local


def top_files(store: Store, local: Path) -> None:
    """Fetches the files right in a folder: a `fill` of `fetched`."""
    store.download([name for name in store.sizes() if "/" not in name], local)


@contextmanager
def local_folder(url: str) -> Iterator[Path]:
    """Yields a path in the folder for temporary files that ends like the URL; nothing is there.

    The files in it are removed after the block. Those of a process that was killed are removed by the next one. A
    UserError of the block names the URL instead of the path.
    """
    prefix = f"dino_jax-{os.getuid()}-"
    for old in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        try:
            with owned(old, "TMPDIR"):
                shutil.rmtree(old, ignore_errors=True)
        except UserError:
            pass  # in use
    root = Path(tempfile.mkdtemp(prefix=prefix))
    local = root.joinpath(*PurePosixPath(url.replace("://", "/")).parts)
    try:
        with owned(root, "TMPDIR"):
            local.parent.mkdir(parents=True)
            yield local
    except UserError as error:
        error.args = (str(error).replace(str(local), url),)
        raise
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _or_none(act: Callable[[], T]) -> T | None:
    try:
        return act()
    except FileNotFoundError:
        return None


def _is_final(error: Exception) -> bool:
    """Returns whether an error stays when the request is repeated."""
    code = str(getattr(error, "code", ""))
    denied = isinstance(error, PermissionError) or str(error).startswith("Forbidden")
    return denied or (code.isdigit() and int(code) in NO_RIGHTS) or type(error).__name__ in NO_CREDENTIALS


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
