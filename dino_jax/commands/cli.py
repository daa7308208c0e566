"""Entry points: flags in; one line and exit code 2 out when the user made a mistake."""

import hashlib
import os
import platform
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from dino_jax.distributed.watchdog import end
from dino_jax.errors import Stopped, UserError

FLAG_ERRORS = (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError)


def run(main: Callable[[list[str]], None]) -> None:
    """Parses the command line and calls main(positional arguments, the program first).

    A UserError, an unknown flag, an unknown key of the config or a wrong type prints `error: ...` to stderr and exits
    with code 2; a run that was stopped by a signal exits with `Stopped.exit_code`, 75.
    """

    def start(argv):
        logging.set_verbosity(logging.FATAL)  # Orbax tells pages about every checkpoint, and raises what matters
        keep_compiled_programs()
        main(argv)

    app.run(_reported(start), flags_parser=_reported(_parse, FLAG_ERRORS))


def keep_compiled_programs() -> None:
    """Keeps what JAX compiles in ~/.cache/dino_jax, so that the same command starts at once the next time.

    JAX_COMPILATION_CACHE_DIR is another folder, or none where it is empty. One for each kind of processor: programs are
    made for the very instructions that one has, and home folders are shared.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
        flags_of_cpu = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
        kind = f"{platform.machine()}-{hashlib.sha256(flags_of_cpu.encode()).hexdigest()[:12]}"
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "dino_jax" / kind))


def config_file_flag(default: str) -> flags.FlagHolder:
    """Defines --config=FILE with --config.KEY=VALUE overrides of what the file's get_config() returns."""
    define = _reported(config_flags.DEFINE_config_file, FLAG_ERRORS)
    return define("config", default, "recipe; override with --config.KEY=VALUE")


def config_dict_flag(config) -> flags.FlagHolder:
    """Defines --config.KEY=VALUE overrides of a given config."""
    define = _reported(config_flags.DEFINE_config_dict, FLAG_ERRORS)
    return define("config", config, "settings: --config.KEY=VALUE")


def required(flag: str, value: str | None) -> str:
    """The value, or a UserError that names the missing flag."""
    if not value:
        raise UserError(f"--{flag} is missing")
    return value


def require_no_arguments(argv: list[str]) -> None:
    """UserError where something on the command line is not a flag."""
    if len(argv) > 1:
        raise UserError(f"{argv[1]!r} is no flag: settings are --config.KEY=VALUE")


def _parse(argv: list[str]) -> list[str]:
    rest = flags.FLAGS(argv)
    if "config" in flags.FLAGS:
        flags.FLAGS.config.items()  # a file that can't be loaded says so only when it is looked at
    return rest


def _reported(function: Callable, mistakes: tuple[type[Exception], ...] = ()) -> Callable:
    """The function, ending the program with one line at a UserError or at what else is a `mistake` of the user's."""

    def reported(*args):
        try:
            return function(*args)
        except Stopped:
            # Python waits for all threads: one that reads images may hang, which can be why the run was stopped.
            last = threading.Timer(5, end, (Stopped.exit_code, "a thread did not end: cut off"))
            last.daemon = True
            last.start()
            sys.exit(Stopped.exit_code)
        except UserError as error:
            message = str(error)
        except mistakes as error:
            text = str(error)
            if isinstance(error, AttributeError) and isinstance(error.args[0], KeyError):  # the config has no such key
                text = f"unknown setting {error.args[0].args[0]}"
            message = " ".join(text.split())
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)

    return reported
