"""Atomic writes: a file or folder is replaced when the new one is complete; disk errors become one line.

New content is written beside the target and renamed when complete. A process that is killed or finds the disk full
leaves the old content in place.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from PIL.Image import Image, registered_extensions

from dino_jax.errors import UserError

WAY_OUT = "make room or give another path"
TENSORSTORE_ERRNO = re.compile(r"\[os_error_code='(\d+)'\]")  # Orbax raises ValueError, not OSError


@contextmanager
def disk_errors(path: str | Path, way_out: str = WAY_OUT) -> Iterator[None]:
    """Turns a full disk, a missing permission and the like into one line that names `path` and the way out.

    Raises UserError if the block raises OSError or its equivalent in Orbax.
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
    """Yields a temporary path beside `path`. After the block, the file there is flushed to disk and renamed to `path`.

    Creates parent folders. On any error `path` stays unchanged. Raises UserError like `disk_errors`.
    """
    path = Path(path)
    # Others may write the same file, also on machines whose processes have the same numbers.
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.unfinished")
    try:
        with disk_errors(path, way_out):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield unfinished
            with open(unfinished, "rb") as written:
                os.fsync(written.fileno())
            os.replace(unfinished, path)
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Writes indented JSON to `path`. Raises UserError like `disk_errors`."""
    with file(path) as unfinished:
        unfinished.write_text(to_json(value), encoding="utf-8")


def rewrite_json(path: Path, value: Any) -> None:
    """Like `write_json`, for a file that one process rewrites all the time: it does not wait for the disk.

    A kill leaves at most one unfinished file beside it, which the next rewrite takes over.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    with disk_errors(path):
        unfinished.write_text(to_json(value), encoding="utf-8")
        os.replace(unfinished, path)


def write_picture(path: str | Path, picture: Image) -> None:
    """Writes a Pillow image, in the format of the path's suffix. Raises UserError like `disk_errors`."""
    with file(path) as unfinished:
        picture.save(unfinished, registered_extensions()[Path(path).suffix.lower()])


def to_json(value: Any) -> str:
    """Returns the text that `write_json` writes."""
    return json.dumps(value, indent=2) + "\n"


@contextmanager
def folder(path: str | Path, way_out: str = WAY_OUT) -> Iterator[Path]:
    """Yields an empty folder beside `path` for the block to fill, which then replaces `path`.

    On any error `path` stays unchanged. Raises UserError like `disk_errors`.
    """
    path = Path(path)
    try:
        with disk_errors(path, way_out):
            yield begin_folder(path)
            finish_folder(path)
    finally:
        shutil.rmtree(unfinished_folder(path), ignore_errors=True)


def unfinished_folder(path: Path) -> Path:
    """Returns the path of a folder while one process, or many between `begin_folder` and `finish_folder`, write it."""
    return path.with_name(f"{path.name}.tmp")


def begin_folder(path: Path) -> Path:
    """Creates `unfinished_folder(path)`, empty, and its parent folders."""
    unfinished = unfinished_folder(path)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    return unfinished


def finish_folder(path: Path) -> None:
    """Renames `unfinished_folder(path)` to `path`. The old folder is `path`.previous until it is deleted."""
    previous = path.with_name(f"{path.name}.previous")
    if path.exists():
        shutil.rmtree(previous, ignore_errors=True)
        path.rename(previous)
    unfinished_folder(path).rename(path)
    shutil.rmtree(previous, ignore_errors=True)


def _reason(error: OSError | ValueError) -> str | None:
    """Returns the message of the operating system, or None if the error has another cause."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    found = TENSORSTORE_ERRNO.search(str(error))
    return os.strerror(int(found[1])) if found else None
