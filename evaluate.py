"""Evaluates a trained backbone.

python evaluate.py knn --checkpoint=runs/a --config.train=folder:train --config.test=folder:val --config.k=10,20
python evaluate.py linear --checkpoint=runs/a --config.train=folder:train --config.test=folder:val
python evaluate.py attention --checkpoint=runs/a --config.images=photo.jpg
python evaluate.py attention --checkpoint=runs/a --config.video=clip.mp4
python evaluate.py attention_jaccard --checkpoint=runs/a --config.data=/data/VOCdevkit/VOC2012
python evaluate.py video_segmentation --checkpoint=runs/a --config.data=/data/DAVIS
python evaluate.py retrieval --checkpoint=runs/a --config.data=/data/revisited --config.dataset=rparis6k
python evaluate.py copy_detection --checkpoint=runs/a --config.data=copydays --config.whitening=yfcc20k
"""

import json
import sys
import time
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from dino_jax.commands import cli
from dino_jax.distributed.processes import set_cpu_device_count
from dino_jax.errors import UserError
from dino_jax.evals import PROTOCOLS
from dino_jax.weights.backbone import load_backbone

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "a run, an export, or a file of weights (docs/weights.md)")
NUM_HEADS = flags.DEFINE_integer("num_heads", None, "attention heads, where a file of weights does not state them")
OUT = flags.DEFINE_string("out", None, "folder for results.json and pictures (default: CHECKPOINT/eval/PROTOCOL)")


def main(argv: list[str]) -> None:
    """argv: the program and the protocol; everything else is flags."""
    if len(argv) != 2 or argv[1] not in PROTOCOLS:
        raise UserError(f"usage: evaluate.py PROTOCOL --checkpoint=PATH, with PROTOCOL one of {', '.join(PROTOCOLS)}")
    protocol, checkpoint = argv[1], cli.required("checkpoint", CHECKPOINT.value)
    set_cpu_device_count(flags.FLAGS.config.get("batch_size", 0))
    backbone = load_backbone(checkpoint, num_heads=NUM_HEADS.value)
    # Beside a file of weights, in a folder of its name.
    folder = Path(checkpoint) if Path(checkpoint).is_dir() else Path(checkpoint).with_suffix("")
    out = Path(OUT.value or folder / "eval" / protocol)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't write to {out} ({error.strerror}): set --out to another folder") from error
    results = PROTOCOLS[protocol].run(backbone, flags.FLAGS.config, out)
    record = {
        "protocol": protocol,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "checkpoint": checkpoint,
        **results,
        "model": backbone.card,
    }
    (out / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {out}")


def define_config(argv: list[str]) -> None:
    """Gives --config the knobs of the protocol named on the command line."""
    if named := [name for name in argv[1:] if name in PROTOCOLS]:
        cli.config_dict_flag(PROTOCOLS[named[0]].default_config())
    else:
        # Takes any --config.KEY, so that main can name the protocols rather than absl the first flag it doesn't know.
        anything = ml_collections.ConfigDict()
        config_flags.DEFINE_config_dict("config", anything, lock_config=False, accept_new_attributes=True)


if __name__ == "__main__":
    define_config(sys.argv)
    cli.run(main)
