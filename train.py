"""Pretrains a backbone: `python train.py ...` is `dino-jax train ...` for a checkout."""

import sys

from dino_jax.commands.cli import run

if __name__ == "__main__":
    run("train", sys.argv[1:])
