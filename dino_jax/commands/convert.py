"""Converts trained weights from any form that this package reads to any form that it writes.

    dino-jax convert runs/a a.safetensors --to=timm

SOURCE is what `dino_jax.load_backbone` takes: a run, an export, or a file of weights. FORM is one of
  official             the teacher's backbone for the official code (.safetensors, or .pth with torch installed)
  timm                 the same file: its names are also those of timm and, for a ResNet, torchvision
  hf                   a folder for Hugging Face's AutoModel and AutoImageProcessor (ViTs)
  orbax                an export folder of this package, with heads, student and center if SOURCE has them
  stablehlo            a file that JAX runs without this package, and its model card beside it
  official_checkpoint  student, teacher, heads and center, as the official trainer saves them
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from dino_jax import atomic, checkpoints
from dino_jax.commands import cli
from dino_jax.errors import UserError
from dino_jax.weights import huggingface, load, official, stablehlo, tensor_files
from dino_jax.weights.backbone import backbone_of
from dino_jax.weights.load import Pretrained, Weights

USAGE = "SOURCE TARGET --to=FORM"


def define_flags(arguments: Sequence[str]) -> None:
    """The form to write, and changes of the backbone."""
    flags.DEFINE_enum("to", None, list(FORMS), "form to write")
    flags.DEFINE_integer("image_size", None, "resize the position embeddings for images of this many pixels")
    flags.DEFINE_integer("in_channels", None, "change the patch embedding for this many channels")
    flags.DEFINE_integer("num_heads", None, "attention heads of SOURCE, if it does not state them")


def main(arguments: Sequence[str]) -> None:
    """Converts SOURCE to TARGET."""
    if len(arguments) != 2:
        raise UserError(f"usage: dino-jax convert {USAGE}, with FORM one of {', '.join(FORMS)}")
    values = flags.FLAGS
    source, target, form = arguments[0], Path(arguments[1]), cli.required("to", values.to)
    for path in (target, Path(f"{target}.tmp"), Path(f"{target}.json")):  # what a form writes, or would write over
        if path.exists():
            raise UserError(f"{path} exists: remove it or give another TARGET")
    everything = form in KEEP_EVERYTHING
    found = load.load_weights(
        source,
        training=everything,
        image_size=values.image_size,
        in_channels=values.in_channels,
        num_heads=values.num_heads,
    )
    with atomic.disk_errors(target, "make room or give another TARGET"):
        target.parent.mkdir(parents=True, exist_ok=True)
        FORMS[form](found, target)
    architecture = found.card["architecture"]
    patches = f"/{architecture['patch_size']}" if architecture["patch_size"] else ""
    count = sum(x.size for x in jax.tree.leaves(found.teacher.params["backbone"]))
    print(f"{source} -> {target}: {architecture['arch']}{patches}, {count / 1e6:.1f} M parameters, as {form}")
    if not everything:
        print(f"the teacher's backbone alone: {' and '.join(KEEP_EVERYTHING)} keep heads, student and center, too")
    if target.suffix in (".pth", ".pt"):
        trained = found.card["preprocessing"]
        sizes = f"shorter side {trained['resize']}, center {trained['crop']}"
        numbers = f"mean {trained['mean']}, std {trained['std']}"
        print(f"a {target.suffix} file cannot say how its images are prepared: {sizes}, {numbers}")
        if architecture["arch"] == "vit":
            print(f"nor its number of attention heads: load it with num_heads={architecture['num_heads']}")


def write_official(found: Pretrained, target: Path) -> None:
    """The teacher's backbone under the official names."""
    tensors = official.with_counters(_tensors(found.teacher, "backbone"))
    tensor_files.write(target, tensors, load.file_metadata(found.card))


def write_huggingface(found: Pretrained, target: Path) -> None:
    """A folder for `from_pretrained`."""
    huggingface.write_folder(target, _tensors(found.teacher, "backbone"), found.card)


def write_orbax(found: Pretrained, target: Path) -> None:
    """An export folder, with a `training` tree beside the backbone's variables if there is more than a backbone."""
    teacher, student = found.teacher, found.student
    trees: dict[str, Any] = {
        "variables": {"params": teacher.params["backbone"], "batch_stats": teacher.stats["backbone"]}
    }
    if "head" in teacher.params:
        trees["training"] = {
            "teacher": {"head": teacher.params["head"]},
            "teacher_stats": {"head": teacher.stats["head"]},
        }
        if student is not None:
            trees["training"] |= {"student": student.params, "student_stats": student.stats}
        if found.center is not None:
            trees["training"]["center"] = found.center
    checkpoints.write_export(target, trees, found.card)


def write_stablehlo(found: Pretrained, target: Path) -> None:
    """The teacher's backbone as a program."""
    stablehlo.write_stablehlo(target, backbone_of(found))


def write_official_checkpoint(found: Pretrained, target: Path) -> None:
    """What the official trainer saves, less optimizer and epoch.

    There the student is always in torch's data parallel wrapper (`module.`), the teacher only with batch norm.
    """
    if found.student is None or found.center is None or "head" not in found.student.params:
        raise UserError("SOURCE has no student, heads and center to keep: use --to=official for its backbone")
    wrapped = "module." if jax.tree.leaves(found.teacher.stats) else ""
    networks = {"student": (found.student, "module."), "teacher": (found.teacher, wrapped)}
    checkpoint: dict[str, Any] = {
        who: {
            f"{prefix}{part}.{name}": x
            for part in ("backbone", "head")
            for name, x in official.with_counters(_tensors(weights, part)).items()
        }
        for who, (weights, prefix) in networks.items()
    }
    checkpoint |= {"dino_loss": {"center": found.center[None]}}
    tensor_files.write(target, checkpoint, load.file_metadata(found.card))


def _tensors(weights: Weights, part: str) -> dict[str, np.ndarray]:
    tensors = official.to_official(weights.params[part]) | official.to_official(weights.stats[part])
    if part == "head" and "last_layer.weight_g" not in tensors:  # no parameter of ours where it is fixed at 1
        tensors["last_layer.weight_g"] = np.ones((len(tensors["last_layer.weight_v"]), 1), np.float32)
    return tensors


FORMS = {
    "official": write_official,
    "timm": write_official,
    "hf": write_huggingface,
    "orbax": write_orbax,
    "stablehlo": write_stablehlo,
    "official_checkpoint": write_official_checkpoint,
}
KEEP_EVERYTHING = ("orbax", "official_checkpoint")
