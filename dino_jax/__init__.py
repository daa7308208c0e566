"""DINO self-supervised pretraining in JAX: a student, its moving average as teacher, and many crops."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dino_jax.errors import missing_extras

if TYPE_CHECKING:
    from dino_jax.data.sources import open_source
    from dino_jax.dino import TrainState
    from dino_jax.models.tokens import Tokens
    from dino_jax.recipes import get_config
    from dino_jax.training.loop import train
    from dino_jax.weights.backbone import Backbone, load_backbone

# The public names and their modules, which are imported on first use: `import dino_jax` is fast, and a program that
# only loads a backbone imports no library that only training needs.
_HOME = {
    "Backbone": "weights.backbone",
    "Tokens": "models.tokens",
    "TrainState": "dino",
    "get_config": "recipes",
    "load_backbone": "weights.backbone",
    "open_source": "data.sources",
    "train": "training.loop",
}

__version__ = "0.1.0"
__all__ = ["Backbone", "Tokens", "TrainState", "get_config", "load_backbone", "open_source", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dino_jax' has no attribute {name!r}")
    with missing_extras():
        return getattr(import_module(f"dino_jax.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
