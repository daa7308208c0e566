"""A config small enough to train for a few steps in a test."""

from configs import demo

# The demo and the ablation as commands, a few steps long.
SHORT = [
    "--config.epochs=2",
    "--config.batch_size=16",
    "--config.log_every=1",
    "--config.data.source=demo:train:8",
    "--config.evals.knn.train=demo:train:3",
    "--config.evals.knn.test=demo:test:3",
    "--config.evals.knn.k=5",
]


def tiny_config(**changes):
    """The demo's, with a smaller head, few images and no evaluation; changes by dotted name with `__` for the dot."""
    config = demo.get_config()
    config.batch_size = 16
    config.epochs = 2
    config.log_every = 1
    config.head.out_dim = 64
    config.head.hidden_dim = 32
    config.head.bottleneck_dim = 16
    config.crops.local_number = 2
    config.data.source = "demo:train:8"  # 80 images: 5 steps an epoch
    config.evals.knn.every_epochs = 0
    config.evals.knn.train = ""
    config.evals.knn.test = ""
    config.checkpoint.every_steps = 4
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config
