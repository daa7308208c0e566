"""Use a trained backbone without the training code: load it, preprocess images, compute features."""

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
from dino_jax.data.pixels import Pixels, to_unit
from dino_jax.errors import UserError
from dino_jax.models import Family, Tokens, family_of, from_card
from dino_jax.models.registry import BackboneModule
from dino_jax.weights import load
from dino_jax.weights.pretrained import Pretrained


@dataclass(frozen=True, eq=False)  # hashed by identity, so that jax.jit(backbone) works
class Backbone:
    """A module with its variables ({"params", "batch_stats"}) and its model card (see `checkpoints.model_card`).

    The methods are jitted. They also work inside `jax.jit` and `jax.vmap`, and on images sharded over devices.
    """

    model: BackboneModule
    variables: dict[str, Any]
    card: dict[str, Any]

    def __call__(self, images: jax.Array) -> Tokens:
        """Returns the tokens of normalized images, float [B, H, W, C]. A ViT accepts any H and W >= patch_size."""
        return self.last_blocks(images, 1)[0]

    def last_blocks(self, images: jax.Array, n: int) -> list[Tokens]:
        """Returns the tokens after each of a ViT's last n blocks and the final norm, earliest block first.

        A convnet only has the tokens of its last feature map (n = 1). Equivalent to the reference's
        `get_intermediate_layers`. Raises UserError if n is larger than `num_blocks` or less than 1.
        """
        most = self.num_blocks
        if not 1 <= n <= most:
            raise UserError(
                f"last_blocks of {n}: {self.config['arch']} returns features of 1 to {most} blocks; change n"
            )
        return _last_blocks(self.model, self.variables, images, n)

    def attention(self, images: jax.Array) -> jax.Array:
        """Returns the self-attention of a ViT's last block, float32 [B, heads, 1+R+N, 1+R+N].

        Rows are queries; rows and columns are CLS, registers and patches. Equivalent to the reference's
        `get_last_selfattention`. Raises UserError for a convnet, which has no attention.
        """
        if not self.family.attention_maps:
            raise UserError(f"{self.config['arch']} has no attention between patches: use a vision transformer")
        return _attention(self.model, self.variables, images)

    @property
    def config(self) -> dict[str, Any]:
        """The card's architecture: arch, patch_size, in_channels, image_size and more (see `architecture_card`)."""
        return self.card["architecture"]

    @property
    def family(self) -> Family:
        """The family of the architecture, which states what the model supports."""
        return family_of(self.config["arch"])

    @property
    def patch_size(self) -> int | None:
        """Side of a patch in pixels; None for a convnet, whose patches are cells of the last feature map."""
        model: Any = self.model
        return model.patch_size if self.family.square_patches else None

    @property
    def pixels(self) -> Pixels:
        """What the backbone was trained to read of stored images, see `data.decoding.decode`."""
        trained = self.card["preprocessing"]
        low, high = trained.get("range", (0.0, trained.get("white", 0.0)))  # "white" in exports of unreleased versions
        shown = tuple(trained.get("shown", (0, 1, 2)))
        return Pixels(self.config["in_channels"], trained.get("dtype", "uint8"), (low, high), shown)

    @property
    def num_blocks(self) -> int:
        """The largest n of `last_blocks`: a ViT's depth, 1 for a convnet."""
        model: Any = self.model
        return model.depth if self.family.block_tokens else 1

    def preprocess(
        self, images: Sequence[Image.Image | np.ndarray | bytes], *, range: tuple[float, float] | None = None
    ) -> np.ndarray:
        """PIL images, arrays [H, W] or [H, W, C], or encoded files -> float32 [B, crop, crop, C].

        Resizes, center-crops and normalizes the images as the model card specifies. Levels are those of the dtype:
        uint8 up to 255, uint16 up to 65,535, floats up to 1. `range` states other values of black and white for pixels
        of more than 8 bits, by default those of the card; integers of more than 16 bits need them. Raises UserError,
        with the index of the image in the list, if an image cannot be decoded.
        """
        trained = self.card["preprocessing"]
        pixels = self.pixels if range is None else self.pixels._replace(range=range)
        crops = [self._center_crop(index, image, pixels) for index, image in enumerate(images)]
        return normalize(np.stack(crops), trained["mean"], trained["std"])

    def _center_crop(self, index: int, image: Image.Image | np.ndarray | bytes, pixels: Pixels) -> np.ndarray:
        trained = self.card["preprocessing"]
        try:
            stored = _encode(image) if isinstance(image, Image.Image) else image
            return eval_image(stored, resize=trained["resize"], crop=trained["crop"], pixels=pixels)
        except (DecodeError, OSError) as error:
            raise UserError(f"image {index} cannot be decoded ({error}): remove it from the list") from error


def normalize(images: Any, mean: Sequence[float], std: Sequence[float]) -> Any:
    """Pixels [..., C] -> float32 (`to_unit` - mean) / std. NumPy arrays stay on the host, JAX arrays on the device."""
    return (to_unit(images) - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def load_backbone(
    path: str | Path,
    *,
    image_size: int | None = None,
    in_channels: int | None = None,
    num_heads: int | None = None,
) -> Backbone:
    """Loads a backbone in float32 onto the default device of each process.

    Architecture and sizes are inferred from the tensors. A .pth file is read without executing its pickle.

    Args:
        path: a run's workdir (loads the teacher) or its `export` folder; a .pth or .safetensors file from the official
            code of DINO or DINOv2 (a bare backbone, or the teacher of a full checkpoint), timm, torchvision (ResNet) or
            Hugging Face (`ViTModel`, `Dinov2Model`, `Dinov2WithRegistersModel`); or a Hugging Face folder. All of them
            may also lie in an object store (gs://, s3://).
        image_size: pixels; adapts the weights to another image size, see `load.load_weights`.
        in_channels: adapts the weights to another number of channels, see `load.load_weights`.
        num_heads: attention heads of a ViT whose file does not state them. By default, the heads of the named ViT with
            the same width and depth; if no named ViT matches, embed_dim / 64, which is reported on stderr.

    Raises:
        UserError: the path holds no weights in a supported form; tensors are missing, unused or have the wrong shape;
            or num_heads is required or wrong.
    """
    pretrained = load.load_weights(
        path, training=False, image_size=image_size, in_channels=in_channels, num_heads=num_heads
    )
    return backbone_of(pretrained)


def backbone_of(pretrained: Pretrained) -> Backbone:
    """Returns the teacher's backbone of loaded weights."""
    teacher = pretrained.teacher
    variables = {"params": teacher.params["backbone"], "batch_stats": teacher.stats["backbone"]}
    model = from_card(pretrained.card["architecture"])
    return Backbone(model, jax.tree.map(jnp.asarray, variables), pretrained.card)


@partial(jax.jit, static_argnums=(0, 3))
def _last_blocks(model: BackboneModule, variables: dict[str, Any], images: jax.Array, n: int) -> list[Tokens]:
    blocks: Any = model.apply(variables, images, n, method="last_blocks")
    return blocks


@partial(jax.jit, static_argnums=0)
def _attention(model: BackboneModule, variables: dict[str, Any], images: jax.Array) -> jax.Array:
    return model.apply(variables, images, method="last_attention")  # type: ignore[return-value]


def _encode(image: Image.Image) -> bytes:
    """Encodes a PIL image losslessly, so that any mode (palette, CMYK, 16-bit) or orientation decodes like a file."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[Base.Orientation] = image.getexif().get(Base.Orientation, 1)
    (image.convert("RGBA") if image.has_transparency_data else image).save(file, "TIFF", exif=exif)
    return file.getvalue()
