"""Loads trained weights from a run of this package, an export, or a PyTorch file or folder."""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dino_jax import checkpoints, provenance
from dino_jax.errors import UserError
from dino_jax.json_files import FLAG, NUMBER, NUMBERS, OBJECT, POSITIVES, SIZE, TEXT, Kind, parse, read_object, require
from dino_jax.models.registry import num_heads_of, variant_on_card
from dino_jax.weights import huggingface, official, tensor_files, timm
from dino_jax.weights.pretrained import Pretrained, Weights, per_channel, resized, with_channels

# Keys in the metadata of a safetensors file, with JSON values: a section of the card, and, for ViTs, an int and how
# positions are resized (`positions.resize_pos_embed`).
PREPROCESSING, NUM_HEADS, ANTIALIAS, POS_OFFSET = "preprocessing", "num_attention_heads", "antialias", "pos_offset"
HUGGINGFACE_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
)  # one of them is next to config.json
# Keys under which a whole state_dict is saved, and what torch's wrappers put before names, in any order.
WRAPPERS = re.compile(r"((state_dict|model|module|_orig_mod|network)\.)+")
PREPROCESSING_KINDS = {"resize": SIZE, "crop": SIZE, "mean": NUMBERS, "std": POSITIVES}
CARD = {  # what is read of a model card
    "architecture.arch": TEXT,
    "architecture.in_channels": SIZE,
    "architecture.image_size": SIZE,
    **{f"preprocessing.{name}": kind for name, kind in PREPROCESSING_KINDS.items()},
    "provenance": OBJECT,
}
OFFSET = Kind("a number or null", lambda value: value is None or NUMBER.fits(value))
VARIANT = {  # what is read of a ViT's card, where it is there
    "registers": Kind("a whole number", lambda value: value == 0 or SIZE.fits(value)),
    "layer_scale": NUMBER,
    "ffn": TEXT,
    ANTIALIAS: FLAG,
    POS_OFFSET: OFFSET,
    "mask_token": FLAG,
}
EMA = ("model_ema.", "state_dict_ema.", "ema.", "module_ema.")  # a moving average beside the weights
# Keys of an official full checkpoint, of DINO and of DINOv2.
NOT_NETWORKS = ("optimizer", "fp16_scaler", "dino_loss", "epoch", "args", "ibot_patch_loss", "scheduler", "iteration")
HEADS = {"head": "head", "dino_head": "head", "ibot_head": "patch_head"}  # official name -> name in `Weights`
HEAD = re.compile(rf"({'|'.join(HEADS)})\.((?:mlp|last_layer)\..*)", re.DOTALL)
CLASSIFIERS = ("fc.", "head.weight", "head.bias", "classifier.", "pooler.", "vit.pooler.")  # not part of a backbone
DINOV2_CROP = 224  # pixels
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def load_weights(
    path: str | Path,
    *,
    training: bool = True,
    heads: bool = True,
    image_size: int | None = None,
    in_channels: int | None = None,
    num_heads: int | None = None,
) -> Pretrained:
    """Loads weights in any form that `load_backbone` documents.

    Args:
        path: see `load_backbone`.
        training: also load student, heads and center if the source has them. False loads only the teacher's backbone.
        heads: False omits projection heads and center.
        image_size: pixels; resizes the position embeddings to the grid of this size, as the reference does for other
            image sizes. Changes the preprocessing of the card to match.
        in_channels: sums the patch embedding (a convnet's first kernel) over channels for fewer channels, repeats it
            for more. Changes the preprocessing of the card to match.
        num_heads: attention heads of a ViT, for a file that does not state them (`official.backbone_architecture`).

    Raises:
        UserError: the path cannot be read or is incomplete, or num_heads contradicts what it states.
    """
    with checkpoints.fetched_run(path, lambda export, step: not training and covers(export, step)) as local:
        return _load(local, training, heads, image_size, in_channels, num_heads)


def _load(
    path: Path, training: bool, heads: bool, image_size: int | None, in_channels: int | None, num_heads: int | None
) -> Pretrained:
    path = require_path(path)
    if weights := path if path.is_file() else _huggingface_file(path):
        tensors = tensor_files.read(weights)
        settings = ({} if num_heads is None else {NUM_HEADS: num_heads}) | _settings(weights)
        pretrained = _from_tensors(tensors, weights, settings, training, heads)
    else:
        pretrained = _from_run(path, training)
        pretrained = pretrained if heads else _without_heads(pretrained)
    if num_heads is not None and (there := num_heads_of(pretrained.card["architecture"])) != num_heads:
        stated = "has no attention" if there is None else f"states that it has {there} attention heads"
        raise UserError(f"{path} {stated}, but num_heads is {num_heads}: omit num_heads")
    if image_size is not None:
        pretrained = resized(pretrained, image_size)
    return pretrained if in_channels is None else with_channels(pretrained, in_channels)


