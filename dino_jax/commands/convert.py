"""Converts trained weights between all forms that this package reads and writes.

    dino-jax convert runs/a a.safetensors --to=timm

SOURCE is anything that `dino_jax.load_backbone` reads: a run, an export, or a weights file. FORM is one of
  official             the teacher's backbone for the official code (.safetensors, or .pth with torch installed)
  timm                 the same for timm and, for ResNets, torchvision; names differ for DINOv2 and XCiT
  hf                   a folder for Hugging Face's AutoModel and AutoImageProcessor (ViTs)
  orbax                an export folder of this package, with heads, student and center if SOURCE has them
  stablehlo            a file that JAX runs without this package, with its model card in a second file
  official_checkpoint  student, teacher, heads and center, as saved by the official trainer
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from dino_jax import atomic, checkpoints
from dino_jax.commands import cli
from dino_jax.errors import UserError
from dino_jax.models.registry import variant_on_card
from dino_jax.weights import huggingface, load, official, stablehlo, tensor_files, timm
from dino_jax.weights.backbone import backbone_of
from dino_jax.weights.pretrained import Pretrained, Weights

USAGE = "SOURCE TARGET --to=FORM"


def define_flags(arguments: Sequence[str]) -> None:
    """Defines the flags for the target form and for changes of the backbone."""
    flags.DEFINE_enum("to", None, list(FORMS), "form to write")
    flags.DEFINE_integer("image_size", None, "resize the position embeddings to images of this size in pixels")
    flags.DEFINE_integer("in_channels", None, "adapt the patch embedding to this number of channels")
    flags.DEFINE_integer("num_heads", None, "attention heads of SOURCE, if it does not state them")


def main(arguments: Sequence[str]) -> None:
    """Converts SOURCE to TARGET."""
    if len(arguments) != 2:
        raise UserError(f"usage: dino-jax convert {USAGE}, with FORM one of {', '.join(FORMS)}")
    values = flags.FLAGS
    source, target, form = arguments[0], Path(arguments[1]), cli.required("to", values.to)
    cli.require_local("TARGET", arguments[1])
    for path in (target, Path(f"{target}.tmp"), Path(f"{target}.json")):  # paths that some form writes
        if path.exists():
            raise UserError(f"{path} exists: remove it or give another TARGET")
    everything = form in KEEP_EVERYTHING
    pretrained = load.load_weights(
        source,
        training=everything,
        image_size=values.image_size,
        in_channels=values.in_channels,
        num_heads=values.num_heads,
    )
    with atomic.disk_errors(target, "make room or give another TARGET"):
        target.parent.mkdir(parents=True, exist_ok=True)
        FORMS[form](pretrained, target)
    architecture = pretrained.card["architecture"]
    patches = f"/{architecture['patch_size']}" if architecture["patch_size"] else ""
    count = sum(x.size for x in jax.tree.leaves(pretrained.teacher.params["backbone"]))
    print(f"{source} -> {target}: {architecture['arch']}{patches}, {count / 1e6:.1f} M parameters, as {form}")
    if not everything:
        print(f"only the teacher's backbone; {' and '.join(KEEP_EVERYTHING)} also keep heads, student and center")
    if target.suffix in (".pth", ".pt"):
        trained = pretrained.card["preprocessing"]
        sizes = f"shorter side {trained['resize']}, center {trained['crop']}"
        numbers = f"mean {trained['mean']}, std {trained['std']}"
        print(f"a {target.suffix} file does not store its preprocessing: {sizes}, {numbers}")
        if _resizes_otherwise(architecture, form):
            print("or how positions are resized, which is assumed from its tensors: write .safetensors to keep it")
        if architecture["arch"] == "vit":
            print(f"or its number of attention heads: load it with num_heads={architecture['num_heads']}")


def _resizes_otherwise(architecture: Mapping[str, Any], form: str) -> bool:
    """Returns whether positions of a ViT are resized in another way than a file without settings lets assume."""
    if not (variant := variant_on_card(architecture)):
        return False
    mask_token = variant["mask_token"] and form != "timm"  # which has none
    assumed = official.assumed_antialias(variant["registers"], variant["layer_scale"] > 0, mask_token)
    return variant["pos_offset"] is not None or variant["antialias"] != assumed


def write_official(pretrained: Pretrained, target: Path) -> None:
    """Writes the teacher's backbone under the official names."""
    tensors = official.with_counters(_tensors(pretrained.teacher, "backbone"))
    tensor_files.write(target, tensors, load.file_metadata(pretrained.card))


