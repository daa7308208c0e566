"""DINO self-supervised pretraining in JAX: a student, its moving average as teacher, and many crops."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dino_jax.data.sources import open_source
    from dino_jax.dino import TrainState
    from dino_jax.models.tokens import Tokens
    from dino_jax.training.loop import train
    from dino_jax.weights.backbone import Backbone, load_backbone

# The public names and where they live. They are imported when asked for, so that `import dino_jax` is fast and a
# program that only loads a backbone needs nothing that only training needs.
_HOME = {
    "Backbone": "weights.backbone",
    "Tokens": "models.tokens",
    "TrainState": "dino",
    "load_backbone": "weights.backbone",
    "open_source": "data.sources",
    "train": "training.loop",
}

__all__ = ["Backbone", "Tokens", "TrainState", "load_backbone", "open_source", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dino_jax' has no attribute {name!r}")
    return getattr(import_module(f"dino_jax.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
