"""Evaluation protocols, each a module with `default_config()`, `LIMITS` and `run(backbone, config, out) -> results`."""

from dino_jax.evals import (
    attention,
    attention_jaccard,
    copy_detection,
    features,
    knn,
    linear,
    patch_pca,
    probe,
    projection,
    retrieval,
    segmentation,
    video_segmentation,
)

# These divide their images among all processes. Process 0 runs the others alone.
DIVIDED = {"knn", "linear", "retrieval", "copy_detection", "features", "projection", "probe"}

PROTOCOLS = {
    "knn": knn,
    "linear": linear,
    "attention": attention,
    "attention_jaccard": attention_jaccard,
    "video_segmentation": video_segmentation,
    "segmentation": segmentation,
    "retrieval": retrieval,
    "copy_detection": copy_detection,
    "probe": probe,
    "features": features,
    "projection": projection,
    "patch_pca": patch_pca,
}