def write_timm(pretrained: Pretrained, target: Path) -> None:
    """Writes the teacher's backbone under timm's names."""
    tensors = timm.from_official(official.with_counters(_tensors(pretrained.teacher, "backbone")))
    tensor_files.write(target, tensors, load.file_metadata(pretrained.card))


def write_huggingface(pretrained: Pretrained, target: Path) -> None:
    """Writes a folder for `from_pretrained`."""
    huggingface.write_folder(target, _tensors(pretrained.teacher, "backbone"), pretrained.card)


def write_orbax(pretrained: Pretrained, target: Path) -> None:
    """Writes an export folder, with a `training` tree next to the backbone's variables if there is more to keep."""
    teacher, student = pretrained.teacher, pretrained.student
    trees: dict[str, Any] = {
        "variables": {"params": teacher.params["backbone"], "batch_stats": teacher.stats["backbone"]}
    }
    if "head" in teacher.params:
        heads = [part for part in teacher.params if part != "backbone"]
        trees["training"] = {
            "teacher": {part: teacher.params[part] for part in heads},
            "teacher_stats": {part: teacher.stats.get(part, {}) for part in heads},
        }
        if student is not None:
            trees["training"] |= {"student": student.params, "student_stats": student.stats}
        centers = {"center": pretrained.center, "patch_center": pretrained.patch_center}
        trees["training"] |= {name: x for name, x in centers.items() if x is not None}
    checkpoints.write_export(target, trees, pretrained.card)


def write_stablehlo(pretrained: Pretrained, target: Path) -> None:
    """Writes the teacher's backbone as a program."""
    stablehlo.write_stablehlo(target, backbone_of(pretrained))


def write_official_checkpoint(pretrained: Pretrained, target: Path) -> None:
    """Writes a checkpoint of the official trainer, without optimizer and epoch.

    In one of DINO the student always has the prefix of torch's data parallel wrapper (`module.`), the teacher only if
    the model uses batch norm. In one of DINOv2, which a mask token shows, heads have other names, and no prefix.
    """
    if pretrained.student is None or pretrained.center is None or "head" not in pretrained.student.params:
        raise UserError("SOURCE lacks student, heads or center: use --to=official to convert its backbone")
    dinov2 = pretrained.card["architecture"].get("mask_token", False)
    parts = DINOV2_PARTS if dinov2 else DINO_PARTS
    wrapped = "module." if jax.tree.leaves(pretrained.teacher.stats) else ""
    networks = {"student": (pretrained.student, "" if dinov2 else "module."), "teacher": (pretrained.teacher, wrapped)}
    checkpoint: dict[str, Any] = {
        who: {
            f"{prefix}{parts[part]}.{name}": x
            for part in weights.params
            for name, x in official.with_counters(_tensors(weights, part)).items()
        }
        for who, (weights, prefix) in networks.items()
    }
    checkpoint |= {"dino_loss": {"center": pretrained.center[None]}}
    tensor_files.write(target, checkpoint, load.file_metadata(pretrained.card))


def _tensors(weights: Weights, part: str) -> dict[str, np.ndarray]:
    tensors = official.to_official(weights.params[part]) | official.to_official(weights.stats.get(part, {}))
    if part != "backbone" and "last_layer.weight_g" not in tensors:  # not a parameter here if it is fixed at 1
        tensors["last_layer.weight_g"] = np.ones((len(tensors["last_layer.weight_v"]), 1), np.float32)
    return tensors


FORMS = {
    "official": write_official,
    "timm": write_timm,
    "hf": write_huggingface,
    "orbax": write_orbax,
    "stablehlo": write_stablehlo,
    "official_checkpoint": write_official_checkpoint,
}
# Part of `Weights` -> its name in a checkpoint of the official trainer.
DINO_PARTS = {"backbone": "backbone", "head": "head"}
DINOV2_PARTS = {"backbone": "backbone", "head": "dino_head", "patch_head": "ibot_head"}
KEEP_EVERYTHING = ("orbax", "official_checkpoint")
