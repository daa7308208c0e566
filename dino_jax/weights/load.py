"""Trained weights, wherever they come from: a run of ours, an export, or a file or folder of PyTorch's world."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dino_jax import checkpoints, provenance
from dino_jax.errors import UserError
from dino_jax.models import family_of
from dino_jax.models.registry import num_heads_of
from dino_jax.models.vit import resize_pos_embed
from dino_jax.weights import huggingface, official, tensor_files

# Keys of a safetensors file's metadata, JSON each: the card's section, and an int (of a ViT).
PREPROCESSING, NUM_HEADS = "preprocessing", "num_attention_heads"
HUGGINGFACE_FILES = ("model.safetensors", "pytorch_model.bin")  # one of them beside config.json
WRAPPERS = ("state_dict.", "model.")  # keys under which people save a whole state_dict
NOT_NETWORKS = ("optimizer", "fp16_scaler", "dino_loss", "epoch", "args")  # of an official full checkpoint
HEAD = ("head.mlp.", "head.last_layer.")
CLASSIFIERS = ("fc.", "head.weight", "head.bias", "classifier.", "pooler.", "vit.pooler.")  # no part of a backbone
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class Weights(NamedTuple):
    """One network, student or teacher, as trees of NumPy arrays: {"backbone": ...} and, where there is one, "head"."""

    params: dict[str, Any]
    stats: dict[str, Any]  # running statistics of batch norm, {} in a part that has none


class Pretrained(NamedTuple):
    """What a source holds: always a teacher's backbone; heads, student and center are what only training needs."""

    card: dict[str, Any]  # see `checkpoints.model_card`
    teacher: Weights
    student: Weights | None = None
    center: np.ndarray | None = None  # float32 [K]


def load_weights(
    path: str | Path,
    *,
    training: bool = True,
    heads: bool = True,
    image_size: int | None = None,
    in_channels: int | None = None,
    num_heads: int | None = None,
) -> Pretrained:
    """Reads what `load_backbone` documents, and with `training` also student, heads and center where there are any.

    Args:
        path: what `load_backbone` takes.
        training: False reads the teacher's backbone alone.
        heads: False leaves projection heads and center out.
        image_size: pixels; position embeddings are resized to its grid as the reference does for other image sizes.
            This and the next one change preprocessing too.
        in_channels: the patch embedding (a convnet's first kernel) is summed over channels for fewer, repeated for
            more.
        num_heads: attention heads of a ViT, for a file that does not state them (`official.backbone_architecture`).

    Raises:
        UserError: the path cannot be read or is incomplete, or num_heads is not what it states.
    """
    path = require_path(path)
    if weights := path if path.is_file() else _huggingface_file(path):
        tensors = tensor_files.read(weights)
        settings = ({} if num_heads is None else {NUM_HEADS: num_heads}) | _settings(weights)
        found = _from_tensors(tensors, weights, settings, training, heads)
    else:
        found = _from_run(path, training)
        found = found if heads else _without_heads(found)
    if num_heads is not None and (there := num_heads_of(found.card["architecture"])) != num_heads:
        stated = "has no attention" if there is None else f"states that it has {there} attention heads"
        raise UserError(f"{path} {stated}, and num_heads is {num_heads}: leave num_heads out")
    if image_size is not None:
        found = _resized(found, image_size)
    return found if in_channels is None else _with_channels(found, in_channels)


def require_path(path: str | Path) -> Path:
    """The path; UserError if there is none."""
    path = Path(path).absolute()
    if not path.exists():
        raise UserError(
            f"no weights in {path} (there is no such path): give a run's workdir, an export folder, a Hugging Face "
            "folder, or a .pth or .safetensors file"
        )
    return path


def exported_step(folder: Path) -> int:
    """After how many steps the backbone in an export folder was taken, -1 if it was converted.

    Raises UserError if its card cannot be read.
    """
    try:
        return json.loads((folder / "card.json").read_text(encoding="utf-8"))["provenance"].get("step", -1)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / 'card.json'} is damaged: copy it again, or export again by resuming its run"
        ) from error


def _from_run(path: Path, training: bool) -> Pretrained:
    """An export, or a workdir: of its export, or of its newest intact checkpoint if that is of a later step.

    A run's export holds a backbone only: for training, the checkpoint is read wherever there is one.
    """
    # An export that was cut off between its two renames leaves the last one under its second name.
    exports = [
        folder for folder in (path, path / "export", path / "export.previous") if (folder / "card.json").is_file()
    ]
    newest = None
    if (path / "checkpoints").is_dir():
        try:
            newest = checkpoints.newest_intact(path / "checkpoints")
        except UserError:  # all are damaged, which has been said: an export may be left
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
        raise UserError(f"export {folder} is damaged ({problem}): copy it again, or export again by resuming its run")
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    like = official.backbone_like(card["architecture"])
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
    """Reads only what is wanted of a training state: the optimizer's part, the largest, never is."""
    card = checkpoints.model_card(checkpoints.read_metadata(folder)["config"], step=int(folder.name))
    if training:
        whole = checkpoints.tree_of(folder / "state")
        keys = ("teacher", "teacher_stats", "student", "student_stats", "center")
        part = {key: whole[key] for key in keys}
    else:
        like = official.backbone_like(card["architecture"])
        part = {"teacher": {"backbone": like["params"]}, "teacher_stats": {"backbone": like["batch_stats"]}}
    return _from_state(checkpoints.restore_arrays(folder / "state", part), card)


