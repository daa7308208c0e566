"""Evaluates a trained backbone with one of the protocols.

    dino-jax evaluate knn --checkpoint=runs/a --config.train=folder:train --config.test=folder:val
    dino-jax evaluate linear --checkpoint=runs/a --config.train=folder:train --config.test=folder:val
    dino-jax evaluate attention --checkpoint=runs/a --config.images=photo.jpg
    dino-jax evaluate attention --checkpoint=runs/a --config.video=clip.mp4
    dino-jax evaluate attention_jaccard --checkpoint=runs/a --config.data=/data/VOCdevkit/VOC2012
    dino-jax evaluate video_segmentation --checkpoint=runs/a --config.data=/data/DAVIS
    dino-jax evaluate segmentation --checkpoint=runs/a --config.data=/data/VOCdevkit/VOC2012
    dino-jax evaluate retrieval --checkpoint=runs/a --config.data=/data/revisited --config.dataset=rparis6k
    dino-jax evaluate copy_detection --checkpoint=runs/a --config.data=copydays --config.whitening=yfcc20k
    dino-jax evaluate features --checkpoint=runs/a --config.source=folder:photos
    dino-jax evaluate projection --checkpoint=runs/a --config.source=folder:photos
    dino-jax evaluate patch_pca --checkpoint=runs/a --config.images=photo.jpg

`dino-jax evaluate PROTOCOL --help` shows the settings of a protocol. Results, settings and the model card are written
to OUT/results.json. Started on several hosts with --config.distributed.*, as for training, it is one evaluation: the
hosts share the images, and process 0 writes the results. --beam extracts features on Apache Beam instead.
"""

import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

import jax
from absl import flags
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from dino_jax import atomic, checkpoints, recipes, storage
from dino_jax.commands import cli
from dino_jax.data import beam
from dino_jax.distributed import consistency, processes
from dino_jax.distributed.watchdog import Watchdog
from dino_jax.errors import UserError
from dino_jax.evals import DIVIDED, PROTOCOLS, features
from dino_jax.lease import exclusive
from dino_jax.limits import check_numbers
from dino_jax.training import config_checks
from dino_jax.weights.backbone import load_backbone

USAGE = "PROTOCOL --checkpoint=PATH [--out=FOLDER] [--config.KEY=VALUE ...]"
NO_LIMITS = ConfigDict({"seconds": 0.0, "slow_seconds": 0.0})  # of the watchdog: a protocol may take hours


def define_flags(arguments: Sequence[str]) -> cli.Settings | None:
    """Defines the flags for checkpoint and results, and returns the settings of the protocol on the command line."""
    flags.DEFINE_string("checkpoint", None, "a run, an export, or a weights file (docs/weights.md), also in a bucket")
    flags.DEFINE_integer("num_heads", None, "attention heads, if a weights file does not state them")
    flags.DEFINE_string(
        "out", None, "folder for results.json and pictures, also in a bucket; default: CHECKPOINT/eval/PROTOCOL"
    )
    flags.DEFINE_string("beam", "", f"{beam.HELP}; for the protocol features")
    named = [
        argument
        for before, argument in zip(["", *arguments], arguments, strict=False)
        if argument in PROTOCOLS and (not before.startswith("-") or "=" in before)  # not the value of a flag
    ]
    if named:
        protocol, training = PROTOCOLS[named[0]], recipes.load("default").get_config
        config = protocol.default_config()
        with config.unlocked():
            config.distributed = training().distributed
        return cli.Settings(config, [protocol.default_config, training], f"{named[0]}: {protocol.__doc__}")
    if cli.wants_help(arguments):
        return None
    raise UserError(f"usage: dino-jax evaluate {USAGE}, with PROTOCOL one of {', '.join(PROTOCOLS)}")


def main(arguments: Sequence[str]) -> None:
    """Runs the protocol and writes results.json."""
    if len(arguments) != 1:
        raise UserError(f"give one protocol, not {' '.join(arguments)}: change settings with --config.KEY=VALUE")
    [protocol], config, checkpoint = arguments, flags.FLAGS.config, cli.required("checkpoint", flags.FLAGS.checkpoint)
    joining = {name: limit for name, limit in config_checks.LIMITS.items() if name.startswith("distributed.")}
    check_numbers(config, PROTOCOLS[protocol].LIMITS | joining)
    distributed = config.distributed
    with config.unlocked():
        del config.distributed  # results do not depend on it
    processes.set_cpu_device_count(config.get("batch_size", 0), distributed.num_processes)
    processes.initialize(distributed)
    out = flags.FLAGS.out or f"{results_folder(checkpoint)}/eval/{protocol}"
    if flags.FLAGS.beam:
        if protocol != "features" or jax.process_count() > 1:
            raise UserError("--beam is for the protocol features, started by one process: remove it")
        cli.require_local("--out with --beam", out)
        features.extract_on_beam(checkpoint, flags.FLAGS.num_heads, config, Path(out), flags.FLAGS.beam)
    with Watchdog(NO_LIMITS, distributed.heartbeat):
        consistency.require_same(lambda: {"protocol": protocol} | consistency.settings(config))
        evaluate(protocol, checkpoint, config, out, flags.FLAGS.num_heads)


def results_folder(checkpoint: str) -> str:
    """Returns the folder with the results of a checkpoint: its own, or for a file one beside it with its name."""
    is_file = storage.Store(checkpoint).is_file() if storage.is_remote(checkpoint) else not Path(checkpoint).is_dir()
    return os.path.splitext(checkpoint)[0] if is_file else checkpoint.rstrip("/")


def evaluate(protocol: str, checkpoint: str, config: ConfigDict, out: str | Path, num_heads: int | None = None) -> None:
    """Evaluates on all processes. Process 0 prints and writes to `out`; the others to a folder that does not last."""
    first = jax.process_index() == 0
    with ExitStack() as context:

        def own() -> checkpoints.Mirror:
            require_owned = context.enter_context(exclusive(out, "--out"))
            return context.enter_context(checkpoints.mirrored(out, require_owned))

        if not first:
            context.enter_context(redirect_stdout(context.enter_context(open(os.devnull, "w"))))
            out = Path(context.enter_context(tempfile.TemporaryDirectory()))
        mirror = processes.on_every_process(own, size=lambda _: 1)
        backbone = load_backbone(checkpoint, num_heads=num_heads)
        if first or protocol in DIVIDED:
            results = PROTOCOLS[protocol].run(backbone, config, mirror.local)
            record = {
                "protocol": protocol,
                "time": time.strftime("%Y-%m-%d %H:%M:%S"),
                "checkpoint": checkpoint,
                **results,
                "model": backbone.card,
            }
            atomic.write_json(mirror.local / "results.json", record)
            mirror.flush()
            print(f"written to {out}")
        if jax.process_count() > 1:  # process 0 stays until all are done, because JAX ends the others with it
            multihost_utils.sync_global_devices("evaluated")
