"""ViT-S/16, 100 epochs: the official defaults.

    dino-jax train --config=vits16 --workdir=runs/vits16 --config.data.source=folder:imagenet/train

Hardware: 8 GPUs (the official run: 8 x V100 for 1.75 days). Reference's result, not ours (official README): k-NN 69.3,
linear 74.0; reproductions by others report k-NN 68.4. We have not run this recipe on ImageNet.
"""

from ml_collections import ConfigDict

from dino_jax import recipes


def get_config() -> ConfigDict:
    """The defaults, under the name of the architecture."""
    return recipes.get_config("default")
