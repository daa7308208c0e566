"""Flax modules: backbones, which return `Tokens`, and the projection head. They do not depend on the training code."""

from dino_jax.models.head import DINOHead
from dino_jax.models.registry import ARCHITECTURES, Family, build_backbone, family_of, from_card
from dino_jax.models.tokens import Tokens

__all__ = ["ARCHITECTURES", "DINOHead", "Family", "Tokens", "build_backbone", "family_of", "from_card"]
