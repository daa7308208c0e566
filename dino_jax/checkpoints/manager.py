"""Checkpoints to resume from: saved asynchronously, verified on restore, restored onto any mesh."""

import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from dino_jax import atomic
from dino_jax.checkpoints.integrity import MANIFEST, damage, write_json, write_manifest
from dino_jax.errors import UserError, listed
from dino_jax.provenance import plain, versions

# What may change between a run and its continuation; any other key of these sections shapes the state.
STATE_SECTIONS = ("model", "head")

# The size of global crops sets the grid of learnt positions; batch size, seed and init_from say what step N means.
STATE_KEYS = ("optim.name", "crops.global_size", "batch_size", "seed", "init_from")

FREE_KEYS = ("model.drop_path_rate", "model.remat", "model.unroll", "model.attention")

MAKE_ROOM = "the checkpoints before are intact; make room there, and the same command resumes"

UNFINISHED = "*.orbax-checkpoint-tmp"


class Manager(ocp.CheckpointManager):
    """Orbax's, which raises what went wrong in the background whenever it next waits for that: here, as one line."""

    def wait_until_finished(self) -> None:
        """Returns when the save in progress is on disk. Raises UserError where there is no room for it."""
        with _saving(Path(self.directory)):
            super().wait_until_finished()


def open_manager(workdir: str | Path, checkpoint: Any) -> Manager:
    """The asynchronous manager of `workdir/checkpoints`; whoever opens it closes it, which waits for saves.

    checkpoint: config.checkpoint. Kept are the newest `keep_last` and, unless `keep_every_steps` is 0, every
    multiple of it. What a killed run left half-written is removed. When to save is the caller's business.
    Raises UserError if keep_last is less than 1.
    """
    if checkpoint.keep_last < 1:
        raise UserError(f"checkpoint.keep_last is {checkpoint.keep_last}: a run needs its newest; set it to 1 or more")
    if "://" in str(workdir):
        raise UserError(f"--workdir={workdir} is no local path: mount the bucket and give the mounted path")
    directory = Path(workdir).resolve() / "checkpoints"
    with atomic.disk_errors(f"to --workdir={workdir}", "give another folder"):
        directory.mkdir(parents=True, exist_ok=True)

    def write_manifest_of_save_in_progress() -> None:
        # Orbax calls this on process 0 when all data is written and before the checkpoint counts as finished, so there
        # is none without a manifest. It does not say which; one save runs at a time.
        for folder in directory.glob("[0-9]*"):
            if not (folder / MANIFEST).exists() and folder.suffix != ".damaged":
                write_manifest(folder)

    options = ocp.CheckpointManagerOptions(
        max_to_keep=checkpoint.keep_last,
        keep_period=checkpoint.keep_every_steps or None,
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(post_finalization_callback=write_manifest_of_save_in_progress),
    )
    return Manager(directory, options=options)


def save(manager: Manager, step: int, state: Any, config: Any) -> bool:
    """Starts saving the state (a pytree of arrays) after `step`; False if that step is saved already.

    Returns once the arrays are copied to the host: the caller may donate them to the next step. Raises UserError where
    there is no room for this one, or was none for the one before; a full disk shows at the next save, wait or close.
    """
    if step in manager.all_steps():
        return False
    metadata = {"config": plain(config), "versions": versions()}
    arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), metadata=ocp.args.JsonSave(metadata))
    with _saving(Path(manager.directory)):
        return manager.save(step, args=arguments, force=True)


def restore(manager: Manager, state_target: Any, config: Any) -> tuple[Any, int] | None:
    """The newest intact checkpoint as (state, step), or None if there is no checkpoint.

    state_target: the state's tree of jax.ShapeDtypeStruct with the shardings wanted, on any mesh. Damaged newer
    checkpoints are renamed to `STEP.damaged`, with one line on stderr. Raises UserError if `config` differs from the
    checkpoint's in what shapes the state, if its arrays are others all the same, or if every checkpoint is damaged.
    """
    step = newest_intact(manager.directory)
    if step is None:
        return None
    folder = Path(manager.directory) / str(step)
    metadata = read_metadata(folder)
    _require_same_settings(metadata["config"], plain(config), folder)
    _require_same_arrays(folder, state_target, metadata["versions"])
    _set_aside(manager, [damaged for damaged in manager.all_steps() if damaged > step])
    restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(state_target)))
    return restored["state"], step


