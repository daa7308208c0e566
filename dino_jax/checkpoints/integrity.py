"""Manifests with the SHA-256 of every file of a checkpoint or an export, and verification against them."""

import hashlib
import json
from pathlib import Path

from dino_jax import atomic

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Writes `folder/manifest.json`: relative path -> SHA-256 of the card and of each file in folder's subfolders."""
    files = sorted(path for pattern in ("card.json", "*/**/*") for path in folder.glob(pattern) if path.is_file())
    atomic.write_json(folder / MANIFEST, {path.relative_to(folder).as_posix(): _sha256(path) for path in files})


def damage(folder: Path) -> str | None:
    """Returns what is wrong with a folder's files according to its manifest, or None if they are intact.

    This check is needed because Orbax restores flipped bits without an error. Files that were added to the manifest's
    subfolders also count as damage, because Orbax reads some files by their names. Hidden files, which file managers
    and NFS create, are ignored.
    """
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        if not manifest or text != atomic.to_json(manifest):  # differs from what we write, for example truncated
            return f"{MANIFEST} has changed"
        for name, expected in manifest.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if _sha256(path) != expected:
                return f"{name} has changed"
        for subfolder in sorted({name.split("/")[0] for name in manifest if "/" in name}):
            for path in sorted((folder / subfolder).rglob("*")):
                name = path.relative_to(folder).as_posix()
                if path.is_file() and not path.name.startswith(".") and name not in manifest:
                    return f"{name} was added"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"{getattr(error, 'filename', None) or MANIFEST} is unreadable"
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
