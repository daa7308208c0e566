"""WebDataset shards: tar files whose members `KEY.jpg`, `KEY.cls`, ... are one sample each.

Random access needs to know where each image starts, so an index of each tar is built once and kept beside it as
`SHARD.tar.index.json`, or in the user's cache if the folder cannot be written. It is built again when the size or the
modification time of the tar changes.
"""

import hashlib
import json
import os
import sys
import tarfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from dino_jax import atomic
from dino_jax.data.sources.base import KNOB, Example, Source
from dino_jax.data.sources.files import cache_folder, matching_files, opened, read_part, status, write
from dino_jax.data.sources.folder import check_file_size, images_of, is_ignored
from dino_jax.errors import UserError, listed
from dino_jax.json_files import TEXT, WHOLE, Kind, parse, require
from dino_jax.progress import progress
from dino_jax.storage import is_remote

VERSION = 1  # of the index
MAX_INDEX = 2**31  # bytes
INDEXERS = 8  # tar files that are indexed at a time
LABEL_KEYS = ("label", "cls", "class")  # of a sample's .json


class Sample(NamedTuple):
    """Where the image of a sample is."""

    key: str
    offset: int  # bytes
    size: int  # bytes
    label: int  # -1: none


class TarSource(Source):
    """The images of WebDataset shards, in the order of the shards' names and of their members.

    The label of a sample is the number in its `.cls`, or `label` in its `.json`. A shard that is cut off keeps the
    images before the cut. A line on stderr tells of cut shards, and of samples without a label among labeled ones.
    """

    syntax = "wds:SHARDS.tar"

    def __init__(self, pattern: str):
        what = f"{KNOB}=wds:{pattern}"
        self.paths = matching_files(pattern, what)
        with ThreadPoolExecutor(INDEXERS) as pool:
            indexes = list(progress(pool.map(lambda path: index_of(path, what), self.paths), len(self.paths), "index"))
        samples = [sample for index, _ in indexes for sample in index]
        if not samples:
            raise UserError(f"{what}: no images in {len(self.paths):,} tar files, whose first is {self.paths[0]}")
        self.shards = np.repeat(np.arange(len(indexes), dtype=np.int32), [len(index) for index, _ in indexes])
        self.keys = [sample.key for sample in samples]
        self.places = np.array([(sample.offset, sample.size) for sample in samples], np.int64)
        self.labels = np.array([sample.label for sample in samples], np.int32)
        self.num_classes = int(self.labels.max()) + 1
        if cut := [f"{path}: {problem}" for path, (_, problem) in zip(self.paths, indexes, strict=True) if problem]:
            print(f"{len(cut):,} damaged shards, of which the first images count: {listed(cut)}", file=sys.stderr)
        if self.num_classes and (without := int(np.sum(self.labels < 0))):
            print(f"{without:,} of {len(samples):,} samples have no label", file=sys.stderr)

    @classmethod
    def from_spec(cls, rest: str) -> Source | None:
        """Names of tar files with {000..999} or *, separated by commas; ~ is the home."""
        return cls(rest) if rest else None

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int) -> Example:
        offset, size = map(int, self.places[i])
        check_file_size(size)
        content = read_part(self.paths[self.shards[i]], offset, size)
        if len(content) < size:
            raise OSError("the tar file ends within the image")
        return Example(content, self.label(i))

    def label(self, i: int) -> int:
        """The number in the sample's .cls or .json, or -1."""
        return int(self.labels[i])

    def name(self, i: int) -> str:
        """The shard's name and the sample's key."""
        return f"{os.path.basename(self.paths[self.shards[i]])}/{self.keys[i]}"

    def identity(self, i: int) -> str:
        """Name, label, place, and the shard's modification time."""
        try:
            changed = status(self.paths[self.shards[i]]).changed
        except OSError:
            return f"{self.name(i)} is not there"
        offset, size = self.places[i]
        return f"{self.name(i)} {self.label(i)} {offset} {size} {changed}"


def _is_sample(row: Any) -> bool:
    return isinstance(row, list) and len(row) == 4 and TEXT.fits(row[0]) and all(map(WHOLE.fits, row[1:]))