def _from_state(state: Mapping[str, Any], card: dict[str, Any]) -> Pretrained:
    """Trees under the names of a TrainState."""
    student = Weights(state["student"], state["student_stats"]) if "student" in state else None
    return Pretrained(card, Weights(state["teacher"], state["teacher_stats"]), student, state.get("center"))


def _huggingface_file(folder: Path) -> Path | None:
    """The weights in a Hugging Face folder; None for others. A run's workdir has a config.json, too."""
    ours = any((folder / name).exists() for name in ("checkpoints", "export", "card.json"))
    if ours or not (folder / "config.json").is_file():
        return None
    return next((folder / name for name in HUGGINGFACE_FILES if (folder / name).is_file()), None)


def _settings(weights: Path) -> dict[str, Any]:
    """What a file states beside its tensors: in its metadata if it is ours, in its folder if it is Hugging Face's."""
    metadata = tensor_files.read_metadata(weights)
    if ours := {key: json.loads(metadata[key]) for key in (PREPROCESSING, NUM_HEADS) if key in metadata}:
        return ours
    return huggingface.read_folder_settings(weights.parent) if weights.name in HUGGINGFACE_FILES else {}


def _from_tensors(
    tensors: Mapping[str, np.ndarray], path: Path, settings: Mapping[str, Any], training: bool, heads: bool
) -> Pretrained:
    """settings: what is stated beside the tensors, see `_settings`."""
    tensors = _unwrapped(tensors)
    networks = _networks(tensors)
    main = networks.get("teacher") or networks["student"]
    if "teacher" not in networks:
        print(f"{path.name} has no teacher: its student is taken", file=sys.stderr)
    architecture = official.backbone_architecture(main["backbone"], path.name, settings.get(NUM_HEADS))
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
    """The center [K] of a full checkpoint; None without one or without the head that it belongs to."""
    center = tensors.get("dino_loss.center")
    if center is None or "head" not in teacher.params:
        return None
    K = len(teacher.params["head"]["last_layer"]["weight_v"])
    if center.shape not in ((K,), (1, K)):
        raise UserError(f"{path.name} has a dino_loss.center {center.shape} for {K} prototypes: get the file again")
    return np.array(center, np.float32).reshape(K)


