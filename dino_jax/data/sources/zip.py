"""Image files in a zip archive."""

import os
import zipfile
from typing import Any

from dino_jax.data.sources.base import KNOB, Example, Source
from dino_jax.data.sources.files import opened, status
from dino_jax.data.sources.folder import check_file_size, class_folders, images_of, is_ignored, printable
from dino_jax.errors import UserError


class ZipSource(Source):
    """Image files in a zip archive, in the order of their names. Folders give labels as in `FolderSource`."""

    syntax = "zip:PATH"

    def __init__(self, path: str):
        self.path = path
        what = f"{KNOB}=zip:{path}"
        try:
            with opened(path) as file, zipfile.ZipFile(file) as archive:
                members = [member for member in archive.infolist() if not member.is_dir()]
        except zipfile.BadZipFile as error:
            raise UserError(f"{what}: no zip archive, or cut off ({error}): copy it again") from error
        except OSError as error:
            raise UserError(f"{what}: cannot be read: {error.strerror or error}") from error
        names = [member.filename for member in members if not any(map(is_ignored, member.filename.split("/")))]
        self.names = sorted(images_of(names))
        if not self.names:
            raise UserError(f"{what}: no images among its {len(members):,} files")
        self.class_names, self.labels = class_folders(self.names, "/")
        self.num_classes = len(self.class_names)
        self._archive: zipfile.ZipFile | None = None

    @classmethod
    def from_spec(cls, rest: str) -> Source | None:
        """PATH, which may begin with ~."""
        return cls(os.path.expanduser(rest)) if rest else None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None}  # each worker opens its own

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Example:
        if self._archive is None:
            self._archive = zipfile.ZipFile(opened(self.path))
        member = self._archive.getinfo(self.names[i])
        check_file_size(member.file_size)
        return Example(self._archive.read(member), self.label(i))

    def label(self, i: int) -> int:
        """The number of the image's class folder, or -1."""
        return int(self.labels[i])

    def name(self, i: int) -> str:
        """The name in the archive, on a single line."""
        return printable(self.names[i])

    def identity(self, i: int) -> str:
        """Name, label, and the archive's modification time."""
        try:
            changed = status(self.path).changed
        except OSError:
            return f"{self.name(i)} is not there"
        return f"{self.name(i)} {self.label(i)} {changed}"
