"""Entry points: flags in; one line and exit code 2 out when the user made a mistake."""

import sys
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

from dino_jax.errors import UserError

FLAG_ERRORS = (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError)


def run(main: Callable[[list[str]], None]) -> None:
    """Parses the command line and calls main(positional arguments, the program first).

    A UserError, an unknown flag, an unknown key of the config or a wrong type prints `error: ...` to stderr and exits
    with code 2.
    """

    def start(argv):
        logging.set_verbosity(logging.WARNING)  # Orbax tells a page about every checkpoint
        main(argv)

    app.run(_reported(start), flags_parser=_reported(_parse, FLAG_ERRORS))


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
