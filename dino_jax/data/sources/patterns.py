"""Names of many files in one specification: {000..127}, * and commas."""

import glob
import os
import re

from dino_jax.errors import UserError

BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


def matching_files(pattern: str, what: str) -> list[str]:
    """Expands {000..999}, * and commas. Raises UserError, which begins with `what`, if a file is missing."""
    paths = []
    for part in pattern.split(","):
        for name in expand_braces(os.path.expanduser(part)):
            found = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
            if not found or not os.path.isfile(found[0]):
                raise UserError(f"{what}: no file {name}")
            paths += found
    return paths


def expand_braces(pattern: str) -> list[str]:
    """Returns the names that a pattern with {first..last} stands for: {008..010} gives 008, 009, 010."""
    found = BRACES.search(pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    numbers = range(int(first), int(last) + 1)
    return [
        name
        for number in numbers
        for name in expand_braces(f"{pattern[: found.start()]}{number:0{len(first)}}{pattern[found.end() :]}")
    ]
