"""The interface between the input pipeline and the places that images come from."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from dino_jax.errors import UserError

KNOB = "data.source (or evals.knn.train, evals.knn.test)"  # settings that hold a specification, for error messages


class Example(NamedTuple):
    """One image as stored: an encoded file (bytes) or an array [H, W] or [H, W, C]; label -1 if there is none."""

    image: bytes | np.ndarray
    label: int


class Source(Protocol):
    """A sequence of images with random access.

    Subclass it to inherit the defaults of `label`, `identity`, `class_names`, `groups` and `window`. A source must be
    picklable, because the worker processes that read from it are spawned.
    """

    num_classes: int  # 0 = no labels
    class_names: Sequence[str] = ()  # names of the classes 0 .. num_classes - 1, empty if the source has none
    # Classes of each image of a set in which an image has any number of them; such a set has num_classes 0.
    label_sets: Sequence[Sequence[int]] | None = None
    # Numbers of records of the groups that storage reads as a whole, int [g], in order. None: single records are cheap.
    groups: np.ndarray | None = None
    window: int = 1  # number of groups that a reader keeps in memory; training shuffles as many together

    def __len__(self) -> int:
        """Returns the number of images."""

    def __getitem__(self, i: int) -> Example:
        """Returns the i-th example, 0 <= i < len. Raises OSError if it cannot be read."""

    def name(self, i: int) -> str:
        """Returns the name of the i-th example for messages and lists, a single line."""

    def label(self, i: int) -> int:
        """Returns the i-th label, -1 if there is none. Override it if labels are cheaper to get than examples."""
        return self[i].label

    def identity(self, i: int) -> str:
        """Returns a line that changes when the i-th example changes, as far as this is known without reading it.

        The feature cache uses it as a key. The default is the name.
        """
        return self.name(i)


def read_example(source: Source, i: int) -> Example:
    """Returns `source[i]`. Raises OSError, whatever a reader raises: a bare RuntimeError in C++, MemoryError, ..."""
    try:
        return source[i]
    except (OSError, UserError):
        raise
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise OSError(f"{type(error).__name__}: {reason}") from error


class SourceType(Protocol):
    """A class of sources that parses its own part of a specification: the values of the table of schemes."""

    @property
    def syntax(self) -> str:
        """The form of the whole specification, for the error message: "folder:PATH"."""

    def from_spec(self, rest: str) -> Source | None:
        """Opens the source given the specification without "scheme:". Returns None if `rest` is malformed.

        Raises UserError if there is no such source.
        """
