"""A trained backbone for people who do not train: load it, preprocess images, get features."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from PIL import Image
from PIL.ExifTags import Base

from dino_jax.checkpoints import damage, model_card, newest_intact, read_metadata, restore_arrays
from dino_jax.data.pipeline import DecodeError, eval_image
from dino_jax.errors import UserError
from dino_jax.models import build_backbone
from dino_jax.models.vit import ViT


@flax.struct.dataclass
class Features:
    """What a backbone says of B images."""

    cls: jax.Array  # [B, D]: the CLS token after the final norm (ViT), pooled features (convnet)
    patches: jax.Array | None  # [B, N, D]: one for each patch, row by row, after the final norm; None for a convnet
    grid: tuple[int, int] | None = flax.struct.field(pytree_node=False)  # rows and columns of the N patches


@dataclass(frozen=True, eq=False)  # hashed by identity, so that jax.jit(backbone) works
class Backbone:
    """A module with its variables ({"params", "batch_stats"}) and its model card (see `checkpoints.model_card`).

    Its methods are jitted, and work inside `jax.jit` and `jax.vmap` and on images sharded over devices.
    """

    model: nn.Module
    variables: dict
    card: dict

    def __call__(self, images: jax.Array) -> Features:
        """Features of normalised images, float [B, H, W, C]; a ViT takes any H and W that hold a patch."""
        return self.last_blocks(images, 1)[0]

    def last_blocks(self, images: jax.Array, n: int) -> list[Features]:
        """Features after each of a ViT's last n blocks (and the final norm), oldest first.

        The reference's `get_intermediate_layers`. Raises UserError for n > 1 of a convnet or more than its blocks.
        """
        blocks = self.model.depth if isinstance(self.model, ViT) else 1
        if not 1 <= n <= blocks:
            raise UserError(f"last_blocks of {n}: {self.config['arch']} gives features of 1 to {blocks} blocks")
        return _features(self.model, self.variables, images, n)

    def attention(self, images: jax.Array) -> jax.Array:
        """Self-attention of a ViT's last block, float32 [B, heads, 1+N, 1+N]: rows are queries, CLS comes first.

        The reference's `get_last_selfattention`. Raises UserError for a convnet, which has none.
        """
        if not isinstance(self.model, ViT):
            raise UserError(f"{self.config['arch']} has no attention: give a vision transformer")
        return _attention(self.model, self.variables, images)

    @property
    def config(self) -> dict:
        """The card's architecture: arch, patch_size, in_channels, image_size, embed_dim."""
        return self.card["architecture"]

    def preprocess(self, images: Sequence[Image.Image | np.ndarray | bytes]) -> np.ndarray:
        """PIL images, uint8 arrays [H, W] or [H, W, C], or encoded files -> float32 [B, crop, crop, C].

        Resizes, crops the centre and normalises as the model was trained. Raises UserError for an image that cannot be
        decoded, by its place in the list.
        """
        trained = self.card["preprocessing"]
        crops = [self._center_crop(place, image) for place, image in enumerate(images)]
        return normalize(np.stack(crops), trained["mean"], trained["std"])

    def _center_crop(self, place: int, image: Image.Image | np.ndarray | bytes) -> np.ndarray:
        trained = self.card["preprocessing"]
        try:
            stored = _encode(image) if isinstance(image, Image.Image) else image
            return eval_image(
                stored, resize=trained["resize"], crop=trained["crop"], channels=self.config["in_channels"]
            )
        except (DecodeError, OSError) as error:
            raise UserError(f"image {place} to preprocess cannot be decoded ({error}): leave it out") from error