def _unwrapped(tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Without the optimizer and the key under which some save a whole state_dict."""
    for wrapper in WRAPPERS:
        rest = {name: x for name, x in tensors.items() if name.split(".")[0] not in NOT_NETWORKS}
        if rest and all(name.startswith(wrapper) for name in rest):
            return {name.removeprefix(wrapper): x for name, x in rest.items()}
    return tensors


def _networks(tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Flat names of any naming -> {"teacher" | "student": {"backbone": tensors, "head": tensors}}, official names.

    A file of one network is a teacher's.
    """
    sections = [who for who in ("teacher", "student") if any(name.startswith(f"{who}.") for name in tensors)]
    if not sections:
        return {"teacher": _parts(tensors)}
    if strange := [name for name in tensors if name.split(".")[0] not in (*sections, *NOT_NETWORKS)]:
        raise UserError(f"a checkpoint with {' and '.join(sections)} also has {', '.join(strange[:5])}: remove these")
    return {
        who: _parts({name.removeprefix(f"{who}."): x for name, x in tensors.items() if name.startswith(f"{who}.")})
        for who in sections
    }


def _parts(tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """One network -> its backbone's and its head's tensors, without `module.` (of torch's data parallel) in front."""
    tensors = official.renamed(tensors, lambda name: name.removeprefix("module."))
    head = {name.removeprefix("head."): x for name, x in tensors.items() if name.startswith(HEAD)}
    rest = {name: x for name, x in tensors.items() if not name.startswith(HEAD)}
    rest = official.renamed(rest, lambda name: name.removeprefix("backbone."))
    return {"backbone": _without_classifier(rest), "head": head}


def _without_classifier(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A bare backbone of any naming under the official names; what classifies on top of it is left out, and said so."""
    if left_out := [name for name in tensors if name.startswith(CLASSIFIERS)]:
        print(f"left out {', '.join(left_out[:8])}: a classifier, which is no part of a backbone", file=sys.stderr)
    tensors = {name: x for name, x in tensors.items() if name not in left_out}
    return huggingface.to_official(tensors) if huggingface.is_huggingface(tensors) else tensors


def _weights(network: Mapping[str, Any], architecture: dict[str, Any], source: str, with_head: bool) -> Weights:
    """Trees of one network's tensors."""
    like = {"backbone": official.backbone_like(architecture)}
    if with_head and network["head"]:
        like["head"] = official.head_like(network["head"], architecture["embed_dim"])
    variables = {part: official.from_official(like[part], network[part], f"{source} ({part})") for part in like}
    return Weights(*({part: variables[part][kind] for part in like} for kind in ("params", "batch_stats")))


def file_metadata(card: Mapping[str, Any]) -> dict[str, str]:
    """What our .safetensors files state beside their tensors, in the metadata that `_settings` reads."""
    heads = num_heads_of(card["architecture"])
    stated = {PREPROCESSING: card["preprocessing"]} | ({} if heads is None else {NUM_HEADS: heads})
    return {key: json.dumps(value) for key, value in stated.items()}


def _preprocessing(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """The reference's evaluation: shorter side to 256, center 224, ImageNet's statistics; other sizes in proportion."""
    crop, channels = architecture["image_size"], architecture["in_channels"]
    mean, std = (_per_channel(values, channels) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return {"resize": round(crop * 256 / 224), "crop": crop, "mean": mean, "std": std, "interpolation": "bicubic"}


def _resized(found: Pretrained, image_size: int) -> Pretrained:
    """The same network for another image size."""
    architecture, trained = found.card["architecture"], found.card["preprocessing"]
    patch = architecture["patch_size"]  # None for a convnet, which has no positions either
    if image_size < 1 or (patch and image_size % patch):
        raise UserError(f"image_size {image_size} is not a multiple of the patch size {patch or 1}: change image_size")
    preprocessing = trained | {"resize": round(trained["resize"] * image_size / trained["crop"]), "crop": image_size}
    found = _described(found, {"image_size": image_size}, preprocessing)
    if not patch:
        return found
    side = image_size // patch

    def resized(params: Any) -> Any:
        return params | {"pos_embed": np.asarray(resize_pos_embed(params["pos_embed"], side, side))}

    return _map_backbones(resized, found)


def _with_channels(found: Pretrained, in_channels: int) -> Pretrained:
    """The same network for images of another number of channels."""
    if in_channels < 1:
        raise UserError(f"in_channels {in_channels}: set it to 1 or more")
    architecture, trained = found.card["architecture"], found.card["preprocessing"]
    statistics = {name: _per_channel(trained[name], in_channels) for name in ("mean", "std")}
    first = family_of(architecture["arch"]).input_layer

    def changed(params: Any) -> Any:
        return params | {first: params[first] | {"kernel": _kernel_of(params[first]["kernel"], in_channels)}}

    return _map_backbones(changed, _described(found, {"in_channels": in_channels}, trained | statistics))


def _kernel_of(kernel: np.ndarray, channels: int) -> np.ndarray:
    """[h, w, C, D] -> [h, w, channels, D], such that an image whose channels are all the same says what it said before.

    More channels take the kernel's in turn, each divided by its number of copies; fewer share the sum of all.
    """
    have = kernel.shape[2]
    if channels < have:
        return np.repeat(kernel.sum(axis=2, keepdims=True) / np.float32(channels), channels, axis=2)
    turn = np.arange(channels) % have
    return kernel[:, :, turn] / np.bincount(turn)[turn].astype(np.float32)[:, None]


def _per_channel(values: list[float], channels: int) -> list[float]:
    """Statistics for another number of channels: their mean for one, else repeated in turn."""
    if channels == 1 and len(values) > 1:
        return [round(sum(values) / len(values), 6)]
    return [values[i % len(values)] for i in range(channels)]


def _described(found: Pretrained, architecture: dict[str, Any], preprocessing: dict[str, Any]) -> Pretrained:
    card = found.card | {"architecture": found.card["architecture"] | architecture, "preprocessing": preprocessing}
    return found._replace(card=card)


def _map_backbones(change: Any, found: Pretrained) -> Pretrained:
    """The source with change(parameters of a backbone) in teacher and student."""

    def changed(weights: Weights) -> Weights:
        return weights._replace(params=weights.params | {"backbone": change(weights.params["backbone"])})

    return found._replace(teacher=changed(found.teacher), student=found.student and changed(found.student))


def _without_heads(found: Pretrained) -> Pretrained:
    def backbone(weights: Weights) -> Weights:
        return Weights(*({"backbone": trees["backbone"]} for trees in weights))

    return Pretrained(found.card, backbone(found.teacher), found.student and backbone(found.student))


def _contents(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    return "it holds " + ", ".join(names[:5] + ["..."] * (len(names) > 5)) if names else "it is empty"
