"""Apache Beam: calls a function with the number of each slice of some work, on the workers of any of its runners.

The functions are those of the local path. They write files that appear whole or not at all, and skip what is there.
Workers therefore need the package, the images and the folder of results under the same paths as the process that starts
the pipeline.
"""

import contextlib
import io
import re
import shlex
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

from dino_jax.data.sources import Source, names_digest, open_source
from dino_jax.errors import UserError, missing_extras

KNOB = "--beam"
HELP = (
    "run on Apache Beam, with these pipeline options: "
    "'--runner=DirectRunner --direct_num_workers=2 --direct_running_mode=multi_processing'"
)
DEFAULTS = ["--default_sdk_harness_log_level=CRITICAL"]  # workers log pages about themselves; errors are raised anyway
PORTABLE = ("flinkrunner", "sparkrunner", "portablerunner")  # their job servers have options of their own
REASON = re.compile(r"UserError: (.*?)(?: \[while running .*)?$", re.MULTILINE)  # in what a runner raises
_OPENING = threading.Lock()


@contextlib.contextmanager
def pipeline(options: str) -> Iterator[Any]:
    """Yields a `beam.Pipeline`, which runs after the block. `options` are those of the command line of Beam.

    Raises UserError if Beam is not installed, an option is unknown or wrong, or a worker raised a UserError.
    """
    with missing_extras():
        import apache_beam as beam
    parsed = _parsed(options)
    try:
        made = beam.Pipeline(options=parsed)
    except (ValueError, ImportError) as error:
        raise UserError(f"{KNOB}={options}: {' '.join(str(error).split())}") from error
    try:
        with made:
            yield made
    except Exception as error:
        if reason := REASON.search(f"{type(error).__name__}: {error}"):
            raise UserError(reason[1]) from error
        raise


def spread(made: Any, wanted: Iterable[int]) -> Any:
    """Returns the collection of these numbers in a pipeline, spread over the workers."""
    import apache_beam as beam

    return made | "slices" >> beam.Create(list(wanted)) | "spread" >> beam.Reshuffle()


def for_each(act: Callable[[int], object], wanted: Iterable[int], options: str) -> None:
    """Calls act(number) on the workers. `act` is pickled; runners may call it twice, also at the same time."""
    with pipeline(options) as made:
        import apache_beam as beam

        spread(made, wanted) | "work" >> beam.Map(act)


def require_results(found: int, expected: int, place: str) -> None:
    """Raises UserError if some of the files that workers wrote are not where this process sees them."""
    if found < expected:
        raise UserError(
            f"{KNOB}: the workers ended, but {expected - found:,} of their {expected:,} files are not in {place}: give "
            "paths that are the same on all machines, on a disk that they share or in a bucket"
        )


def reopened(spec: str, names: str) -> Source:
    """Opens a source on a worker, once per process. names: `names_digest` of the source that the pipeline started with.

    Raises UserError if the worker sees other images.
    """
    with _OPENING:  # some runners use several threads
        return _reopened(spec, names)


@lru_cache(maxsize=1)
def _reopened(spec: str, names: str) -> Source:
    source = open_source(spec)
    if names_digest(source) != names:
        raise UserError(
            f"{KNOB}: a worker sees other images in {spec} than the process that started it: give a path that is the "
            "same on all machines, and leave the images alone until the end"
        )
    return source


def _parsed(options: str) -> Any:
    """Returns `PipelineOptions`. Raises UserError if one is unknown or has a wrong value."""
    from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

    try:
        arguments = shlex.split(options)
    except ValueError as error:
        raise UserError(f"{KNOB}={options}: {error}") from error
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):  # argparse prints the usage of all options
            parsed = PipelineOptions([*DEFAULTS, *arguments])
            known, given = parsed.get_all_options(), parsed.get_all_options(retain_unknown_options=True)
    except SystemExit as error:
        raise UserError(f"{KNOB}={options}: {said.getvalue().strip().splitlines()[-1]}") from error
    stray = [argument for argument in arguments if not argument.startswith("--")]
    unknown = [f"--{name}" for name in given if name not in known]
    portable = (parsed.view_as(StandardOptions).runner or "").lower() in PORTABLE
    if stray or (unknown and not portable):
        raise UserError(f"{KNOB}={options}: {(stray + unknown)[0]} is no pipeline option of Beam: write --NAME=VALUE")
    return parsed
