"""DINOv2 with ViT-g/14 and SwiGLU on ImageNet-22k, 625,000 steps: the official `vitg14`.

    dino-jax train --config=dinov2_vitg14 --workdir=runs/v2 --config.data.source=folder:imagenet22k

Hardware: pods; docs/scaling.md has the memory that it needs. The published ViT-g/14 (k-NN 83.5, linear 86.5, official
README) was trained on other data, LVD-142M, with a phase at 518 pixels. We have not run this recipe.
"""

from ml_collections import ConfigDict

from dino_jax import recipes


def get_config() -> ConfigDict:
    """Changes from `dinov2_vitl14`."""
    config = recipes.get_config("dinov2_vitl14")
    config.model.arch = "vit_giant"
    config.fsdp = 8
    config.dinov2.group_images = 12
    return config
