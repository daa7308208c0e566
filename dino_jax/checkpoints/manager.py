"""Checkpoints to resume from: saved asynchronously, verified on restore, restored onto any mesh."""

import re
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
from dino_jax.checkpoints.integrity import damage, write_manifest
from dino_jax.errors import UserError, listed
from dino_jax.provenance import flat, plain, versions

# Sections of the config that determine the state, except for FREE_KEYS.
STATE_SECTIONS = ("model", "head")

# The size of global crops sets the grid of learned positions; batch size, seed and init_from define what step N means.
STATE_KEYS = ("method", "optim.name", "crops.global_size", "batch_size", "seed", "init_from", "dinov2.separate_head")

# Settings that may change when a run resumes.
FREE_KEYS = ("model.drop_path_rate", "model.remat", "model.unroll", "model.attention")

MAKE_ROOM = "earlier checkpoints are intact; make room there and resume with the same command"

UNFINISHED = ".orbax-checkpoint-tmp*"  # after the step in the name of a save in progress
STEP = re.compile("0|[1-9][0-9]*")  # names of the folders of finished saves; str.isdigit also accepts "²"


class Manager(ocp.CheckpointManager):
    """Orbax's manager with one-line errors. Orbax raises errors of background saves when it next waits for them."""

    saving = -1  # the step that is being saved; Orbax saves one at a time

    def save(self, step: int, **arguments: Any) -> bool:
        """Starts a save after the previous one is on disk. Raises UserError if the disk is full."""
        self.wait_until_finished()
        with _saving(Path(self.directory)):
            self.saving = step
            return super().save(step, **arguments)

    def wait_until_finished(self) -> None:
        """Waits until the save in progress is on disk. Raises UserError if the disk is full."""
        with _saving(Path(self.directory)):
            super().wait_until_finished()


def open_manager(workdir: str | Path, checkpoint: Any) -> Manager:
    """Opens the asynchronous manager of `workdir/checkpoints`. The caller must close it, which waits for saves.

    checkpoint: config.checkpoint. The manager keeps the newest `keep_last` checkpoints and, unless `keep_every_steps`
    is 0, those of every multiple of it. It removes incomplete checkpoints of killed runs. The caller decides when to
    save. Raises UserError if keep_last is less than 1, or the workdir cannot be written.
    """
    if checkpoint.keep_last < 1:
        raise UserError(
            f"checkpoint.keep_last is {checkpoint.keep_last}: a run needs its newest checkpoint; "
            "set --config.checkpoint.keep_last to 1 or more"
        )
    directory = Path(workdir).resolve() / "checkpoints"
    with atomic.disk_errors(f"to --workdir={workdir}", "give another folder"):
        directory.mkdir(parents=True, exist_ok=True)

    def write_manifest_of_this_save() -> None:
        # Orbax calls this on process 0 after all data is written and before it renames the folder to its final name, so
        # every finished checkpoint has a manifest. No other folder is touched: whoever lost a manifest may be damaged.
        for folder in directory.glob(f"{manager.saving}{UNFINISHED}"):
            write_manifest(folder)

    options = ocp.CheckpointManagerOptions(
        max_to_keep=checkpoint.keep_last,
        keep_period=checkpoint.keep_every_steps or None,
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(post_finalization_callback=write_manifest_of_this_save),
    )
    manager = Manager(directory, options=options)
    return manager


def save(manager: Manager, step: int, state: Any, config: Any) -> bool:
    """Starts saving the state (a pytree of arrays) after `step`. Returns False if that step is already saved.

    Returns as soon as the arrays are copied to the host, so the caller may donate them to the next step. Raises
    UserError if the disk is full. Saves run in the background, so the error may also be raised by the next save, wait
    or close.
    """
    if step in manager.all_steps():
        return False
    metadata = {"config": plain(config), "versions": versions()}
    arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), metadata=ocp.args.JsonSave(metadata))
    return manager.save(step, args=arguments, force=True)


def restore(manager: Manager, state_target: Any, config: Any) -> tuple[Any, int] | None:
    """Restores the newest intact checkpoint as (state, step). Returns None if there is no checkpoint.

    state_target: tree of jax.ShapeDtypeStruct with the desired shardings, on any mesh. Newer damaged checkpoints are
    renamed to `STEP.damaged` and reported on stderr. Raises UserError if `config` and the checkpoint's config differ in
    a setting that determines the state, if the arrays differ although the settings agree, or if every checkpoint is
    damaged. `state.recent` is empty if the version that wrote the checkpoint did not save it.
    """
    step = newest_intact(manager.directory)
    if step is None:
        return None
    folder = Path(manager.directory) / str(step)
    metadata = read_metadata(folder)
    try:
        _require_same_settings(metadata["config"], plain(config), folder)
        written_by = dict(metadata["versions"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the config of checkpoint {folder} is not one of this version ({type(error).__name__}: {error}): use "
            "another --workdir or the version that wrote it"
        ) from error
    saved = _arrays(tree_of(folder / "state"))
    if hasattr(state_target, "recent") and not any(name.startswith("recent.") for name in saved):
        state_target = state_target.replace(recent={})
    expected = _arrays(ocp.tree.serialize_tree(state_target, keep_empty_nodes=True))
    _require_same_arrays(folder, saved, expected, written_by)
    _set_aside(manager, [damaged for damaged in manager.all_steps() if damaged > step])
    restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(state_target)))
    return restored["state"], step


