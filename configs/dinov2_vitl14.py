"""DINOv2 with ViT-L/14 and SwiGLU on ImageNet-22k, 625,000 steps: the official `vitl14`.

    dino-jax train --config=dinov2_vitl14 --workdir=runs/v2 --config.data.source=folder:imagenet22k

Hardware: the official run took 3.3 days on 96 A100. Reference's result, not ours (official README): k-NN 82.0, linear
84.5. We have not run this recipe. Its epochs are passes over ImageNet-22k (14,197,122 images, 4,621 steps each): on
other data, set config.epochs and the epochs of the schedules for the same number of steps. The published ViT-L/14 is
another model: it has a plain MLP and was distilled from ViT-g.
"""

from ml_collections import ConfigDict

from dino_jax import recipes

EPOCH = 1_250 / 4_621  # the official "epoch" as a part of a pass over ImageNet-22k


def get_config() -> ConfigDict:
    """Changes from `dinov2_vitl16_short`."""
    config = recipes.get_config("dinov2_vitl16_short")
    config.batch_size = 3_072
    config.epochs = 500 * EPOCH
    config.model.patch_size = 14
    config.model.ffn = "swiglu"
    config.model.drop_path_rate = 0.4
    config.head.out_dim = 131_072
    config.head.bottleneck_dim = 384
    config.dino.warmup_teacher_temp_epochs = 30 * EPOCH
    config.dino.teacher_momentum = 0.994
    config.dinov2.targets = "sinkhorn"
    config.dinov2.group_images = 32
    config.dinov2.separate_head = True
    config.dinov2.patch_out_dim = 131_072
    config.dinov2.patch_bottleneck_dim = 256
    config.optim.lr = 2e-4
    config.optim.warmup_epochs = 80 * EPOCH
    config.optim.weight_decay_end = 0.2
    config.optim.layer_decay = 1.0
    config.optim.freeze_last_layer_epochs = EPOCH
    config.crops.local_size = 98
    return config
