"""Image files in folders."""

import os
import re
from collections import Counter, deque

import numpy as np

from dino_jax.data.sources.base import KNOB, Example, Source
from dino_jax.errors import UserError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # line ends, bytes that are not UTF-8


class FolderSource(Source):
    """Image files under a folder, at any depth, in the order of their relative paths.

    If every image is in some subfolder, the first-level folders are the classes, numbered in sorted order
    (`class_names`); otherwise there are no labels. Links are followed, but each real folder is visited once; a broken
    link stays in the list as an image that cannot be read. Names that start with a dot are ignored (macOS and editors
    create such files, which only look like images), and so is everything that is neither a file nor a folder.
    """

    syntax = "folder:PATH"

    def __init__(self, root: str):
        self.root = root
        self.paths = _image_paths(root)
        folders = [path.partition(os.sep)[0] if os.sep in path else "" for path in self.paths]
        self.class_names = sorted(set(folders)) if all(folders) else []
        self.num_classes = len(self.class_names)
        number = {name: k for k, name in enumerate(self.class_names)}
        self.labels = np.array([number.get(folder, -1) for folder in folders], np.int32)

    @classmethod
    def from_spec(cls, rest: str) -> Source | None:
        """PATH, which may begin with ~."""
        return cls(os.path.expanduser(rest)) if rest else None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Example:
        with open(os.path.join(self.root, self.paths[i]), "rb") as file:
            return Example(file.read(), self.label(i))

    def label(self, i: int) -> int:
        """The number of the image's class folder, or -1."""
        return int(self.labels[i])

    def name(self, i: int) -> str:
        """The path relative to the folder on a single line, unprintable characters escaped as in a Python string."""
        return UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], self.paths[i])

    def identity(self, i: int) -> str:
        """Name, label, size and modification time."""
        try:
            status = os.stat(os.path.join(self.root, self.paths[i]))
        except OSError:
            return f"{self.name(i)} is not there"
        return f"{self.name(i)} {self.label(i)} {status.st_size} {status.st_mtime_ns}"


def _image_paths(root: str) -> list[str]:
    """Paths of all images under root, relative to it, sorted."""
    if not os.path.isdir(root):
        raise UserError(f"{KNOB}=folder:{root}: {'a file, not a folder' if os.path.exists(root) else 'no such folder'}")
    paths: list[str] = []
    others: Counter[str] = Counter()
    seen = set()
    # Breadth first and real folders before links: a folder keeps its own place when links point to it as well.
    pending = deque([""])
    while pending:
        folder = pending.popleft()
        try:
            status = os.stat(os.path.join(root, folder))
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(os.path.join(root, folder)) as found:
                entries = sorted(found, key=lambda entry: (entry.is_symlink(), entry.name))
        except OSError as error:
            raise UserError(f"{KNOB}=folder:{root}: cannot read {folder or root}: {error.strerror}") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            extension = os.path.splitext(entry.name)[1].lower()
            if _is_folder(entry):
                pending.append(os.path.join(folder, entry.name))
            elif extension not in IMAGE_EXTENSIONS:
                others[extension or "no extension"] += 1
            elif _is_file(entry):
                paths.append(os.path.join(folder, entry.name))
    if not paths:
        listing = ", ".join(f"{count} x {extension}" for extension, count in others.most_common(4)) or "nothing"
        raise UserError(f"{KNOB}=folder:{root}: no images ({' '.join(IMAGE_EXTENSIONS)}) there, found {listing}")
    return sorted(paths)


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether this is a file, a link to a file, or a broken link."""
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:  # a link to itself
        return True


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False