def require_path(path: str | Path) -> Path:
    """Returns the absolute path. Raises UserError if it does not exist."""
    path = Path(path).absolute()
    if not path.exists():
        raise UserError(
            f"no weights in {path} (no such path): give a run's workdir, an export folder, a Hugging Face "
            "folder, or a .pth or .safetensors file"
        )
    return path


def exported_step(folder: Path) -> int:
    """Returns the training step of the backbone in an export folder, or -1 if it was converted from other weights.

    Raises UserError if the card cannot be read.
    """
    step = read_card(folder)["provenance"].get("step", -1)
    return step if isinstance(step, int) else -1


def covers(export: Path, step: int) -> bool:
    """Returns whether an export is at least as new as the checkpoint of a step."""
    return exported_step(export) >= step


def read_card(folder: Path) -> dict[str, Any]:
    """Returns the model card in an export folder. Raises UserError, which names the key, if it is damaged."""
    path, way_out = folder / "card.json", "copy it again, or resume the run to export again"
    card = read_object(path, CARD, way_out)
    architecture = card["architecture"]
    require(architecture, {name: kind for name, kind in VARIANT.items() if name in architecture}, f"{path}", way_out)
    return card


def _from_run(path: Path, training: bool) -> Pretrained:
    """Loads an export folder, or a workdir: its export, or its newest intact checkpoint if that has a later step.

    The export of a run only holds a backbone, so `training` always prefers a checkpoint.
    """
    # An export that was interrupted between its two renames leaves the previous one as `export.previous`.
    exports = [
        folder for folder in (path, path / "export", path / "export.previous") if (folder / "card.json").is_file()
    ]
    newest = None
    if (path / "checkpoints").is_dir():
        try:
            newest = checkpoints.newest_intact(path / "checkpoints")
        except UserError:  # all are damaged, which has been reported; fall back to an export
            if not exports:
                raise
    if newest is not None and (training or not exports or exported_step(exports[0]) < newest):
        return _from_checkpoint(path / "checkpoints" / str(newest), training)
    if exports:
        return _from_export(exports[0], training)
    raise UserError(
        f"no weights in {path} ({_contents(path)}): give a run's workdir (with checkpoints/ or export/), an export "
        "folder (with card.json), a Hugging Face folder (with model.safetensors), or a .pth or .safetensors file"
    )


def _from_export(folder: Path, training: bool) -> Pretrained:
    if problem := checkpoints.damage(folder):
        raise UserError(f"export {folder} is damaged ({problem}): copy it again, or resume the run to export again")
    card = read_card(folder)
    try:
        like = official.backbone_like(card["architecture"])
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{folder / 'card.json'} has an architecture that cannot be built ({error})") from error
    variables = checkpoints.restore_arrays(folder / "variables", like)
    state: dict[str, Any] = {
        "teacher": {"backbone": variables["params"]},
        "teacher_stats": {"backbone": variables["batch_stats"]},
    }
    if training and (folder / "training").is_dir():
        rest = checkpoints.restore_arrays(folder / "training", checkpoints.tree_of(folder / "training"))
        for key in ("teacher", "teacher_stats"):
            rest[key] = state[key] | rest[key]
        state = rest
    return _from_state(state, card)


def _from_checkpoint(folder: Path, training: bool) -> Pretrained:
    """Reads the needed parts of a training state; never the optimizer's, which is the largest."""
    saved = checkpoints.tree_of(folder / "state")
    card = _card_of(folder, saved["teacher"]["backbone"])
    if training:
        keys = ("teacher", "teacher_stats", "student", "student_stats", "center", "patch_center")
        target = {key: saved[key] for key in keys if key in saved}
    else:
        like = official.backbone_like(card["architecture"])
        target = {"teacher": {"backbone": like["params"]}, "teacher_stats": {"backbone": like["batch_stats"]}}
    return _from_state(checkpoints.restore_arrays(folder / "state", target), card)


