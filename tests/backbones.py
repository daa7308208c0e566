"""Stand-ins for backbones, and the reference's token arrays as ours."""

from dino_jax.models import Tokens


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
