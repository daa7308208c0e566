"""Evaluation protocols: one module each, with `default_config()` and `run(backbone, config, out) -> results`."""

from dino_jax.evals import attention, copy_detection, knn, linear, retrieval

PROTOCOLS = {
    "knn": knn,
    "linear": linear,
    "attention": attention,
    "retrieval": retrieval,
    "copy_detection": copy_detection,
}
