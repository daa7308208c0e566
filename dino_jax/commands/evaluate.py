"""Evaluates a trained backbone with one of the protocols.

    dino-jax evaluate knn --checkpoint=runs/a --config.train=folder:train --config.test=folder:val
    dino-jax evaluate linear --checkpoint=runs/a --config.train=folder:train --config.test=folder:val
    dino-jax evaluate attention --checkpoint=runs/a --config.images=photo.jpg
    dino-jax evaluate attention --checkpoint=runs/a --config.video=clip.mp4
    dino-jax evaluate attention_jaccard --checkpoint=runs/a --config.data=/data/VOCdevkit/VOC2012
    dino-jax evaluate video_segmentation --checkpoint=runs/a --config.data=/data/DAVIS
    dino-jax evaluate retrieval --checkpoint=runs/a --config.data=/data/revisited --config.dataset=rparis6k
    dino-jax evaluate copy_detection --checkpoint=runs/a --config.data=copydays --config.whitening=yfcc20k
    dino-jax evaluate features --checkpoint=runs/a --config.source=folder:photos
    dino-jax evaluate projection --checkpoint=runs/a --config.source=folder:photos
    dino-jax evaluate patch_pca --checkpoint=runs/a --config.images=photo.jpg

`dino-jax evaluate PROTOCOL --help` shows the settings of a protocol. Results, settings and the model card are written
to OUT/results.json.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dino_jax import atomic
from dino_jax.commands import cli
from dino_jax.distributed.processes import set_cpu_device_count
from dino_jax.errors import UserError
from dino_jax.evals import PROTOCOLS
from dino_jax.limits import check_numbers
from dino_jax.ownership import owned
from dino_jax.weights.backbone import load_backbone

USAGE = "PROTOCOL --checkpoint=PATH [--out=FOLDER] [--config.KEY=VALUE ...]"


def define_flags(arguments: Sequence[str]) -> cli.Settings | None:
    """Defines the flags for checkpoint and results, and returns the settings of the protocol on the command line."""
    flags.DEFINE_string("checkpoint", None, "a run, an export, or a weights file (docs/weights.md)")
    flags.DEFINE_integer("num_heads", None, "attention heads, if a weights file does not state them")
    flags.DEFINE_string("out", None, "folder for results.json and pictures; default: CHECKPOINT/eval/PROTOCOL")
    named = [
        argument
        for before, argument in zip(["", *arguments], arguments, strict=False)
        if argument in PROTOCOLS and (not before.startswith("-") or "=" in before)  # not the value of a flag
    ]
    if named:
        protocol = PROTOCOLS[named[0]]
        return cli.Settings(protocol.default_config(), protocol.default_config, f"{named[0]}: {protocol.__doc__}")
    if cli.wants_help(arguments):
        return None
    raise UserError(f"usage: dino-jax evaluate {USAGE}, with PROTOCOL one of {', '.join(PROTOCOLS)}")


def main(arguments: Sequence[str]) -> None:
    """Runs the protocol and writes results.json."""
    if len(arguments) != 1:
        raise UserError(f"give one protocol, not {' '.join(arguments)}: change settings with --config.KEY=VALUE")
    check_numbers(flags.FLAGS.config, PROTOCOLS[arguments[0]].LIMITS)
    [protocol], checkpoint = arguments, cli.required("checkpoint", flags.FLAGS.checkpoint)
    set_cpu_device_count(flags.FLAGS.config.get("batch_size", 0))
    backbone = load_backbone(checkpoint, num_heads=flags.FLAGS.num_heads)
    # The results of a weights file are written next to it, to a folder with its name.
    folder = Path(checkpoint) if Path(checkpoint).is_dir() else Path(checkpoint).with_suffix("")
    out = Path(flags.FLAGS.out or folder / "eval" / protocol)
    with owned(out, "--out"):
        results = PROTOCOLS[protocol].run(backbone, flags.FLAGS.config, out)
        record = {
            "protocol": protocol,
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            "checkpoint": checkpoint,
            **results,
            "model": backbone.card,
        }
        atomic.write_json(out / "results.json", record)
    print(f"written to {out}")