SAMPLES = Kind("a list of samples", lambda value: isinstance(value, list) and all(map(_is_sample, value)))


def index_of(path: str, what: str) -> tuple[list[Sample], str]:
    """Returns the samples with an image, and what is wrong with the tar, from its index or by reading its headers.

    Raises UserError, which begins with `what`, if the file cannot be read or is no tar file.
    """
    try:
        size, changed = status(path)
        stamp = {"version": VERSION, "bytes": size, "changed": changed}
        for place in _index_places(path):
            if (known := _known(place)) and all(known.get(k) == v for k, v in stamp.items()):
                return [Sample(*row) for row in known["samples"]], known["problem"]
        samples, problem = read_headers(path)
    except tarfile.ReadError as error:
        raise UserError(f"{what}: {path} is no tar file ({error})") from error
    except OSError as error:
        raise UserError(f"{what}: {path} cannot be read: {error.strerror or error}") from error
    index = {**stamp, "problem": problem, "samples": [list(sample) for sample in samples]}
    for place in _index_places(path):
        try:
            write(place, atomic.to_json(index).encode())
            break
        except (UserError, OSError):  # a folder that cannot be written: the next place, or no index
            continue
    return samples, problem


def read_headers(path: str) -> tuple[list[Sample], str]:
    """Reads the headers of a tar file, and its labels. Returns the samples with an image, and where it is damaged.

    Raises: tarfile.ReadError if it is no tar file; OSError.
    """
    samples: list[Sample] = []
    with opened(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        group: dict[str, tarfile.TarInfo] = {}
        key = ""
        try:
            for member in tar:
                if not member.isfile() or is_ignored(os.path.basename(member.name)):
                    continue
                stem, extension = split_name(member.name)
                if stem != key:
                    samples += _sample(tar, key, group)
                    key, group = stem, {}
                group[extension] = member
            samples += _sample(tar, key, group)
            problem = "" if _ends(path, tar.offset) else f"cut off after {len(samples):,} images"
        except (tarfile.ReadError, EOFError) as error:
            problem = f"{error} after {len(samples):,} images"
    return samples, problem


def _ends(path: str, offset: int) -> bool:
    """Whether the block of zeros that ends a tar file is there. Without it, `tarfile` ends all the same."""
    return read_part(path, offset, tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def split_name(name: str) -> tuple[str, str]:
    """Splits a member's name at the first dot of its last part: WebDataset's key, and the extension in lower case."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _sample(tar: tarfile.TarFile, key: str, group: Mapping[str, tarfile.TarInfo]) -> Iterator[Sample]:
    """Yields the sample of a group of members, if one of them is an image."""
    if names := images_of([f"x.{extension}" for extension in group]):
        member = group[names[0].removeprefix("x.")]
        yield Sample(key, member.offset_data, member.size, _label(tar, group))


def _label(tar: tarfile.TarFile, group: Mapping[str, tarfile.TarInfo]) -> int:
    """Returns the label of a sample, -1 if there is none that is a number of 0 or more."""
    label: Any = None
    try:
        if "cls" in group:
            label = int(_content(tar, group["cls"]))
        elif "json" in group:
            fields = json.loads(_content(tar, group["json"]))
            label = next((fields[name] for name in LABEL_KEYS if name in fields), None)
    except (ValueError, TypeError):
        return -1
    return label if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < 2**31 else -1


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read(2**20) if file else b""


def _index_places(path: str) -> Iterator[str]:
    """Yields the places of an index: beside the tar, then in the user's cache."""
    yield f"{path}.index.json"
    name = path if is_remote(path) else os.path.abspath(path)
    yield str(cache_folder("indexes") / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json")


def _known(place: str) -> dict[str, Any]:
    """Returns an index, or {} if there is none or it is damaged: it is then built again."""
    try:
        known = parse(read_part(place, 0, MAX_INDEX).decode(), place)
        require(known, {"version": WHOLE, "samples": SAMPLES, "problem": TEXT}, place)
    except (OSError, ValueError, UserError):
        return {}
    return known
