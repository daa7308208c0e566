"""The files of a run: checkpoints to resume from, the config, and the exported backbone of the teacher.

workdir/
  config.json          the config of the run
  checkpoints/STEP/    state (Orbax), metadata (config and versions), manifest.json (a hash of each file)
  export/              variables (Orbax), card.json (architecture, preprocessing, provenance), manifest.json

All processes must see the workdir and call these functions. Only process 0 writes JSON. For a workdir in an object
store, `mirrored` gives each process a local copy.
"""

from dino_jax.checkpoints.export import model_card, write_export
from dino_jax.checkpoints.integrity import MANIFEST, damage, write_manifest
from dino_jax.checkpoints.manager import (
    Manager,
    newest_intact,
    open_manager,
    read_metadata,
    require_workdir,
    restore,
    restore_arrays,
    save,
    tree_of,
    write_config,
)
from dino_jax.checkpoints.mirror import Mirror, fetched_run, mirrored

__all__ = [
    "MANIFEST",
    "Manager",
    "Mirror",
    "damage",
    "fetched_run",
    "mirrored",
    "model_card",
    "newest_intact",
    "open_manager",
    "read_metadata",
    "require_workdir",
    "restore",
    "restore_arrays",
    "save",
    "tree_of",
    "write_config",
    "write_export",
    "write_manifest",
]
