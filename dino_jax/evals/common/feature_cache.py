"""Features kept between runs: a run that was cut off goes on where it stopped, a second one computes nothing."""

import hashlib
import json
import sys
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from dino_jax import atomic
from dino_jax.weights.backbone import Backbone

WAY_OUT = "make room, or set --out to another folder"


@dataclass
class Kept:
    """A folder of parts, each a file of arrays under a digest of all that they were computed from.

    Nothing is ever stale: where something differs, the digest does, and the part is computed and kept beside the other.
    """

    folder: Path  # safe to remove: what is missing is computed again
    key: str  # what all parts depend on: see `fingerprint`
    computed: int = 0  # images that were not there

    def path(self, names: Sequence[str]) -> Path:
        """Where a part is kept, given what identifies each of its images."""
        digest = hashlib.sha256("\n".join([self.key, *names]).encode()).hexdigest()[:32]
        return self.folder / f"{digest}.npz"

    def load(self, names: Sequence[str]) -> dict[str, np.ndarray] | None:
        """The arrays of a part; None where there is none, or (with a line on stderr) a damaged one."""
        path = self.path(names)
        if not path.is_file():
            return None
        try:
            with np.load(path) as stored:  # checks the sum that a zip file has of each array
                return dict(stored)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            print(f"{path} is damaged ({error}): its features are computed again", file=sys.stderr)
            return None

    def save(self, names: Sequence[str], **arrays: np.ndarray) -> None:
        """Keeps the arrays of a part, whole or not at all. Process 0 writes; UserError where it can't."""
        if jax.process_index() > 0:
            return
        with atomic.file(self.path(names), WAY_OUT) as unfinished, unfinished.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]


def fingerprint(backbone: Backbone, *settings) -> str:
    """Changes with the backbone's weights, its card and the settings (anything that JSON can hold)."""
    digest = hashlib.sha256(json.dumps([backbone.card, *settings], sort_keys=True).encode())
    for leaf in jax.tree.leaves(backbone.variables):
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()


def say_found(what: str, images: int, total: int, kept: Kept) -> None:
    """On stderr, how many of the images' features are there already; nothing if none are."""
    if images:
        some = "" if images == total else f" of {total:,}"
        print(
            f"{what}: features of {images:,}{some} images from {kept.folder}: remove it to compute them again",
            file=sys.stderr,
        )
