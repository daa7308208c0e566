"""What every backbone returns, so that nothing outside this package depends on the kind of backbone."""

import flax.struct
import jax


@flax.struct.dataclass
class Tokens:
    """Features of `B` images. `D`: channels; `R`: registers, 0 for all backbones so far; `N`: patches.

    A ViT applies its final norm to all of them. A convnet's patches are the cells of its last feature map, and its
    `cls` is their mean.
    """

    cls: jax.Array  # [B, D], the CLS token of a ViT; pooled features of a convnet, always float32
    registers: jax.Array  # [B, R, D]
    patches: jax.Array  # [B, N, D], row by row
    grid: tuple[int, int] = flax.struct.field(pytree_node=False)  # rows and columns of the patches
