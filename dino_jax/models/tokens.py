"""The output of every backbone, so that code outside of this package does not depend on the kind of backbone."""

import flax.struct
import jax


@flax.struct.dataclass
class Tokens:
    """Features of `B` images. `D`: channels; `R`: registers, 0 for most backbones; `N`: patches.

    The tokens of a ViT are after its final norm. The patches of a convnet are the cells of its last feature map, and
    `cls` is their mean.
    """

    cls: jax.Array  # [B, D], the CLS token of a ViT, or the pooled features of a convnet (always float32)
    registers: jax.Array  # [B, R, D], which hold no place of the image
    patches: jax.Array  # [B, N, D], row by row
    grid: tuple[int, int] = flax.struct.field(pytree_node=False)  # rows and columns of the patches
