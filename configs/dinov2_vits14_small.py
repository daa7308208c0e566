"""DINOv2 with ViT-S/14 for one GPU and a data set like ImageNet-1k: 100 epochs, batch 256.

    dino-jax train --config=dinov2_vits14_small --workdir=runs/v2 --config.data.source=folder:imagenet/train

Hardware: one GPU with 40 GB or more, with accum_steps for less. Nobody has published a result of this recipe, and we
have not run it. The published ViT-S/14 (k-NN 79.0, linear 81.1) was distilled from ViT-g.
"""

from ml_collections import ConfigDict

from dino_jax import recipes


def get_config() -> ConfigDict:
    """Changes from `dinov2_vitl16_short`: a small model with a plain learning rate for all layers."""
    config = recipes.get_config("dinov2_vitl16_short")
    config.batch_size = 256
    config.epochs = 100
    config.model.arch = "vit_small"
    config.model.patch_size = 14
    config.model.drop_path_rate = 0.1
    config.head.out_dim = 16_384
    config.dino.warmup_teacher_temp_epochs = 30
    config.dinov2.group_images = 32
    config.optim.lr = 1e-3
    config.optim.warmup_epochs = 10
    config.optim.layer_decay = 1.0
    config.optim.freeze_last_layer_epochs = 1
    config.crops.local_size = 98
    return config
