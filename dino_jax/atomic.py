"""Files and folders that are there whole or not at all, and a disk that refuses as one line.

What is written goes to a sibling first and is renamed when it is complete, so that whoever is killed, or finds the disk
full, leaves what was there before.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dino_jax.errors import UserError

WAY_OUT = "make room or give another path"
TENSORSTORE_ERRNO = re.compile(r"\[os_error_code='(\d+)'\]")  # Orbax's writer knows of no OSError


@contextmanager
def disk_errors(path: str | Path, way_out: str = WAY_OUT) -> Iterator[None]:
    """Turns a full disk, a missing permission and the like into one line that names `path` and the way out.

    Raises UserError for any OSError of its block, and for what Orbax makes of one.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise UserError(f"can't write {path} ({reason}): {way_out}") from error


@contextmanager
def file(path: str | Path, way_out: str = WAY_OUT) -> Iterator[Path]:
    """A path beside `path` for the block to write a file to. At its end that is flushed to the disk and becomes `path`.

    Folders above are made. At any error `path` stays as it was; raises UserError like `disk_errors`.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.unfinished")  # others may write the same file at the same time
    try:
        with disk_errors(path, way_out):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield beside
            with open(beside, "rb") as written:
                os.fsync(written.fileno())
            os.replace(beside, path)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


@contextmanager
def folder(path: str | Path, way_out: str = WAY_OUT) -> Iterator[Path]:
    """An empty folder beside `path` for the block to fill, which takes the place of `path` at its end.

    At any error `path` stays as it was; raises UserError like `disk_errors`.
    """
    path = Path(path)
    try:
        with disk_errors(path, way_out):
            yield begin_folder(path)
            finish_folder(path)
    finally:
        shutil.rmtree(unfinished_folder(path), ignore_errors=True)


def unfinished_folder(path: Path) -> Path:
    """Where a folder is while it is being written, by one process or, between `begin_` and `finish_folder`, by many."""
    return path.with_name(f"{path.name}.tmp")


def begin_folder(path: Path) -> Path:
    """Makes `unfinished_folder(path)` anew, with the folders above it."""
    beside = unfinished_folder(path)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    return beside


def finish_folder(path: Path) -> None:
    """Renames `unfinished_folder(path)` to `path`; what was there is `path`.previous for a moment, then gone."""
    previous = path.with_name(f"{path.name}.previous")
    if path.exists():
        shutil.rmtree(previous, ignore_errors=True)
        path.rename(previous)
    unfinished_folder(path).rename(path)
    shutil.rmtree(previous, ignore_errors=True)


def _reason(error: OSError | ValueError) -> str | None:
    """What the system says, or None where it is not the system that complains."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    found = TENSORSTORE_ERRNO.search(str(error))
    return os.strerror(int(found[1])) if found else None
