"""Errors that users see as one line instead of a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

# Libraries that `pip install dino_jax` does not install, and the extra that installs each (pyproject.toml).
EXTRAS = {
    "apache_beam": "beam",
    "array_record": "train",
    "av": "video",
    "datasets": "hf",
    "gcsfs": "gcs",
    "grain": "train",
    "imagecodecs": "bands",
    "matplotlib": "plots",
    "ml_collections": "train",
    "optax": "train",
    "pyarrow": "parquet",
    "pydicom": "dicom",
    "s3fs": "s3",
    "scipy": "train",
    "tensorboardX": "train",
    "tensorflow_datasets": "tfds",
    "tifffile": "bands",
    "torch": "torch",
    "umap": "umap",
    "wandb": "wandb",
}
NAMED = 5  # differences that a message lists


class UserError(Exception):
    """A mistake that the user can fix. The message is one line that names the setting and how to fix it.

    The command line prints it and exits with `exit_code`.
    """

    exit_code = 2


class Stopped(Exception):
    """A signal stopped the run after it saved; the same command resumes it. The command line exits with code 75."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h; lets a scheduler distinguish it from finished (0) and failed (1, 2)


class NotFiniteError(UserError):
    """The loss, gradient or parameters of a step are not finite. This run cannot continue; later runs still can."""


class Collapsed(UserError):
    """The outputs are the same for all images, and config.health.stop ends such a run."""

    exit_code = 77


def listed(differences: list[str]) -> str:
    """Joins the first `NAMED` differences for a message, followed by the number of others."""
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
