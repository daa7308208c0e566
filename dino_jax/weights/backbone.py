"""A trained backbone for people who do not train: load it, preprocess images, get features."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from PIL.ExifTags import Base

from dino_jax.data.decoding import DecodeError, eval_image
from dino_jax.errors import UserError
from dino_jax.models import Family, Tokens, family_of, from_card
from dino_jax.models.registry import BackboneModule
from dino_jax.weights import load


@dataclass(frozen=True, eq=False)  # hashed by identity, so that jax.jit(backbone) works
class Backbone:
    """A module with its variables ({"params", "batch_stats"}) and its model card (see `checkpoints.model_card`).

    Its methods are jitted, and work inside `jax.jit` and `jax.vmap` and on images sharded over devices.
    """

    model: BackboneModule
    variables: dict[str, Any]
    card: dict[str, Any]

    def __call__(self, images: jax.Array) -> Tokens:
        """Tokens of normalized images, float [B, H, W, C]; a ViT takes any H and W that hold a patch."""
        return self.last_blocks(images, 1)[0]

    def last_blocks(self, images: jax.Array, n: int) -> list[Tokens]:
        """Tokens after each of a ViT's last n blocks (and the final norm), oldest first; of a convnet the last ones.

        The reference's `get_intermediate_layers`. Raises UserError for n > 1 of a convnet or more than its blocks.
        """
        most = self.num_blocks
        if not 1 <= n <= most:
            raise UserError(f"last_blocks of {n}: {self.config['arch']} gives features of 1 to {most} blocks")
        return _last_blocks(self.model, self.variables, images, n)

    def attention(self, images: jax.Array) -> jax.Array:
        """Self-attention of a ViT's last block, float32 [B, heads, 1+N, 1+N]: rows are queries, CLS comes first.

        The reference's `get_last_selfattention`. Raises UserError for a convnet, which has none.
        """
        if not self.family.attention_maps:
            raise UserError(f"{self.config['arch']} has no attention: give a vision transformer")
        return _attention(self.model, self.variables, images)

    @property
    def config(self) -> dict[str, Any]:
        """The card's architecture: arch, patch_size, in_channels, image_size, embed_dim (see `architecture_card`)."""
        return self.card["architecture"]

    @property
    def family(self) -> Family:
        """What the model can do."""
        return family_of(self.config["arch"])

    @property
    def patch_size(self) -> int | None:
        """Pixels of a side of the square that a patch token covers; None for a convnet, whose patches are cells."""
        model: Any = self.model
        return model.patch_size if self.family.square_patches else None

    @property
    def num_blocks(self) -> int:
        """The largest n of `last_blocks`: a ViT's depth, 1 for a convnet."""
        model: Any = self.model
        return model.depth if self.family.block_tokens else 1

    def preprocess(self, images: Sequence[Image.Image | np.ndarray | bytes]) -> np.ndarray:
        """PIL images, uint8 arrays [H, W] or [H, W, C], or encoded files -> float32 [B, crop, crop, C].

        Resizes, crops the center and normalizes as the model was trained. Raises UserError for an image that cannot be
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


def load_backbone(
    path: str | Path,
    *,
    image_size: int | None = None,
    in_channels: int | None = None,
    num_heads: int | None = None,
) -> Backbone:
    """The backbone at a path, float32, on the default device of each process.

    path: a run's workdir (its teacher) or its `export` folder; a .pth or .safetensors file of the official code (bare
    backbone or full checkpoint: its teacher), of timm, torchvision (ResNet) or Hugging Face (`ViTModel`); a Hugging
    Face folder. Architecture and sizes are read off the tensors; .pth files are read without running their pickle.
    image_size, in_channels: only if the weights are to be changed for other images, see `load.load_weights`.
    num_heads: attention heads of a ViT whose file does not state them. Without it, they are those of the named ViT of
    its width and depth, else embed_dim / 64, with a line on stderr.

    Raises UserError if the path holds nothing of that kind, tensors are missing, not used or of a wrong shape, or
    num_heads is needed or wrong.
    """
    found = load.load_weights(path, training=False, image_size=image_size, in_channels=in_channels, num_heads=num_heads)
    return backbone_of(found)


def backbone_of(found: load.Pretrained) -> Backbone:
    """The teacher's backbone of loaded weights."""
    variables = {"params": found.teacher.params["backbone"], "batch_stats": found.teacher.stats["backbone"]}
    model = from_card(found.card["architecture"])
    return Backbone(model, jax.tree.map(jnp.asarray, variables), found.card)


@partial(jax.jit, static_argnums=(0, 3))
def _last_blocks(model: BackboneModule, variables: dict[str, Any], images: jax.Array, n: int) -> list[Tokens]:
    blocks: Any = model.apply(variables, images, n, method="last_blocks")
    return blocks


@partial(jax.jit, static_argnums=0)
def _attention(model: BackboneModule, variables: dict[str, Any], images: jax.Array) -> jax.Array:
    return model.apply(variables, images, method="last_attention")  # type: ignore[return-value]


def _encode(image: Image.Image) -> bytes:
    """Lossless, so that a PIL image of any mode (palette, CMYK, 16-bit) or orientation is read as its file would be."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[Base.Orientation] = image.getexif().get(Base.Orientation, 1)
    (image.convert("RGBA") if image.has_transparency_data else image).save(file, "TIFF", exif=exif)
    return file.getvalue()
