"""Evaluation protocols: one module each, with `default_config()` and `run(backbone, config, out) -> results`."""

from dino_jax.evals import attention, knn

PROTOCOLS = {"knn": knn, "attention": attention}
