"""Continued training from a published DINOv2 or DINO backbone, on your own images.

    dino-jax train --config=dinov2_continue --workdir=runs/mine --config.data.source=folder:images \
        --config.init_from=dinov2_vits14_pretrain.pth

Published backbones come without heads, and new heads start out random: their gradients would destroy the features in a
few hundred steps. So the backbone stands still while heads and centers settle (optim.freeze_backbone_epochs), then
trains at a small learning rate, smaller still in early layers. The run says when features get worse than at its start.
"""

from ml_collections import ConfigDict

from dino_jax import recipes


def get_config() -> ConfigDict:
    """Changes from `dinov2_vits14_small`."""
    config = recipes.get_config("dinov2_vits14_small")
    config.epochs = 20
    config.init_adapt = "image_size"
    config.head.out_dim = 4_096
    config.dino.teacher_momentum = 0.999
    config.dino.warmup_teacher_temp_epochs = 5
    config.optim.lr = 1e-4
    config.optim.min_lr = 1e-7
    config.optim.warmup_epochs = 2
    config.optim.freeze_backbone_epochs = 2
    config.optim.freeze_last_layer_epochs = 0
    config.optim.weight_decay_end = 0.04
    config.optim.layer_decay = 0.8
    config.evals.probe.every_epochs = 1
    config.evals.knn.every_epochs = 1
    return config
