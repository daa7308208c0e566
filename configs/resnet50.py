"""ResNet-50, 100 epochs with SGD: the convnet recipe of the official README.

    dino-jax train --config=resnet50 --workdir=runs/resnet50 --config.data.source=folder:imagenet/train

Hardware: 8 GPUs. No result is published for this recipe. The reference's published ResNet-50 (LARS, batch 4,080, 800
epochs; not our result) has k-NN 67.5, linear 75.3. We have not run this recipe on ImageNet.
"""

from ml_collections import ConfigDict

from dino_jax import recipes


def get_config() -> ConfigDict:
    """Changes from the defaults."""
    config = recipes.get_config("default")
    config.model.arch = "resnet50"
    config.model.drop_path_rate = 0.0
    config.optim.name = "sgd"
    config.optim.lr = 0.03
    config.optim.weight_decay = 1e-4
    config.optim.weight_decay_end = 1e-4
    config.crops.global_scale = (0.14, 1.0)
    config.crops.local_scale = (0.05, 0.14)
    return config