def normalize(images: Any, mean: Sequence[float], std: Sequence[float]) -> Any:
    """uint8 [..., C] -> float32 (image / 255 - mean) / std, on the host for NumPy arrays, on the device for JAX's."""
    return (images.astype(np.float32) / 255 - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def load_backbone(path: str | Path) -> Backbone:
    """The backbone in an `export` folder, or the teacher's in a run's workdir: of its export, or of its newest intact
    checkpoint if that is of a later step.

    Float32, on the default device of each process. Raises UserError if the path holds neither or its files are damaged.
    """
    path = Path(path).resolve()
    # An export that was cut off between its two renames leaves the last one under its second name.
    exports = [
        folder for folder in (path, path / "export", path / "export.previous") if (folder / "card.json").is_file()
    ]
    newest = newest_intact(path / "checkpoints") if (path / "checkpoints").is_dir() else None
    if exports and (newest is None or exported_step(exports[0]) >= newest):
        return _from_export(exports[0])
    if newest is not None:
        return _from_checkpoint(path / "checkpoints" / str(newest))
    raise UserError(
        f"no backbone in {path} ({_contents(path)}): give a run's workdir (with checkpoints/ or export/) "
        "or an export folder (with card.json)"
    )


@partial(jax.jit, static_argnums=(0, 3))
def _features(model: nn.Module, variables: dict, images: jax.Array, n: int) -> list[Features]:
    if not isinstance(model, ViT):
        return [Features(cls=model.apply(variables, images), patches=None, grid=None)]  # type: ignore[arg-type]
    grid = images.shape[1] // model.patch_size, images.shape[2] // model.patch_size
    blocks: Any = model.apply(variables, images, n, method="last_tokens")
    return [Features(cls=tokens[:, 0], patches=tokens[:, 1:], grid=grid) for tokens in blocks]


@partial(jax.jit, static_argnums=0)
def _attention(model: nn.Module, variables: dict, images: jax.Array) -> jax.Array:
    return model.apply(variables, images, method="last_attention")  # type: ignore[return-value]


def exported_step(folder: Path) -> int:
    """After how many steps the backbone in an export folder was taken; UserError if its card cannot be read."""
    try:
        return json.loads((folder / "card.json").read_text(encoding="utf-8"))["provenance"]["step"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / 'card.json'} is damaged: copy it again, or export again by resuming its run"
        ) from error


def _from_export(folder: Path) -> Backbone:
    if problem := damage(folder):
        raise UserError(f"export {folder} is damaged ({problem}): copy it again, or export again by resuming its run")
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    model, target = _build(card["architecture"])
    return Backbone(model, jax.tree.map(jnp.asarray, restore_arrays(folder / "variables", target)), card)


def _from_checkpoint(folder: Path) -> Backbone:
    """Reads only the teacher's backbone of a training state: neither trainer nor optimizer is needed."""
    card = model_card(read_metadata(folder)["config"], step=int(folder.name))
    model, target = _build(card["architecture"])
    part = {
        "teacher": {"backbone": target["params"]},
        "teacher_stats": {"backbone": target["batch_stats"]},
    }
    restored = jax.tree.map(jnp.asarray, restore_arrays(folder / "state", part))
    variables = {"params": restored["teacher"]["backbone"], "batch_stats": restored["teacher_stats"]["backbone"]}
    return Backbone(model, variables, card)


def _build(architecture: dict) -> tuple[nn.Module, dict]:
    """The module and the tree of its variables."""
    size, channels = architecture["image_size"], architecture["in_channels"]
    model = build_backbone(architecture["arch"], patch_size=architecture["patch_size"], image_size=size)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32))
    return model, {"params": shapes["params"], "batch_stats": shapes.get("batch_stats", {})}


def _encode(image: Image.Image) -> bytes:
    """Lossless, so that a PIL image of any mode (palette, CMYK, 16-bit) or orientation is read as its file would be."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[Base.Orientation] = image.getexif().get(Base.Orientation, 1)
    (image.convert("RGBA") if image.has_transparency_data else image).save(file, "TIFF", exif=exif)
    return file.getvalue()


def _contents(path: Path) -> str:
    if not path.exists():
        return "there is no such path"
    if not path.is_dir():
        return "it is a file"
    names = sorted(entry.name for entry in path.iterdir())
    return "it holds " + ", ".join(names[:5] + ["..."] * (len(names) > 5)) if names else "it is empty"
