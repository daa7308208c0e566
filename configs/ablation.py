"""Every cell of `python -m dino_jax.commands.ablation` before its own change: the demo, half as long.

    python -m dino_jax.commands.ablation --workdir=runs/ablation

Hardware: 2 CPU cores, 26 minutes (2026-11-22, AMD EPYC). The results are in README.md, "Is it learning?".
"""

from configs import demo


def get_config():
    """Deltas from the demo; curves with many points, k-NN at the end only."""
    config = demo.get_config()
    config.epochs = 24
    config.log_every = 50
    config.evals.knn.every_epochs = 0
    return config
