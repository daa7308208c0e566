"""One writer for each output folder: a second process that would write there is refused at once."""

import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path

from dino_jax import atomic
from dino_jax.errors import UserError

LOCK = ".owner"


@contextmanager
def owned(folder: str | Path, knob: str) -> Iterator[None]:
    """Creates a folder and owns it during the block.

    The owner holds a lock on the file `.owner`, which says who it is. The system frees the lock however the process
    ends. File systems that have no locks are not protected.

    Raises UserError if another process owns the folder, or it cannot be written. knob: the flag that names the folder.
    """
    with atomic.disk_errors(f"to {knob}={folder}", "give another folder"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = _open(Path(folder) / LOCK)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = _owner(file.read())
            raise UserError(f"{folder} is in use by {owner}: wait until it ends, or give another {knob}") from error
        except OSError:  # no locks there
            yield
            return
        if not _is_current(file, Path(folder) / LOCK):  # the last owner removed it in the meantime
            raise UserError(f"{folder} was in use until just now: start again, or give another {knob}")
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        json.dump({"host": platform.node(), "pid": os.getpid(), "since": since}, file)
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):
                (Path(folder) / LOCK).unlink()


def _open(path: Path) -> TextIOWrapper:
    """Opens the file to read from its start and to append, creating it if it is missing."""
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (open as long as the folder is owned)
    file.seek(0)
    return file


def _is_current(file: TextIOWrapper, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _owner(text: str) -> str:
    try:
        owner = json.loads(text)
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
