"""Every cell of `dino-jax ablation` before its own change: the demo, half as long.

    dino-jax ablation --workdir=runs/ablation

Hardware: 2 CPU cores, 26 minutes (2026-11-22, AMD EPYC). The results are in README.md, "Is it learning?".
"""

from ml_collections import ConfigDict

from dino_jax import recipes


def get_config() -> ConfigDict:
    """Deltas from the demo; curves with many points, k-NN at the end only."""
    config = recipes.get_config("demo")
    config.epochs = 24
    config.log_every = 50
    config.evals.knn.every_epochs = 0
    return config
