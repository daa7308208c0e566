"""Writes a page that shows a run: verdict and findings, curves, nearest neighbors, attention, components of patches.

    dino-jax report runs/mine

The page, WORKDIR/report.html, holds everything in one file and loads nothing from elsewhere. It can be written while
the run goes on, from its log and its last checkpoint.
"""

import sys
from collections.abc import Sequence

import jax
from ml_collections import ConfigDict

from dino_jax.errors import UserError
from dino_jax.report.page import write_report

USAGE = "WORKDIR"


def define_flags(arguments: Sequence[str]) -> None:
    """The command has no flags of its own."""
    del arguments


def after_training(config: ConfigDict, workdir: str) -> None:
    """Writes the page of a run that has ended, if config.health.report asks for it. What fails costs the page only."""
    if not config.health.report:
        return
    if jax.process_count() > 1:
        print(f"for a page about this run: dino-jax report {workdir}")
        return
    try:
        print(f"written to {write_report(workdir)}")
    except UserError as error:
        print(f"no report.html: {error}", file=sys.stderr)


def main(arguments: Sequence[str]) -> None:
    """Writes the page."""
    if len(arguments) != 1:
        raise UserError(f"usage: dino-jax report {USAGE}")
    print(f"written to {write_report(arguments[0])}")
