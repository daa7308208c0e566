"""A user's mistake is one clear line, never a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

# Libraries that `pip install dino_jax` leaves out, and the extra that installs each (pyproject.toml).
EXTRAS = {
    "array_record": "train",
    "av": "video",
    "grain": "train",
    "matplotlib": "plots",
    "ml_collections": "train",
    "optax": "train",
    "scipy": "train",
    "tensorboardX": "train",
    "tensorflow_datasets": "tfds",
    "torch": "torch",
    "umap": "umap",
    "wandb": "wandb",
}
NAMED = 5  # differences that a message lists


class UserError(Exception):
    """A mistake that the user can mend: the message is one line that names the knob and the way out.

    The command line prints it and exits with code 2.
    """


class Stopped(Exception):
    """A signal asked the run to stop: it is saved, and the same command goes on. The command line exits with 75."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h, by which a scheduler can tell it from finished (0) and failed (1, 2)


class NotFiniteError(UserError):
    """The loss, the gradient or the parameters of a step are not finite: this run cannot go on, others can."""


def listed(differences: list[str]) -> str:
    """The first `NAMED` of them, and how many more there are, for a message."""
    more = f" and {len(differences) - NAMED} more" if len(differences) > NAMED else ""
    return "; ".join(differences[:NAMED]) + more


@contextmanager
def missing_extras() -> Iterator[None]:
    """Turns the failed import of a library of `EXTRAS` into a UserError that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        library = str(error.name).split(".")[0]
        if library not in EXTRAS:
            raise
        raise UserError(f"{library} is not installed: pip install 'dino_jax[{EXTRAS[library]}]'") from error
