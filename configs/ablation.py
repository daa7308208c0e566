"""The base recipe of all cells of `dino-jax ablation`: the demo, trained half as long.

    dino-jax ablation --workdir=runs/ablation

Hardware: 2 CPU cores, 26 minutes for the first seven cells (2026-11-22, AMD EPYC). The results are in
README.md, "Is it learning?".
"""

from ml_collections import ConfigDict

from dino_jax import recipes


def get_config() -> ConfigDict:
    """Changes from the demo: more points per curve, k-NN only at the end."""
    config = recipes.get_config("demo")
    config.epochs = 24
    config.log_every = 50
    config.evals.knn.every_epochs = 0
    return config