def restore_arrays(folder: Path, target: Any) -> Any:
    """The part of an Orbax tree that `target` (any leaves) has the structure of, as NumPy arrays on every process."""
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
    restore_args = ocp.args.PyTreeRestore(item=target, restore_args=arguments, partial_restore=True)
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(folder, args=restore_args)


def tree_of(folder: Path) -> dict[str, Any]:
    """The structure of an Orbax tree on disk, as a target for `restore_arrays`."""
    return ocp.PyTreeCheckpointHandler().metadata(folder).tree


def read_metadata(folder: Path) -> dict[str, Any]:
    """The config and the library versions saved with the checkpoint in `folder`."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        return checkpointer.restore(folder / "metadata")


def newest_intact(directory: str | Path) -> int | None:
    """The newest step in a `checkpoints` folder whose files match their manifest; None if it holds no checkpoint.

    Each damaged one that is passed over is reported in one line on stderr. Raises UserError if all are damaged.
    """
    directory = Path(directory)
    newest = -1
    if jax.process_index() == 0:
        steps = [int(path.name) for path in directory.glob("*") if path.name.isdigit()]
        for step in sorted(steps, reverse=True):
            problem = damage(directory / str(step))
            if problem is None:
                newest = step
                break
            print(
                f"checkpoint {directory / str(step)} is damaged ({problem}): passed over", file=sys.stderr, flush=True
            )
        else:
            newest = -2 if steps else -1
    newest = int(multihost_utils.broadcast_one_to_all(np.int32(newest)))
    if newest == -2:
        raise UserError(f"every checkpoint in {directory} is damaged: put a copy back or start in another --workdir")
    return None if newest == -1 else newest


def write_config(workdir: str | Path, config: Any) -> None:
    """Writes `workdir/config.json`. Call it after `restore`, which refuses a config that is not the run's."""
    if jax.process_index() == 0:
        write_json(Path(workdir) / "config.json", plain(config))


@contextmanager
def _saving(directory: Path) -> Iterator[None]:
    """Where a save fails for want of room: one line, and what was half-written gives its room back."""
    try:
        with atomic.disk_errors(directory, MAKE_ROOM):
            yield
    except UserError:
        if jax.process_index() == 0:
            for unfinished in directory.glob(UNFINISHED):
                shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _state_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that shape the state, by dotted name."""
    settings = {f"{section}.{key}": value for section in STATE_SECTIONS for key, value in config[section].items()}
    for name in STATE_KEYS:
        value = config
        for key in name.split("."):
            value = value[key]
        settings[name] = value
    return {name: value for name, value in settings.items() if name not in FREE_KEYS}


def _require_same_settings(saved: Mapping[str, Any], current: Mapping[str, Any], folder: Any) -> None:
    saved, current = _state_settings(saved), _state_settings(current)
    different = [name for name in current if name in saved and saved[name] != current[name]]
    if different:
        changes = ", ".join(f"{name} is {current[name]!r}, there {saved[name]!r}" for name in different)
        raise UserError(
            f"checkpoint {folder} is of another run: {changes}; use another --workdir or the checkpoint's settings"
        )


def _require_same_arrays(folder: Path, target: Any, written_by: Mapping[str, str]) -> None:
    """With the same settings, code or libraries of another version can still mean other arrays."""
    saved, current = _arrays(tree_of(folder / "state")), _arrays(ocp.tree.serialize_tree(target, keep_empty_nodes=True))
    different = [
        f"{name} is {current.get(name, 'not in it')}, there {saved.get(name, 'missing')}"
        for name in sorted(saved | current)
        if saved.get(name) != current.get(name)
    ]
    if different:
        raise UserError(
            f"checkpoint {folder} holds another state than this code's: {listed(different)}; use "
            f"another --workdir or what wrote it ({', '.join(' '.join(one) for one in written_by.items())})"
        )


def _arrays(tree: Any) -> dict[str, str]:
    """Type and shape of each array by its name on disk."""
    leaves = ocp.tree.to_flat_dict(tree, sep=".")
    return {name: f"{np.dtype(x.dtype)} {list(x.shape)}" for name, x in leaves.items() if hasattr(x, "shape")}


def _set_aside(manager: Manager, steps: list[int]) -> None:
    """Renames damaged checkpoints, so that the run can save these steps again."""
    if not steps:
        return
    if jax.process_index() == 0:
        for step in steps:
            folder = Path(manager.directory) / str(step)
            shutil.rmtree(folder.with_name(f"{step}.damaged"), ignore_errors=True)
            folder.rename(folder.with_name(f"{step}.damaged"))
    multihost_utils.sync_global_devices("set_aside_damaged_checkpoints")
    manager.reload()
