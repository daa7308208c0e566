"""The `dino-jax` program: runs a command, parses its flags, and reports user errors in one line with exit code 2.

A command is a module of this package. Its docstring is its help, and it defines

    USAGE                       the arguments and required flags, such as "SOURCE OUT"
    define_flags(arguments)     defines the absl flags, and returns the settings for --config.KEY=VALUE, if it has any
    main(arguments)             runs the command; `arguments` are the positional ones

Worker processes import the script that started the program, and with it this module, so slow imports are deferred.
"""

import hashlib
import os
import platform
import re
import sys
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import dino_jax
from dino_jax.errors import Stopped, UserError, missing_extras

if TYPE_CHECKING:
    from ml_collections import ConfigDict

COMMANDS = {
    "train": "pretrain a backbone with DINO, or resume a run",
    "evaluate": "evaluate a backbone: k-NN, linear, attention, retrieval, video segmentation, ...",
    "convert": "convert weights between this package, the official code, timm and Hugging Face",
    "demo": "pretrain on the bundled images and show the result, in minutes on a CPU",
    "ablation": "train the demo with one part of the method removed at a time",
    "suggest": "choose the settings of a run for your images, your devices and your time",
    "diagnose": "say from the log of a run whether it learns, and if not, why",
    "report": "write a page that shows a run: verdict, curves, nearest neighbors, attention",
    "preview": "draw the crops that a recipe makes of your images",
    "check": "read every image of a data set and report damaged and duplicate ones",
    "prepare": "write a data set to ArrayRecord files, in parallel",
    "plan": "estimate memory and communication of a recipe on a TPU slice, without one",
    "replay": "repeat a step whose loss or gradient was not finite and report the cause",
}
HELP = ("--help", "-help", "-h")
PATHS = ("workdir", "checkpoint", "out", "output", "report")  # flags that are paths
# Those that may be in an object store.
IN_STORES = {"train": ("workdir",), "evaluate": ("checkpoint", "out"), "check": ("report",)}


class Settings(NamedTuple):
    """The settings that --config.KEY=VALUE changes."""

    config: "ConfigDict"
    defined_in: Sequence[Callable[[], "ConfigDict"]]  # the comments in their sources describe each setting
    about: str  # where the values come from
    is_recipe: bool = False  # whether --config=RECIPE chooses them


def main() -> None:
    """Runs `dino-jax COMMAND ...` from the command line."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in HELP:
        _show(_overview())
    elif arguments[0] == "--version":
        print(f"dino_jax {dino_jax.__version__}")
    elif arguments[0] in COMMANDS:
        run(arguments[0], arguments[1:])
    else:
        _fail(f"no command {arguments[0]!r}: give one of {', '.join(COMMANDS)}")


def run(name: str, arguments: Sequence[str]) -> None:
    """Runs a command of `COMMANDS` and exits with the exit code of the command line.

    For a UserError, an unknown flag, an unknown config key, a value of the wrong type or a missing library, prints
    `error: ...` to stderr and exits with code 2. A run that was stopped by a signal exits with code 75
    (`Stopped.exit_code`).
    """
    try:
        with missing_extras():
            _start(name, list(arguments))
    except UserError as error:
        _fail(str(error), error.exit_code)
    except Stopped:
        _exit_soon(Stopped.exit_code)
    except MemoryError:
        _fail("out of host memory: close other programs, raise `ulimit -v`, or set a smaller --config.batch_size")
    except Exception as error:
        if reason := _environment_problem(error):
            _fail(reason)
        raise


def recipe(arguments: Sequence[str], default: str) -> Settings:
    """Returns the settings of a command that takes --config=RECIPE, a name or a path."""
    from dino_jax import recipes

    name = split_recipe(arguments)[0] or default
    module = recipes.load(name)
    meanings = recipes.load("default").get_config
    return Settings(recipes.config_of(module), [meanings], f"{name}: {module.__doc__ or ''}", is_recipe=True)


def split_recipe(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Separates --config=RECIPE, or --config RECIPE, from the other arguments. The recipe is "" if not given."""
    recipe, others, remaining = "", [], iter(arguments)
    for argument in remaining:
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-config"):
            recipe = value if equals else next(remaining, "")
        else:
            others.append(argument)
    return recipe, others


def wants_help(arguments: Sequence[str]) -> bool:
    """Returns whether the command line asks for help."""
    return any(argument in HELP for argument in arguments)


def usage_line(command: ModuleType) -> str:
    """Returns the usage of a command."""
    return f"dino-jax {command.__name__.rpartition('.')[2]} {command.USAGE}"


def required(flag: str, value: str | None) -> str:
    """Returns the value, or raises a UserError that names the missing flag."""
    if not value:
        raise UserError(f"--{flag} is missing: set it on the command line")
    return value


def require_local(knob: str, path: str) -> None:
    """Raises a UserError if a command would write to an object store that cannot."""
    if "://" in path:
        raise UserError(f"{knob}: {path} is not a local path: give one, and copy the result")


