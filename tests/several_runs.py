"""Several runs in one process, one after the other: python several_runs.py '[["WORKDIR", {CHANGES}], ...]'.

Prints a line a run, `NAME OF THE WORKDIR: trained` or its UserError.
"""

import json
import sys
from pathlib import Path

from tiny import tiny_config

from dino_jax.errors import UserError
from dino_jax.training import loop

if __name__ == "__main__":
    for workdir, changes in json.loads(sys.argv[1]):
        try:
            loop.train(tiny_config(**changes), workdir)
            outcome = "trained"
        except UserError as error:
            outcome = str(error)
        print(f"{Path(workdir).name}: {outcome}", flush=True)
