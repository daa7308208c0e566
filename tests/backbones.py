"""Stand-ins for backbones, and the reference's token arrays as ours."""

import jax
import numpy as np

from dino_jax.models import Tokens, build_backbone
from dino_jax.weights.backbone import Backbone


def random_vit():
    """An untrained vit_nano with patches of 8 pixels, for color images of 16."""
    model = build_backbone("vit_nano", patch_size=8, image_size=16)
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))
    card = {
        "architecture": {"arch": "vit_nano", "in_channels": 3},
        "preprocessing": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize": 16, "crop": 16},
    }
    return Backbone(model, variables, card)


def as_tokens(array):
    """The reference's [B, 1+N, D], CLS first -> Tokens, all patches in one row."""
    return Tokens(cls=array[:, 0], registers=array[:, 1:1], patches=array[:, 1:], grid=(1, array.shape[1] - 1))


class Pooled:
    """In the place of a convnet's module: `cls` is function(variables, images)."""

    def __init__(self, function):
        self.function = function

    def apply(self, variables, images, n=1, method="__call__"):
        tokens = as_tokens(self.function(variables, images)[:, None])
        return [tokens] if method == "last_blocks" else tokens