def _card_of(folder: Path, backbone: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the model card of a checkpoint, from the config that was saved with it and its backbone's names."""
    try:
        return checkpoints.model_card(checkpoints.read_metadata(folder)["config"], int(folder.name), backbone)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the config of checkpoint {folder} is not one of this version ({type(error).__name__}: {error}): load it "
            "with the version that wrote it"
        ) from error


def _from_state(state: Mapping[str, Any], card: dict[str, Any]) -> Pretrained:
    """Builds the result from trees under the field names of a training state.

    Parts that only the student has, such as a predictor, serve the training alone and are left out.
    """
    student = None
    if "student" in state:
        shared = {part: params for part, params in state["student"].items() if part in state["teacher"]}
        student = Weights(shared, state["student_stats"])
    return Pretrained(
        card, Weights(state["teacher"], state["teacher_stats"]), student, state.get("center"), state.get("patch_center")
    )


def _huggingface_file(folder: Path) -> Path | None:
    """Returns the weights in a Hugging Face folder; None for other folders. A run's workdir also has a config.json."""
    ours = any((folder / name).exists() for name in ("checkpoints", "export", "card.json"))
    if ours or not (folder / "config.json").is_file():
        return None
    return next((folder / name for name in HUGGINGFACE_FILES if (folder / name).is_file()), None)


def _settings(weights: Path) -> dict[str, Any]:
    """Returns settings stated beside the tensors: in the metadata of our files, in the folder of Hugging Face's."""
    metadata = tensor_files.read_metadata(weights)
    if ours := [key for key in (PREPROCESSING, NUM_HEADS, ANTIALIAS, POS_OFFSET) if key in metadata]:
        source = f"the metadata of {weights}"
        stated = {key: parse(metadata[key], source) for key in ours}
        kinds = {f"{PREPROCESSING}.{name}": kind for name, kind in PREPROCESSING_KINDS.items()}
        kinds |= {NUM_HEADS: SIZE, ANTIALIAS: FLAG, POS_OFFSET: OFFSET}
        require(stated, {name: kind for name, kind in kinds.items() if name.split(".")[0] in ours}, source)
        return stated
    return huggingface.read_folder_settings(weights.parent) if weights.name in HUGGINGFACE_FILES else {}


def _from_tensors(
    tensors: Mapping[str, np.ndarray], path: Path, settings: Mapping[str, Any], training: bool, heads: bool
) -> Pretrained:
    """Builds the result from named tensors. `settings`: see `_settings`."""
    tensors = _unwrapped(tensors, path)
    networks = _networks(tensors)
    main = networks.get("teacher") or networks["student"]
    if "teacher" not in networks:
        print(f"{path.name} has no teacher: using its student", file=sys.stderr)
    architecture = official.backbone_architecture(main["backbone"], path.name, settings.get(NUM_HEADS))
    architecture |= {
        name: x for name, x in settings.items() if name in (ANTIALIAS, POS_OFFSET) and name in architecture
    }
    teacher = _weights(main, architecture, path.name, training and heads)
    card = {
        "architecture": architecture,
        "preprocessing": _preprocessing(architecture) | settings.get(PREPROCESSING, {}),
        "provenance": {"source": path.name, "versions": provenance.versions()},
    }
    if not training:
        return Pretrained(card, teacher)
    student = None
    if "teacher" in networks and "student" in networks:
        student = _weights(networks["student"], architecture, f"{path.name}'s student", heads)
    return Pretrained(card, teacher, student, _center(tensors, teacher, path) if heads else None)


def _center(tensors: Mapping[str, np.ndarray], teacher: Weights, path: Path) -> np.ndarray | None:
    """Returns the center [K] of a full checkpoint; None if it has no center, or the head was not loaded."""
    center = tensors.get("dino_loss.center")
    if center is None or "head" not in teacher.params:
        return None
    K = len(teacher.params["head"]["last_layer"]["weight_v"])
    if center.shape not in ((K,), (1, K)):
        raise UserError(
            f"{path.name} has a dino_loss.center {center.shape} for {K} prototypes: download or copy the file again"
        )
    return np.array(center, np.float32).reshape(K)


def _unwrapped(tensors: Mapping[str, np.ndarray], path: Path) -> Mapping[str, np.ndarray]:
    """Takes the moving average where a file has one beside the weights, and removes what wraps all names."""
    for prefix in EMA:
        if average := {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}:
            print(f"{path.name} has weights and their moving average: using {prefix[:-1]}", file=sys.stderr)
            tensors = average
            break
    rest = {name: x for name, x in tensors.items() if name.split(".")[0] not in NOT_NETWORKS}
    if rest and all(WRAPPERS.match(name) for name in rest):
        return official.renamed(rest, _without_wrappers)
    return tensors


