"""What can go wrong with a run, how it shows, why, and what to change: a table of small functions.

An *effect* is something that the signals show, such as collapsed outputs. Its *causes* are tried in order, and the first
that fits settings and signals is reported with the knob to turn. Thresholds were chosen on short runs with planted faults
beside healthy ones (benchmarks/planted.py).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from dino_jax.health.history import History

UNIFORM = 0.98  # share of ln K above which the teacher's entropy is that of uniform outputs
SAME = 0.02  # share of ln K below which an entropy, a divergence or the information of targets counts as 0


class Cause(NamedTuple):
    """Why, and the way out."""

    cause: str  # a sentence
    knob: str  # dotted setting
    try_: str  # a value, or what to do


class Finding(NamedTuple):
    """Something wrong with a run."""

    name: str
    what: str  # a sentence
    evidence: str  # the numbers
    cause: Cause


Effect = Callable[[History], str | None]  # the evidence, if it shows
Guess = Callable[[History], Cause | None]


class Entry(NamedTuple):
    """A row of the table."""

    name: str
    what: str
    shows: Effect
    causes: tuple[Guess, ...]
    collapse: bool = False  # the outputs are the same for all images: the run cannot recover by itself
    start: float = 0.0  # share of the run before which it is normal


def findings(history: History) -> list[Finding]:
    """Returns what is wrong with the run at its last logged steps, the worst first."""
    found = []
    for entry in TABLE:
        if history.progress >= entry.start and (evidence := entry.shows(history)):
            cause = next((cause for guess in entry.causes if (cause := guess(history))), UNKNOWN)
            found.append(Finding(entry.name, entry.what, evidence, cause))
    return found


# --- effects ---------------------------------------------------------------------------------------------------------


def nonfinite_steps(h: History) -> str | None:
    """Steps are skipped now, several of the last ones logged or ever more of them."""
    counts = h.lately("skipped_steps")
    if len(counts) > 1 and counts[-1] - counts[0] >= 3:
        return f"{counts[-1]:.0f} steps were skipped, {counts[-1] - counts[0]:.0f} of them lately"
    return None


def uniform(h: History) -> str | None:
    """The teacher's outputs are uniform and the student's equal them."""
    if h.always("teacher_entropy", low=UNIFORM * h.ln_k) and h.always("kl", high=SAME * h.ln_k):
        return f"teacher entropy {h.last('teacher_entropy'):.3f} of ln K = {h.ln_k:.3f}, KL {h.last('kl'):.4f}"
    return None


def single_prototype(h: History) -> str | None:
    """All targets have their mass on one prototype, the same for all images."""
    if h.always("teacher_entropy", high=SAME * h.ln_k) and h.always("mean_target_entropy", high=5 * SAME * h.ln_k):
        return (
            f"teacher entropy {h.last('teacher_entropy'):.3f} and entropy of the mean target "
            f"{h.last('mean_target_entropy'):.3f}, both near 0"
        )
    return None


def same_targets(h: History) -> str | None:
    """The targets of all images are the same."""
    information = [mean - each for mean, each in zip(h.lately("mean_target_entropy"), h.lately("teacher_entropy"))]
    if len(information) == 3 and max(information) < SAME * h.ln_k:
        return f"a target tells {information[-1]:.3f} nats about its image, of at most {h.ln_k:.2f}"
    return None


def few_prototypes(h: History) -> str | None:
    """Only a handful of prototypes win."""
    prototypes = h.setting("head.out_dim")
    if h.always("prototypes_used", high=max(2.5, 0.01 * prototypes)):
        return f"{h.last('prototypes_used'):.1f} of {prototypes:,} prototypes are in use"
    return None


def constant_features(h: History) -> str | None:
    """The features of all images are nearly the same vector."""
    if h.always("teacher_spread", high=0.05):
        return f"the teacher's features have {h.last('teacher_spread'):.4f} of the spread of different vectors"
    return None


def not_moving(h: History) -> str | None:
    """The student's updates are too small to change it within the run."""
    if h.always("update_ratio", high=1e-6) or (h.progress > 0 and h.always("teacher_distance", high=1e-7)):
        return f"an update changes the parameters by {h.last('update_ratio'):.1e} of their norm"
    return None


def teacher_stands_still(h: History) -> str | None:
    """The teacher has not moved since the start."""
    if h.always("teacher_momentum", low=0.999999) and h.setting("dino.teacher_update") != "epoch":
        return f"the teacher keeps {h.last('teacher_momentum'):.6f} of itself at each step"
    return None


def diverging(h: History) -> str | None:
    """The loss rises far above its best, or the gradients explode."""
    losses = [row["loss"] for row in h.rows if isinstance(row.get("loss"), int | float)]
    norms = [row["param_norm"] for row in h.rows if isinstance(row.get("param_norm"), int | float)]
    if len(norms) >= 3 and norms[-1] > 5 * norms[0]:
        return f"the parameters' norm has grown from {norms[0]:.3g} to {norms[-1]:.3g}"
    if len(losses) >= 4 and min(losses[-3:]) > 1.5 * h.ln_k:
        return f"the loss is {losses[-1]:.2f}, above ln K = {h.ln_k:.2f} for uniform outputs"
    return None


def constant_input(h: History) -> str | None:
    """The network sees nothing."""
    if h.always("crop_pixel_spread", high=0.02):
        return f"normalized pixels of a crop deviate by {h.last('crop_pixel_spread'):.4f}"
    return None


def repeated_images(h: History) -> str | None:
    """The same pictures occur many times in a batch."""
    if h.always("repeated_images", low=0.2):
        return f"{h.last('repeated_images'):.0%} of the images of a batch are copies of others in it"
    return None


def few_images(h: History) -> str | None:
    """The images are so few that each is seen thousands of times."""
    epochs = h.setting("epochs", 0)
    if 0 < h.images < 1_000 and epochs * h.images > 0 and epochs > 1_000:
        return f"{h.images:,} images, each seen {epochs:,.0f} times"
    return None


def crops_alike(h: History) -> str | None:
    """The two global crops of an image hardly differ."""
    if h.always("crop_difference", high=0.2):
        return f"two crops of an image differ by {h.last('crop_difference'):.3f} of what unrelated pixels do"
    return None
