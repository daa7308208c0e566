"""DINO self-supervised pretraining in JAX: a student, its moving average as teacher, and many crops."""

from dino_jax.backbone import Backbone, Features, load_backbone

__all__ = ["Backbone", "Features", "load_backbone"]
