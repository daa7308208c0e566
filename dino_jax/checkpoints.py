"""What a run leaves on disk: checkpoints to resume from, its config, and the teacher's backbone for everyone else.

workdir/
  config.json          the config of the run
  checkpoints/STEP/    state (Orbax), metadata (config and versions), manifest.json (a hash of each file)
  export/              variables (Orbax), card.json (architecture, preprocessing, provenance), manifest.json

A workdir is a path that all processes see. All of them call these functions; process 0 alone writes JSON.
"""

import hashlib
import importlib.metadata
import json
import platform
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

from dino_jax import whole
from dino_jax.errors import UserError, listed
from dino_jax.models import VITS, build_backbone

MANIFEST = "manifest.json"

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
    with whole.disk_errors(f"to --workdir={workdir}", "give another folder"):
        directory.mkdir(parents=True, exist_ok=True)

    def write_manifest_of_save_in_progress():
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


def tree_of(folder: Path) -> dict:
    """The structure of an Orbax tree on disk, as a target for `restore_arrays`."""
    return ocp.PyTreeCheckpointHandler().metadata(folder).tree


def read_metadata(folder: Path) -> dict:
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
        _write_json(Path(workdir) / "config.json", plain(config))


def model_card(config: Any, step: int) -> dict:
    """What a user of the exported backbone must know: architecture, preprocessing and provenance, as plain JSON."""
    config = plain(config)
    backbone = build_backbone(config["model"]["arch"], patch_size=config["model"]["patch_size"])
    return {
        "architecture": {
            "arch": config["model"]["arch"],
            "patch_size": config["model"]["patch_size"] if config["model"]["arch"] in VITS else None,
            "in_channels": config["model"]["in_channels"],
            "image_size": config["crops"]["global_size"],
            "embed_dim": backbone.embed_dim,
        },
        "preprocessing": {
            "resize": config["eval"]["resize"],
            "crop": config["eval"]["crop"],
            "mean": config["data"]["mean"],
            "std": config["data"]["std"],
            "interpolation": "bicubic",
        },
        "provenance": {
            "step": int(step),
            "data_source": config["data"]["source"],
            "versions": versions(),
            "config": config,
        },
    }


def export(folder: str | Path, trees: Mapping[str, Any], card: Mapping) -> Path:
    """Writes trees of arrays, each to a subfolder of its name, and a `model_card` to `folder`, and returns that path.

    What was there stays until the new one is complete. Raises UserError where it can't be written.
    """
    final = Path(folder).resolve()
    unfinished = whole.unfinished_folder(final)
    with whole.disk_errors(final):
        if jax.process_index() == 0:
            whole.begin_folder(final)
        multihost_utils.sync_global_devices("export_begin")
        with ocp.StandardCheckpointer() as checkpointer:
            for name, tree in trees.items():
                checkpointer.save(unfinished / name, tree)
        if jax.process_index() == 0:
            _write_json(unfinished / "card.json", card)
            write_manifest(unfinished)
            whole.finish_folder(final)
        multihost_utils.sync_global_devices("export_end")
    return final


def write_manifest(folder: Path) -> None:
    """Writes `folder/manifest.json`: the SHA-256 of the card and of each file in folder's subfolders, by its path."""
    files = sorted(path for pattern in ("card.json", "*/**/*") for path in folder.glob(pattern) if path.is_file())
    _write_json(folder / MANIFEST, {path.relative_to(folder).as_posix(): _sha256(path) for path in files})


def damage(folder: Path) -> str | None:
    """What is wrong with a folder's files by its manifest, or None. Orbax itself restores flipped bits silently.

    In the subfolders that the manifest tells of, files that it does not tell of count as well, hidden ones aside (which
    file managers and NFS leave): Orbax reads some by their names.
    """
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        if not manifest or text != _json(manifest):  # not as we write it: cut short, for one
            return f"{MANIFEST} has changed"
        for name, expected in manifest.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if _sha256(path) != expected:
                return f"{name} has changed"
        for subfolder in sorted({name.split("/")[0] for name in manifest if "/" in name}):
            for path in sorted((folder / subfolder).rglob("*")):
                name = path.relative_to(folder).as_posix()
                if path.is_file() and not path.name.startswith(".") and name not in manifest:
                    return f"{name} was added"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"{getattr(error, 'filename', None) or MANIFEST} is unreadable"
    return None


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide what a state means."""
    return {"python": platform.python_version()} | {
        name: _version(name) for name in ("dino_jax", "jax", "flax", "optax", "orbax-checkpoint")
    }


def plain(config: Any) -> dict:
    """A ConfigDict or dict as JSON would give it back: dicts, lists, numbers, strings."""
    return json.loads(json.dumps(config.to_dict() if hasattr(config, "to_dict") else config))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed (run from its source folder)"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, value: Any) -> None:
    with whole.file(path) as unfinished:
        unfinished.write_text(_json(value), encoding="utf-8")


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


@contextmanager
def _saving(directory: Path) -> Iterator[None]:
    """Where a save fails for want of room: one line, and what was half-written gives its room back."""
    try:
        with whole.disk_errors(directory, MAKE_ROOM):
            yield
    except UserError:
        if jax.process_index() == 0:
            for unfinished in directory.glob(UNFINISHED):
                shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _state_settings(config: Mapping) -> dict[str, Any]:
    """The settings that shape the state, by dotted name."""
    settings = {f"{section}.{key}": value for section in STATE_SECTIONS for key, value in config[section].items()}
    for name in STATE_KEYS:
        value = config
        for key in name.split("."):
            value = value[key]
        settings[name] = value
    return {name: value for name, value in settings.items() if name not in FREE_KEYS}


def _require_same_settings(saved: Mapping, current: Mapping, folder: Any) -> None:
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
