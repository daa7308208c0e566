"""DINOv2 on the bundled garments: the counterpart of `demo`; it takes about as long.

    dino-jax train --config=demo_dinov2 --workdir=runs/demo_dinov2

Hardware: 2 CPU cores.
"""

from ml_collections import ConfigDict

from dino_jax import recipes


def get_config() -> ConfigDict:
    """Changes from `demo`."""
    config = recipes.get_config("demo")
    config.method = "dinov2"
    config.model.layer_scale = 1e-1
    config.head.norm_last_layer = False
    config.dino.teacher_temp_changes = "step"
    config.dinov2.group_images = 16
    config.optim.clip_by = "module"
    config.optim.freeze_by = "lr"
    return config
