"""Cache of features on disk: an interrupted run continues where it stopped, and a second run computes nothing."""

import hashlib
import json
import sys
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dino_jax import atomic
from dino_jax.distributed.processes import on_first
from dino_jax.weights.backbone import Backbone

WAY_OUT = "make room, or set --out to another folder"


@dataclass
class FeatureCache:
    """A folder of parts. Each part is a file of arrays, named by a digest of everything they were computed from.

    Entries are never stale: if any input differs, so does the digest, and the part is computed and stored beside the
    old one.
    """

    folder: Path  # safe to delete: missing parts are computed again
    key: str  # digest of what all parts depend on, see `fingerprint`
    computed: int = 0  # number of images that were not in the cache

    def path(self, names: Sequence[str]) -> Path:
        """Returns the file of a part, given a line for each of its images that identifies it."""
        digest = hashlib.sha256("\n".join([self.key, *names]).encode()).hexdigest()[:32]
        return self.folder / f"{digest}.npz"

    def load(self, names: Sequence[str]) -> dict[str, np.ndarray] | None:
        """Returns the arrays of a part, or None if it is missing or (with a line on stderr) damaged.

        Process 0 reads them, and sends them to the others.
        """
        return on_first(lambda: self.read(names))

    def read(self, names: Sequence[str]) -> dict[str, np.ndarray] | None:
        """`load` on this process alone."""
        path = self.path(names)
        if not path.is_file():
            return None
        try:
            with np.load(path) as stored:  # verifies the zip file's checksum of each array
                return dict(stored)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            print(f"{path} is damaged ({error}): it is computed again", file=sys.stderr)
            return None

    def save(self, names: Sequence[str], **arrays: np.ndarray) -> None:
        """Writes the arrays of a part atomically, on process 0. Raises UserError if the disk refuses."""
        if jax.process_index() > 0:
            return
        with atomic.file(self.path(names), WAY_OUT) as unfinished, unfinished.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]


def fingerprint(backbone: Backbone, *settings: Any) -> str:
    """Returns a digest of the backbone's weights, its card and the settings (anything that JSON can hold)."""
    digest = hashlib.sha256(json.dumps([backbone.card, *settings], sort_keys=True).encode())
    for leaf in jax.tree.leaves(backbone.variables):
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()


def report_cached(what: str, images: int, total: int, cache: FeatureCache) -> None:
    """Prints to stderr how many of the images have cached features; nothing if none has."""
    if images:
        some = "" if images == total else f" of {total:,}"
        print(
            f"{what}: features of {images:,}{some} images from {cache.folder}: remove it to compute them again",
            file=sys.stderr,
        )
