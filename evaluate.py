"""Evaluates a backbone: `python evaluate.py PROTOCOL ...` is `dino-jax evaluate PROTOCOL ...` for a checkout."""

import sys

from dino_jax.commands.cli import run

if __name__ == "__main__":
    run("evaluate", sys.argv[1:])
