"""Scalars that tell learning from collapse, which the loss alone does not (paper, section 5.3).

A device computes means over its share of the batch, which are averaged over devices with the gradients. What is not
linear in the batch (entropies, spreads) is computed afterwards, from the means of the whole batch.

Shapes: `B` images, `G` = 2 global crops, `V` views, `D` bottleneck, `K` prototypes.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

MEMORY = 0.99  # of `remember_winners`: the last hundred batches or so count
EPS = 1e-12

Scalars = dict[str, jax.Array]


def batch_means(global_crops: jax.Array, logits: jax.Array, q: jax.Array, z: jax.Array, teacher_z: jax.Array) -> Any:
    """Returns what `scalars` needs to know about a batch, as means over its images.

    Args:
        global_crops: normalized pixels [B, G, H, W, C].
        logits: of the teacher, [B, G, K].
        q: targets [B, G, K].
        z: the student's unit vectors [B, V, D].
        teacher_z: the teacher's [B, G, D].
    """
    pixels = global_crops.astype(jnp.float32)
    (B, G, K), within = q.shape, pixels - pixels.mean((2, 3, 4), keepdims=True)
    return {
        "targets": q.mean((0, 1)),
        "entropy": entropy(q).mean(),
        "winners": jnp.zeros(K).at[q.argmax(-1).ravel()].add(1 / (B * G)),
        "square_logit": jnp.square(logits).mean(),
        "z": z.mean((0, 1)),
        "teacher_z": teacher_z.mean((0, 1)),
        "pixel": pixels.mean(),
        "square_pixel": jnp.square(pixels).mean(),
        "square_within": jnp.square(within).mean(),
        "square_difference": jnp.square(pixels[:, 0] - pixels[:, 1]).mean() / 2,
    }


def scalars(means: Any, center: jax.Array, cross_entropy: jax.Array) -> Scalars:
    """Returns the signals of a batch, float32 [].

    - teacher_entropy: mean entropy of the targets, nats. 0: each has one prototype; ln K: they are uniform.
    - kl: mean divergence of the student's output from the targets; the loss is their sum.
    - mean_target_entropy: entropy of the mean target. If it equals teacher_entropy, all images have the same target.
    - center_norm, center_share: norm of the center, and its root mean square relative to that of the logits.
    - student_spread, teacher_spread: spread of the unit vectors per dimension, relative to the 1 / sqrt(D) of vectors
      in all directions. 0: all images have the same features.
    - pixel_spread, crop_pixel_spread: standard deviation of normalized pixels over the batch, and within a crop.
    - crop_difference: root mean square difference of an image's two global crops, relative to that of unrelated
      pixels. 0: the crops are the same.

    Args:
        means: of `batch_means`, over the global batch, and "logits" [K].
        center: [K].
        cross_entropy: the loss, [].
    """
    pixel_variance = jnp.maximum(means["square_pixel"] - jnp.square(means["pixel"]), 0)
    return {
        "teacher_entropy": means["entropy"],
        "kl": cross_entropy - means["entropy"],
        "mean_target_entropy": entropy(means["targets"]),
        "center_norm": jnp.linalg.norm(center),
        "center_share": jnp.sqrt(jnp.square(center).mean() / (means["square_logit"] + EPS)),
        "student_spread": spread(means["z"]),
        "teacher_spread": spread(means["teacher_z"]),
        "pixel_spread": jnp.sqrt(pixel_variance),
        "crop_pixel_spread": jnp.sqrt(means["square_within"]),
        "crop_difference": jnp.sqrt(means["square_difference"] / (pixel_variance + EPS)),
    }


def motion(before: Any, student: Any, teacher: Any) -> Scalars:
    """Returns how far networks are apart, relative to the norm of the student's parameters; float32 [].

    update_ratio: the student from itself before the step. teacher_distance: the teacher from the student, in all that
    the teacher has.
    """
    norm = optax.tree.norm(student) + EPS
    shared = {part: student[part] for part in teacher}
    return {
        "update_ratio": optax.tree.norm(optax.tree.sub(student, before)) / norm,
        "teacher_distance": optax.tree.norm(optax.tree.sub(shared, teacher)) / norm,
    }


def remember_winners(winners: jax.Array, batch: jax.Array) -> jax.Array:
    """Returns a running mean of the share of crops that each prototype wins, [K]. Zeros: no batch yet."""
    return MEMORY * winners + (1 - MEMORY) * batch


def prototypes_used(winners: jax.Array) -> jax.Array:
    """Returns the perplexity of the prototypes that won lately: the number of equally frequent ones; 1 to K."""
    return jnp.exp(entropy(winners / (winners.sum() + EPS)))


def repeated_images(canvas: np.ndarray) -> float:
    """Returns the share of a host's canvases, uint8 [b, S, S, C], that are copies of others among them: 0 to 1.

    Every fourth row and column is compared.
    """
    different = {one.tobytes() for one in canvas[:, ::4, ::4]}
    return 1 - len(different) / len(canvas)


def spread(mean: jax.Array) -> jax.Array:
    """Standard deviation per dimension of unit vectors, relative to 1 / sqrt(D), given their mean [D]: 0 to 1.

    The variances of all dimensions add up to 1 - |mean|^2, because the vectors have length 1.
    """
    return jnp.sqrt(jnp.maximum(1 - jnp.square(mean).sum(), 0))


def entropy(p: jax.Array) -> jax.Array:
    """Entropy in nats over the last axis; 0 log 0 counts as 0."""
    return -jax.scipy.special.xlogy(p, p).sum(-1)
