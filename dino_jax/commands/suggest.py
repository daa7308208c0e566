"""Chooses the settings of a run for your images, your devices and your time, and writes them as a recipe.

    dino-jax suggest folder:photos --hours=8 --output=mine.py
    dino-jax train --config=mine.py --workdir=runs/mine

SOURCE has the form of --config.data.source. The command reads up to 5,000 images (number, sizes, channels, copies),
compiles the largest network that the time allows, times a few steps of it, and writes a recipe with the reason for each
setting. `dino-jax train --config=auto --hours=8` does both at once. Run it on the machine that will train.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from textwrap import indent, wrap
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from dino_jax import atomic, storage
from dino_jax.commands import cli
from dino_jax.data.sources import open_source
from dino_jax.distributed.processes import set_cpu_device_count
from dino_jax.errors import UserError
from dino_jax.suggest import facts, measure
from dino_jax.suggest.choices import Choice, Measured, suggest

USAGE = "SOURCE [--hours=H] [--test=SOURCE] [--output=FILE.py]"
AUTO = "auto"  # the recipe that `dino-jax train` has this command write
BATCH = 32  # the smallest batch that is suggested: devices divide it
WIDTH = 120


def define_flags(arguments: Sequence[str]) -> None:
    """Defines the flags."""
    flags.DEFINE_float("hours", 1.0, "time for the training", lower_bound=0.001)
    flags.DEFINE_string("test", "", "labeled images for k-NN that SOURCE does not hold")
    flags.DEFINE_string("output", "suggested.py", "the recipe to write")


def main(arguments: Sequence[str]) -> None:
    """Writes the recipe, and prints the settings with their reasons."""
    if len(arguments) != 1:
        raise UserError(f"usage: dino-jax suggest {USAGE}, where SOURCE has the form of --config.data.source")
    values, [spec] = flags.FLAGS, arguments
    output = Path(values.output)
    if output.suffix != ".py":
        raise UserError(f"--output={output}: a recipe's name must end in .py")
    set_cpu_device_count(BATCH)
    source, machine = open_source(spec), facts.of_machine()
    if values.test:
        _require_labels(spec, values.test)
    images = facts.of_images(spec, source, workers=machine.cores)
    choices = suggest(
        images,
        machine,
        values.hours,
        values.test,
        measure.flops_rate(),
        measure.flops_of,
        _announced,
    )
    command = f"dino-jax suggest {spec} --hours={values.hours:g}" + (f" --test={values.test}" if values.test else "")
    on = f"{machine.devices} x {machine.kind}, {machine.cores} cores"
    with atomic.file(output) as unfinished:
        unfinished.write_text(recipe(choices, command, on), encoding="utf-8")
    for choice in choices:
        print(f"{choice.setting} = {choice.value!r}: {choice.reason}")
    if images.classes and not values.test:
        print("no k-NN while training: give --test=SOURCE with labeled images that training does not see")
    print(f"written to {output}; now: dino-jax train --config={output} --workdir=runs/{output.stem}")


def recipe(choices: Sequence[Choice], command: str, machine: str) -> str:
    """Returns the text of a recipe: settings below the reason that they share."""
    lines: list[str] = []
    for reason, together in groupby(choices, lambda choice: choice.reason):
        lines += [f"# {line}" for line in wrap(reason, WIDTH - 6)]
        lines += [f"config.{choice.setting} = {_literal(choice.value)}" for choice in together]
    return (
        f'"""Settings that `{command}` suggests, on {machine}."""\n\n'
        "from ml_collections import ConfigDict\n\n"
        "from dino_jax import recipes\n\n\n"
        "def get_config() -> ConfigDict:\n"
        '    """Changes from the defaults, each below its reason."""\n'
        '    config = recipes.get_config("default")\n' + indent("\n".join(lines), "    ") + "\n    return config\n"
    )


@contextmanager
def automatic(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Replaces --config=auto by the recipe WORKDIR/suggested.py, which this command writes if it is not there.

    The command runs in a process of its own, so that its measurements leave no memory behind. A run that resumes
    finds its recipe, and trains on with the same settings.

    Raises:
        UserError: the workdir or the source is not given, the run has several processes, or the command fails.
    """
    name, others = cli.split_recipe(arguments)
    if name != AUTO or cli.wants_help(arguments):
        yield list(arguments)
        return
    given = _values(others)
    if any(flag.startswith("config.distributed") for flag in given):
        raise UserError(
            "--config=auto is for one process: run `dino-jax suggest SOURCE` once, and give all processes its file"
        )
    workdir = cli.required("workdir", given.get("workdir"))
    source = cli.required("config.data.source", given.get("config.data.source"))
    recipe_file = f"{os.path.expanduser(workdir)}/suggested.py"
    with storage.fetched(recipe_file) as path:
        if not path.exists():
            hours = [f"--hours={given['hours']}"] if "hours" in given else []
            program = [sys.executable, "-m", "dino_jax", "suggest", source, f"--output={path}", *hours]
            if subprocess.run(program, check=False).returncode:
                raise UserError("--config=auto: no settings could be suggested, for the reason above")
            if storage.is_remote(workdir):
                storage.Store(workdir).write("suggested.py", path.read_bytes())
        yield [f"--config={path}", *others]


def _literal(value: Any) -> str:
    """Returns a value as Python code, with the double quotes that formatters prefer."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _values(arguments: Sequence[str]) -> dict[str, str]:
    """Returns the flags of a command line with their values, from --flag=value and --flag value."""
    given: dict[str, str] = {}
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-"):
            given[flag] = value if equals else following
    return given


def _announced(config: ConfigDict) -> Measured:
    print(f"timing {config.model.arch} at {config.crops.global_size} pixels", file=sys.stderr, flush=True)
    return measure.measure(config)


def _require_labels(spec: str, test: str) -> None:
    for name, one in (("SOURCE", spec), ("--test", test)):
        if not open_source(one).num_classes:
            raise UserError(f"{name}: {one} has no labels, which k-NN needs: leave --test out")
