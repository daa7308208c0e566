"""ViT-B/16, 400 epochs: the published model's recipe.

    dino-jax train --config=vitb16 --workdir=runs/vitb16 --config.data.source=folder:imagenet/train

Hardware: 32 GPUs (batch 1,024). Gradient clipping, frozen epochs and temperatures are from the authors' VISSL
configuration. Learning rate and crops are quoted from memory of the published arguments and unverified. Reference's
result, not ours (official README): k-NN 76.1, linear 78.2. We have not run this recipe on ImageNet.
"""

from ml_collections import ConfigDict

from dino_jax import recipes


def get_config() -> ConfigDict:
    """Changes from the defaults."""
    config = recipes.get_config("default")
    config.model.arch = "vit_base"
    config.batch_size = 1_024
    config.epochs = 400
    config.dino.teacher_temp = 0.07
    config.dino.warmup_teacher_temp_epochs = 50
    config.optim.lr = 7.5e-4
    config.optim.min_lr = 2e-6
    config.optim.clip_grad = 0.3
    config.optim.freeze_last_layer_epochs = 3
    config.crops.local_number = 10
    config.crops.global_scale = (0.25, 1.0)
    config.crops.local_scale = (0.05, 0.25)
    return config
