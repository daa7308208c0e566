"""Files of sources, local or in an object store: the operations that sources need."""

import glob
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from dino_jax import atomic
from dino_jax.errors import UserError
from dino_jax.progress import progress
from dino_jax.storage import Store, is_remote

BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
MAGIC = re.compile(r"[*?\[]")
SPARE = 0.1  # share of the disk that copies of files leave free


class Status(NamedTuple):
    """What tells that a file has changed."""

    size: int  # bytes
    changed: int | str  # time of the last change, or what a store has instead


def matching_files(pattern: str, what: str) -> list[str]:
    """Expands {000..999}, * and commas. Raises UserError, which begins with `what`, if a file is missing.

    Of files in a store, only the matches of * are known to be there.
    """
    paths = []
    for part in pattern.split(","):
        for name in expand_braces(os.path.expanduser(part)):
            if is_remote(name):
                found = matching_objects(name) if glob.has_magic(name) else [name]
            else:
                found = sorted(glob.glob(name)) if glob.has_magic(name) else [name] * os.path.isfile(name)
            if not found:
                raise UserError(f"{what}: no file {name}")
            paths += found
    return paths


def expand_braces(pattern: str) -> list[str]:
    """Returns the names that a pattern with {first..last} stands for: {008..010} gives 008, 009, 010."""
    found = BRACES.search(pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    numbers = range(int(first), int(last) + 1)
    return [
        name
        for number in numbers
        for name in expand_braces(f"{pattern[: found.start()]}{number:0{len(first)}}{pattern[found.end() :]}")
    ]


def matching_objects(pattern: str) -> list[str]:
    """Returns the URLs of the objects that match a pattern with *, sorted."""
    folder = MAGIC.split(pattern)[0].rpartition("/")[0]
    return [f"{folder}/{name}" for name in Store(folder).matching(pattern.removeprefix(f"{folder}/"))]


def status(path: str) -> Status:
    """Returns size and state of a file. Raises OSError if it is not there."""
    if is_remote(path):
        store, name = _located(path)
        return Status(*store.status(name))
    found = os.stat(path)
    return Status(found.st_size, found.st_mtime_ns)


def read_part(path: str, offset: int, size: int) -> bytes:
    """Returns at most `size` bytes of a file from `offset` on. Raises OSError if it is not there."""
    if is_remote(path):
        store, name = _located(path)
        return store.read_part(name, offset, offset + size)
    with open(path, "rb", buffering=0) as file:
        # At most what is there: pread first allocates as much as it is asked for.
        return os.pread(file.fileno(), min(size, os.fstat(file.fileno()).st_size), offset)


def read(path: str) -> bytes | None:
    """Returns the content of a file, None if it is not there."""
    if is_remote(path):
        store, name = _located(path)
        return store.read(name)
    return Path(path).read_bytes() if os.path.exists(path) else None


def write(path: str, content: bytes) -> None:
    """Creates or replaces a file. Raises UserError if it cannot be written."""
    if is_remote(path):
        store, name = _located(path)
        store.write(name, content)
    else:
        with atomic.file(path) as unfinished:
            unfinished.write_bytes(content)


@contextmanager
def written(path: str) -> Iterator[Path]:
    """Yields a local path to write to. After the block, the file there appears at `path` as a whole.

    Raises UserError if it cannot be written.
    """
    if not is_remote(path):
        with atomic.file(path) as unfinished:
            yield unfinished
        return
    store, name = _located(path)
    with tempfile.TemporaryDirectory(prefix="dino_jax-") as folder:
        local = Path(folder) / name
        with atomic.disk_errors(local, "make room there, or set TMPDIR to a larger disk"):
            yield local
        store.upload({name: local})


def sizes(folder: str) -> dict[str, int]:
    """Returns name -> bytes of the files right in a folder; of one that is not there, none."""
    if is_remote(folder):
        return Store(folder).entries()[0]
    if not os.path.isdir(folder):
        return {}
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}


def remove_files(folder: str) -> None:
    """Removes a folder of files, and these."""
    if is_remote(folder):
        Store(folder).remove(sizes(folder))
    else:
        shutil.rmtree(folder, ignore_errors=True)


def opened(path: str) -> Any:
    """Opens a file to read and seek in, as bytes. Raises OSError if it is not there."""
    if is_remote(path):
        store, name = _located(path)
        return store.open(name)
    return open(path, "rb")


def cache_folder(kind: str) -> Path:
    """Returns the folder in the user's cache for what sources keep there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dino_jax" / kind


def local_copies(paths: list[str], what: str) -> list[str]:
    """Returns local paths of files: copies in the user's cache of those in a store, with progress.

    A copy is made again when the object has changed. Raises UserError, which begins with `what`, if there is no room on
    the disk, or an object is not there.
    """
    if not any(map(is_remote, paths)):
        return paths
    copies, missing = {}, {}
    folder = cache_folder("files")
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        try:
            size, changed = status(path)
        except OSError as error:
            raise UserError(f"{what}: {path} cannot be read: {error.strerror or error}") from error
        key = hashlib.sha256(f"{path} {size} {changed}".encode()).hexdigest()[:16]
        copies[path] = folder / f"{key}-{path.rpartition('/')[2]}"
        if not copies[path].is_file():
            missing[path] = size
    disk = shutil.disk_usage(folder)
    if sum(missing.values()) > disk.free - SPARE * disk.total:
        raise UserError(
            f"{what}: its files have {sum(missing.values()) / 1e9:,.1f} GB, and the disk of {folder} has no room for "
            "copies of them: set XDG_CACHE_HOME to a larger one"
        )
    for path in progress(iter(missing), len(missing), "copying", "files"):
        _copy(path, copies[path])
    return [str(copies[path]) for path in paths]


def _copy(path: str, target: Path) -> None:
    store, name = _located(path)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        store.download_to(name, unfinished)
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def _located(path: str) -> tuple[Store, str]:
    folder, _, name = path.rpartition("/")
    return _store(folder), name


@lru_cache(maxsize=256)
def _store(folder: str) -> Store:
    return Store(folder)
