"""Image files in folders."""

import errno
import os
import re
import stat
import sys
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dino_jax.data.sources.base import KNOB, Example, Source
from dino_jax.errors import UserError
from dino_jax.progress import progress
from dino_jax.storage import Store, is_remote

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".dcm")
ARRAY_EXTENSIONS = (".npy", ".npz")
SYSTEM_FOLDERS = ("@eaDir", "lost+found", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "#recycle")
MAX_FILE = 512 * 2**20  # bytes; larger files are replaced like damaged ones, so that one cannot fill the memory
LISTERS = 8  # folders of a store that are listed at a time
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # line ends, bytes that are not UTF-8


class FolderSource(Source):
    """Image files under a folder, at any depth, in the order of their relative paths.

    If every image is in some subfolder, the first-level folders are the classes, numbered in sorted order
    (`class_names`); otherwise there are no labels. Links are followed, but each real folder is visited once; a broken
    link stays in the list as an image that cannot be read. `is_image` and `is_ignored` say which names count; a line on
    stderr tells how many files were passed over.
    """

    syntax = "folder:PATH"

    def __init__(self, root: str):
        self.root = root
        self.paths = image_paths(root, f"{KNOB}=folder:{root}")
        self.class_names, self.labels = class_folders(self.paths, os.sep)
        self.num_classes = len(self.class_names)

    @classmethod
    def from_spec(cls, rest: str) -> Source | None:
        """PATH, which may begin with ~, or be in a store."""
        if is_remote(rest):
            return StoreFolderSource(rest)
        return cls(os.path.expanduser(rest)) if rest else None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Example:
        return Example(read_file(os.path.join(self.root, self.paths[i])), self.label(i))

    def label(self, i: int) -> int:
        """The number of the image's class folder, or -1."""
        return int(self.labels[i])

    def name(self, i: int) -> str:
        """The path relative to the folder on a single line, unprintable characters escaped as in a Python string."""
        return printable(self.paths[i])

    def identity(self, i: int) -> str:
        """Name, label, size and modification time."""
        try:
            status = os.stat(os.path.join(self.root, self.paths[i]))
        except OSError:
            return f"{self.name(i)} is not there"
        return f"{self.name(i)} {self.label(i)} {status.st_size} {status.st_mtime_ns}"


class StoreFolderSource(FolderSource):
    """Image objects below a URL, in the order of their names, with the classes and rules of `FolderSource`."""

    def __init__(self, url: str):
        self.root, self.store = url, Store(url)
        files, folders = self.store.entries()
        kept = [folder for folder in folders if not is_ignored(folder)]
        with ThreadPoolExecutor(LISTERS) as pool:
            for found in progress(pool.map(self.store.sizes, kept), len(kept), "listing", "folders"):
                files |= found
        names = [name for name in files if not any(map(is_ignored, name.split("/")))]
        self.paths = sorted(images_of(names))
        if not self.paths:
            raise UserError(f"{KNOB}=folder:{url}: no images among its {len(files):,} objects")
        self.sizes = [files[path] for path in self.paths]
        self.class_names, self.labels = class_folders(self.paths, "/")
        self.num_classes = len(self.class_names)

    def __getitem__(self, i: int) -> Example:
        check_file_size(self.sizes[i])
        content = self.store.read(self.paths[i])
        if content is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.paths[i])
        return Example(content, self.label(i))

    def identity(self, i: int) -> str:
        """Name, label and size."""
        return f"{self.name(i)} {self.label(i)} {self.sizes[i]}"


def class_folders(paths: list[str], separator: str) -> tuple[list[str], np.ndarray]:
    """Returns the names of the first-level folders, sorted, and each path's number among them, int32 [n].

    If an image is in none of them, there are no labels: no names, and numbers of -1.
    """
    folders = [path.partition(separator)[0] if separator in path else "" for path in paths]
    names = sorted(set(folders)) if all(folders) else []
    number = {name: k for k, name in enumerate(names)}
    return names, np.array([number.get(folder, -1) for folder in folders], np.int32)


def printable(name: str) -> str:
    """Returns a name on a single line, unprintable characters escaped as in a Python string."""
    return UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], name)


def is_image(name: str) -> bool:
    """Whether a file's name says that it is an image that Pillow can read without running other programs."""
    return _extension(name) in IMAGE_EXTENSIONS


def images_of(names: list[str]) -> list[str]:
    """Returns the names of pictures; if there are none, those of arrays. Beside pictures, arrays are something else."""
    return list(filter(is_image, names)) or [name for name in names if is_array(name)]


def is_array(name: str) -> bool:
    """Whether a file's name says that it holds a NumPy array, which may be an image: see `images_of`."""
    return _extension(name) in ARRAY_EXTENSIONS


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def is_ignored(name: str) -> bool:
    """Whether a file or folder is left out without a word: hidden ones, and those that systems create on their own.

    macOS and editors create hidden files that only look like images, such as `._a.png`.
    """
    return name.startswith(".") or name in SYSTEM_FOLDERS


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Returns the content of a file. Raises OSError if it is no regular file, or larger than `MAX_FILE`.

    Opening a named pipe would wait for a writer, and a device such as /dev/zero never ends.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
        check_file_size(status.st_size)
        return file.read(MAX_FILE)


def check_file_size(size: int) -> None:
    """Raises OSError if an image file of this many bytes is too large to read."""
    if size > MAX_FILE:
        raise OSError(f"{size:,} bytes are more than the limit of {MAX_FILE:,} for an image file")


def image_paths(root: str | os.PathLike[str], what: str, nested: bool = True) -> list[str]:
    """Returns the paths of all images under a folder, relative to it, sorted; without `nested`, of those right in it.

    Prints how many other files were passed over. Raises UserError, which begins with `what`, if there are none.
    """
    root = os.fspath(root)
    if not os.path.isdir(root):
        raise UserError(f"{what}: {'a file, not a folder' if os.path.exists(root) else 'no such folder'}")
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
            raise UserError(f"{what}: cannot read {folder or root}: {error.strerror}") from error
        for entry in entries:
            if is_ignored(entry.name):
                continue
            if _is_folder(entry):
                if nested:
                    pending.append(os.path.join(folder, entry.name))
            elif not (is_image(entry.name) or is_array(entry.name)):
                others[_extension(entry.name) or "no extension"] += 1
            elif _is_file(entry):
                paths.append(os.path.join(folder, entry.name))
    images = images_of(paths)
    if len(images) < len(paths):
        others.update(_extension(path) for path in paths if is_array(path))
    listing = ", ".join(f"{count:,} x {extension}" for extension, count in others.most_common(4))
    if not images:
        raise UserError(
            f"{what}: no images ({' '.join(IMAGE_EXTENSIONS + ARRAY_EXTENSIONS)}) there, found {listing or 'nothing'}"
        )
    if others:
        print(f"{root}: passed over {others.total():,} files that are no images ({listing})", file=sys.stderr)
    return sorted(images)


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
