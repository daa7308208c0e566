"""ViT-B/8, 300 epochs: the published model's recipe.

    dino-jax train --config=vitb8 --workdir=runs/vitb8 --config.data.source=folder:imagenet/train

Hardware: 176 GPUs (batch 1,056). Temperatures and the other settings are quoted from memory of the published arguments
and unverified. Reference's result, not ours (official README): k-NN 77.4, linear 80.1. We have not run this recipe on
ImageNet.
"""

from ml_collections import ConfigDict

from dino_jax import recipes


def get_config() -> ConfigDict:
    """Changes from ViT-B/16."""
    config = recipes.get_config("vitb16")
    config.model.patch_size = 8
    config.batch_size = 1_056
    config.epochs = 300
    config.dino.warmup_teacher_temp = 0.03
    config.optim.lr = 5e-4
    config.optim.clip_grad = 3.0
    return config
