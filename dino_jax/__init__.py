"""DINO self-supervised pretraining in JAX: a student, its moving average as teacher, and many crops."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dino_jax.backbone import Backbone, Features, load_backbone

__all__ = ["Backbone", "Features", "load_backbone"]


def __getattr__(name: str) -> Any:
    """The public names, when they are asked for: the train step alone needs nothing that reads images or weights."""
    if name not in __all__:
        raise AttributeError(f"module 'dino_jax' has no attribute {name!r}")
    from dino_jax import backbone

    return getattr(backbone, name)