def restore_arrays(folder: Path, target: Any) -> Any:
    """Restores the subtree of an Orbax tree that matches `target` (any leaves), as NumPy arrays on every process."""
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
    restore_args = ocp.args.PyTreeRestore(item=target, restore_args=arguments, partial_restore=True)
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(folder, args=restore_args)


def tree_of(folder: Path) -> dict[str, Any]:
    """Returns the structure of an Orbax tree on disk, as a target for `restore_arrays`."""
    return ocp.PyTreeCheckpointHandler().metadata(folder).tree


def read_metadata(folder: Path) -> dict[str, Any]:
    """Returns the config and the library versions saved with the checkpoint in `folder`."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        return checkpointer.restore(folder / "metadata")


def newest_intact(directory: str | Path) -> int | None:
    """Returns the newest step in a `checkpoints` folder whose files match their manifest; None without checkpoints.

    Reports each damaged checkpoint that it skips on stderr. Raises UserError if all checkpoints are damaged.
    """
    directory = Path(directory)
    newest = -1
    if jax.process_index() == 0:
        steps = [int(path.name) for path in directory.glob("*") if STEP.fullmatch(path.name) and path.is_dir()]
        for step in sorted(steps, reverse=True):
            problem = damage(directory / str(step))
            if problem is None:
                newest = step
                break
            print(f"checkpoint {directory / str(step)} is damaged ({problem}): skipped", file=sys.stderr, flush=True)
        else:
            newest = -2 if steps else -1
    newest = int(multihost_utils.broadcast_one_to_all(np.int32(newest)))
    if newest == -2:
        raise UserError(f"every checkpoint in {directory} is damaged: restore a copy or start in another --workdir")
    return None if newest == -1 else newest


def write_config(workdir: str | Path, config: Any) -> None:
    """Writes `workdir/config.json`. Call it after `restore`, which rejects the config of another run."""
    if jax.process_index() == 0:
        atomic.write_json(Path(workdir) / "config.json", plain(config))


def require_workdir(workdir: str | Path) -> None:
    """Raises UserError if the workdir was deleted or moved since `write_config`."""
    if jax.process_index() == 0 and not (Path(workdir) / "config.json").is_file():
        raise UserError(f"{workdir} was deleted or moved during the run: start again in another --workdir")


@contextmanager
def _saving(directory: Path) -> Iterator[None]:
    """Turns disk errors of a save into a UserError, and deletes the incomplete checkpoint to free its space."""
    try:
        with atomic.disk_errors(directory, MAKE_ROOM):
            yield
    except UserError:
        if jax.process_index() == 0:
            for unfinished in directory.glob(f"*{UNFINISHED}"):
                shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _state_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that determine the state, by dotted name, as far as the config has them."""
    return {
        name: value
        for name, value in flat(config).items()
        if (name.split(".")[0] in STATE_SECTIONS or name in STATE_KEYS) and name not in FREE_KEYS
    }


def _require_same_settings(saved: Mapping[str, Any], current: Mapping[str, Any], folder: Any) -> None:
    saved, current = _state_settings(saved), _state_settings(current)
    different = [name for name in current if name in saved and saved[name] != current[name]]
    if different:
        changes = ", ".join(f"{name} is {current[name]!r}, was {saved[name]!r}" for name in different)
        raise UserError(
            f"checkpoint {folder} belongs to another run: {changes}; use another --workdir or the checkpoint's settings"
        )


def _require_same_arrays(
    folder: Path, saved: Mapping[str, str], current: Mapping[str, str], written_by: Mapping[str, str]
) -> None:
    """Raises UserError if the arrays (see `_arrays`) differ, which code or libraries of another version can cause."""
    different = [
        f"{name} is {current.get(name, 'missing')}, was {saved.get(name, 'missing')}"
        for name in sorted({*saved, *current})
        if saved.get(name) != current.get(name)
    ]
    if different:
        raise UserError(
            f"checkpoint {folder} does not hold the state that this code expects: {listed(different)}; use another "
            f"--workdir or the versions that wrote it ({', '.join(' '.join(one) for one in written_by.items())})"
        )


def _arrays(tree: Any) -> dict[str, str]:
    """Returns dtype and shape of each array, by its name on disk."""
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