def _without_wrappers(name: str) -> str:
    return WRAPPERS.sub("", name, count=1) if WRAPPERS.match(name) else name


def _networks(tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Flat names in any convention -> {"teacher" | "student": {"backbone": tensors, and heads}}, official names.

    A file with a single network is read as a teacher.
    """
    sections = [who for who in ("teacher", "student") if any(name.startswith(f"{who}.") for name in tensors)]
    if not sections:
        return {"teacher": _parts(tensors)}
    if unknown := [name for name in tensors if name.split(".")[0] not in (*sections, *NOT_NETWORKS)]:
        raise UserError(f"a checkpoint with {' and '.join(sections)} also has {', '.join(unknown[:5])}: remove these")
    return {
        who: _parts({name.removeprefix(f"{who}."): x for name, x in tensors.items() if name.startswith(f"{who}.")})
        for who in sections
    }


def _parts(tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """One network -> tensors of its backbone and heads, without the prefixes of torch's wrappers."""
    tensors = official.renamed(tensors, _without_wrappers)
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, x in tensors.items():
        part, rest = (HEADS[found[1]], found[2]) if (found := HEAD.fullmatch(name)) else ("backbone", name)
        parts.setdefault(part, {})[rest] = x
    backbone = official.renamed(
        parts.get("backbone", {}), lambda name: _without_wrappers(name.removeprefix("backbone."))
    )
    return parts | {"backbone": _without_classifier(backbone)}


def _without_classifier(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Maps a bare backbone in any convention to official names. Omits a classifier and reports that on stderr."""
    if left_out := [name for name in tensors if name.startswith(CLASSIFIERS)]:
        print(f"left out {', '.join(left_out[:8])}: a classifier is not part of the backbone", file=sys.stderr)
    tensors = {name: x for name, x in tensors.items() if name not in left_out}
    if huggingface.is_huggingface(tensors):
        return huggingface.to_official(tensors)
    return timm.to_official(official.unchunked(tensors))


def _weights(network: Mapping[str, Any], architecture: dict[str, Any], source: str, with_head: bool) -> Weights:
    """Builds the trees of one network from its tensors."""
    like = {"backbone": official.backbone_like(architecture)}
    if with_head:
        heads = {part: tensors for part, tensors in network.items() if part != "backbone"}
        like |= {part: official.head_like(tensors, architecture["embed_dim"]) for part, tensors in heads.items()}
    variables = {part: official.from_official(like[part], network[part], f"{source} ({part})") for part in like}
    return Weights(*({part: variables[part][kind] for part in like} for kind in ("params", "batch_stats")))


def file_metadata(card: Mapping[str, Any]) -> dict[str, str]:
    """Returns the metadata of our .safetensors files, which `_settings` reads back."""
    heads, variant = num_heads_of(card["architecture"]), variant_on_card(card["architecture"])
    stated = {PREPROCESSING: card["preprocessing"]} | ({} if heads is None else {NUM_HEADS: heads})
    stated |= {name: variant[name] for name in (ANTIALIAS, POS_OFFSET) if name in variant}
    return {key: json.dumps(value) for key, value in stated.items()}


def _preprocessing(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """The references' evaluation: shorter side 256, center crop 224 (others in proportion), ImageNet statistics.

    DINOv2 evaluates at 224 pixels as well, although its positions are learned for 518.
    """
    crop, channels = architecture["image_size"], architecture["in_channels"]
    if architecture.get("layer_scale") and crop > DINOV2_CROP and not DINOV2_CROP % architecture["patch_size"]:
        crop = DINOV2_CROP
    mean, std = (per_channel(values, channels) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return {"resize": round(crop * 256 / 224), "crop": crop, "mean": mean, "std": std, "interpolation": "bicubic"}


def _without_heads(pretrained: Pretrained) -> Pretrained:
    def backbone(weights: Weights) -> Weights:
        return Weights(*({"backbone": trees["backbone"]} for trees in weights))

    return Pretrained(
        pretrained.card, backbone(pretrained.teacher), pretrained.student and backbone(pretrained.student)
    )


def _contents(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    return "it holds " + ", ".join(names[:5] + ["..."] * (len(names) > 5)) if names else "it is empty"
