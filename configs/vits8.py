"""ViT-S/8, 800 epochs: the published model's recipe.

    dino-jax train --config=vits8 --workdir=runs/vits8 --config.data.source=folder:imagenet/train

Hardware: 64 GPUs (batch 1,024). Settings other than epochs and batch size are quoted from memory of the published
arguments and unverified. Reference's result, not ours (official README): k-NN 78.3, linear 79.7. We have not run this
recipe on ImageNet.
"""

from ml_collections import ConfigDict

from dino_jax import recipes


def get_config() -> ConfigDict:
    """Changes from the defaults."""
    config = recipes.get_config("default")
    config.model.patch_size = 8
    config.batch_size = 1_024
    config.epochs = 800
    config.dtype = "float32"  # the reference trained it without half precision
    config.head.norm_last_layer = False
    config.dino.teacher_temp = 0.07
    config.dino.warmup_teacher_temp_epochs = 30
    config.optim.clip_grad = 0.0
    config.optim.min_lr = 1e-5
    config.crops.local_number = 10
    config.crops.global_scale = (0.25, 1.0)
    config.crops.local_scale = (0.05, 0.25)
    return config