def range_of(parts: list[str]) -> tuple[float, float]:
    """Returns the value of --range=LOW,HIGH, (0, 0) if it is not set. Raises UserError if it is no range."""
    try:
        low, high = (float(part) for part in parts or ("0", "0"))
    except ValueError as error:
        raise UserError(f"--range={','.join(parts)}: two numbers are needed, such as --range=0,4095") from error
    if parts and not low < high:
        raise UserError(f"--range={low:g},{high:g}: the second number must be larger than the first")
    return low, high


def require_no_arguments(arguments: Sequence[str]) -> None:
    """Raises a UserError if something on the command line is not a flag."""
    if arguments:
        raise UserError(f"{arguments[0]!r} is not a flag: change settings with --config.KEY=VALUE")


def _start(name: str, arguments: list[str]) -> None:
    from absl import logging

    command = import_module(f"dino_jax.commands.{name}")
    settings = command.define_flags(arguments)
    if wants_help(arguments):
        from dino_jax.commands.help_page import page

        _show(page(command, settings))
        return
    positional = _parse(name, settings, arguments)
    logging.use_absl_handler()
    logging.set_verbosity(logging.FATAL)  # Orbax logs pages about every checkpoint; errors are raised anyway
    _keep_compiled_programs()
    command.main(positional)


def _parse(name: str, settings: Settings | None, arguments: list[str]) -> list[str]:
    """Parses all flags and returns the positional arguments."""
    from absl import flags

    try:
        if settings:
            from ml_collections import config_flags

            named, arguments = split_recipe(arguments)
            if named and not settings.is_recipe:
                raise UserError(f"--config={named}: this command has no recipes; its settings are --config.KEY=VALUE")
            config_flags.DEFINE_config_dict("config", settings.config, sys_argv=[name, *arguments])
        positional = flags.FLAGS([name, *arguments])[1:]
        if settings:
            _expand_home(settings.config)
        for flag in PATHS:
            if flag in flags.FLAGS and flags.FLAGS[flag].value:
                flags.FLAGS[flag].value = path = os.path.expanduser(str(flags.FLAGS[flag].value))
                if flag not in IN_STORES.get(name, ()):
                    require_local(f"--{flag}", path)
        return [os.path.expanduser(argument) for argument in positional]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        text = str(error)
        if isinstance(error, AttributeError) and isinstance(error.args[0], KeyError):  # unknown config key
            text = f"unknown setting {error.args[0].args[0]}"
        raise UserError(" ".join(text.split())) from error


def _expand_home(config: "ConfigDict") -> None:
    """Replaces a leading ~ in string settings: shells leave it in --workdir=~/x. Sources do so after their scheme."""
    from dino_jax.provenance import flat

    strings = {name: value for name, value in flat(config.to_dict()).items() if isinstance(value, str)}
    config.update_from_flattened_dict(
        {name: os.path.expanduser(value) for name, value in strings.items() if value.startswith("~")}
    )


def _environment_problem(error: Exception) -> str:
    """Returns which environment variable keeps JAX from starting, or "" if the error has another cause."""
    if found := re.fullmatch(r'Invalid value "(.*)" for JAX flag (\w+)', str(error)):
        return f"{found[2].upper()}={found[1]} is not a valid value: correct or unset this environment variable"
    if platforms := os.environ.get("JAX_PLATFORMS"):
        import jax

        try:
            jax.devices()
        except Exception:
            return (
                f"JAX_PLATFORMS={platforms}: JAX finds no such device here: unset it, set JAX_PLATFORMS=cpu, or "
                "install JAX for your hardware"
            )
    return ""


def _keep_compiled_programs() -> None:
    """Caches compiled programs in ~/.cache/dino_jax, so that the same command starts faster the next time.

    JAX_COMPILATION_CACHE_DIR sets another folder, or disables the cache if it is empty. Each kind of processor has its
    own folder, because compiled programs use its instruction set, and machines may share a home folder.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
        features = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
        kind = f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"
        try:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dino_jax" / kind
            cache.mkdir(parents=True, exist_ok=True)
        except (RuntimeError, OSError) as error:  # no home directory, as in containers, or one that is read-only
            reason = f"no cache of compiled programs ({error}): JAX_COMPILATION_CACHE_DIR sets its folder"
            print(reason, file=sys.stderr)
        else:
            jax.config.update("jax_compilation_cache_dir", str(cache))


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dino-jax COMMAND [ARGUMENTS] [FLAGS]",
            "",
            "DINO self-supervised pretraining in JAX.",
            "",
            "commands:",
            *lines,
            "",
            "`dino-jax COMMAND --help` shows the flags and settings of a command.",
        ]
    )


def _show(text: str) -> None:
    """Prints text, also to a program such as `head` that closes the pipe early."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise flushing fails at exit


def _exit_soon(code: int) -> NoReturn:
    """Exits after at most 5 seconds, even if a thread hangs."""
    from dino_jax.distributed.watchdog import end

    # Python waits for all threads. A thread that reads images may hang, and that may be why the run was stopped.
    timer = threading.Timer(5, end, (code, "a thread did not finish: exiting without it"))
    timer.daemon = True
    timer.start()
    sys.exit(code)


def _fail(message: str, code: int = UserError.exit_code) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
