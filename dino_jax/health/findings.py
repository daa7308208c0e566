"""What can go wrong with a run, and how it shows: a table.

An effect is something that the signals show, such as collapsed outputs. Its possible causes are tried in order, and the
first that fits settings and signals is reported. Thresholds were chosen on short runs with planted faults beside
healthy ones (`python -m benchmarks.planted`).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from dino_jax.health import causes
from dino_jax.health.causes import Cause
from dino_jax.health.history import LATELY, History, information

UNIFORM = 0.97  # share of ln K above which the teacher's entropy is that of uniform outputs
LOST = 0.9  # share of an evaluation of pretrained weights below which it has got worse
NOTHING = 0.025  # share of ln K below which an entropy, or what a target tells about its image, counts as 0


class Finding(NamedTuple):
    """Something wrong with a run."""

    name: str
    what: str  # a sentence
    evidence: str  # the numbers
    cause: Cause
    collapse: bool  # the outputs are the same for all images

    def as_json(self) -> dict[str, Any]:
        """The finding as plain values, in the terms of WORKDIR/health.json."""
        cause, knob, advice = self.cause
        return {
            "name": self.name,
            "evidence": f"{self.what}: {self.evidence}",
            "cause": cause,
            "knob": knob,
            "try": advice,
        }


class Effect(NamedTuple):
    """A row of the table."""

    name: str
    what: str
    evidence: Callable[[History], str | None]  # the numbers, if it shows
    causes: tuple[Callable[[History], Cause | None], ...]
    collapse: bool = False
    start: float = 0.0  # share of the run before which it is normal


def findings(history: History) -> list[Finding]:
    """Returns what is wrong with the run at its last logged steps."""
    found = []
    for effect in EFFECTS:
        if history.progress >= effect.start and (evidence := effect.evidence(history)):
            cause = next((cause for guess in effect.causes if (cause := guess(history))), causes.UNKNOWN)
            found.append(Finding(effect.name, effect.what, evidence, cause, effect.collapse))
    return found


def nonfinite_steps(h: History) -> str | None:
    """Three or more steps were skipped between the last logged ones."""
    counts = h.lately("skipped_steps")
    lately = counts[-1] - counts[0] if len(counts) == LATELY else 0
    if lately >= 3:
        return f"{lately:.0f} of the last steps, {counts[-1]:.0f} in all"
    lost = len(h.rows) >= LATELY and all(map(math.isnan, h.lately("loss")))
    return "the loss is not a finite number" if lost else None


def uniform_collapse(h: History) -> str | None:
    """The targets of all images are uniform."""
    if not h.settled:
        return None
    if h.always("teacher_entropy", low=UNIFORM * h.ln_k) and _same_targets(h):
        return f"entropy {h.last('teacher_entropy'):.3f} of ln K = {h.ln_k:.3f}, KL {h.last('kl'):.3f}"
    if math.isnan(h.last("teacher_entropy")) and h.always(h.cross_entropy, 0.998 * h.ln_k, 1.002 * h.ln_k):
        return f"the loss stays at {h.last(h.cross_entropy):.3f}, ln K for {h.setting('head.out_dim'):,} prototypes"
    return None


def single_prototype(h: History) -> str | None:
    """The targets of all images are one prototype."""
    if h.always("mean_target_entropy", high=2 * NOTHING * h.ln_k):
        return f"the entropy of the mean target is {h.last('mean_target_entropy'):.3f}, of ln K = {h.ln_k:.3f}"
    return None


def partial_collapse(h: History) -> str | None:
    """The targets of all images are the same in another way, or a handful of prototypes wins always."""
    if not h.settled or uniform_collapse(h) or single_prototype(h):
        return None
    if _same_targets(h):
        return f"a target tells {_information(h)[-1]:.3f} nats about its image, of ln K = {h.ln_k:.3f}"
    prototypes = h.setting("head.out_dim", 0)
    if h.progress > 0.2 and h.always("prototypes_used", high=max(2.5, 0.01 * prototypes)):
        return f"{h.last('prototypes_used'):.1f} of {prototypes:,} prototypes are in use"
    return None


def constant_features(h: History) -> str | None:
    """The teacher's features are nearly one vector."""
    if h.always("teacher_spread", high=0.05):
        return f"they have {h.last('teacher_spread'):.1%} of the spread of features in all directions"
    return None


def not_moving(h: History) -> str | None:
    """The student's updates change nothing, or the teacher does not follow."""
    if h.always("update_ratio", high=1e-6):
        return f"an update changes the student by {h.last('update_ratio'):.1e} of its norm"
    if h.always("teacher_momentum", low=0.999999) and h.setting("dino.teacher_update", "ema") == "ema":
        return "the teacher keeps all of itself at each step"
    return None


def diverging(h: History) -> str | None:
    """Parameters grow without bound, or the loss is above that of uniform outputs."""
    norms, losses = [row["param_norm"] for row in h.rows if row.get("param_norm")], h.lately(h.cross_entropy)
    if len(norms) >= LATELY and min(norms[-LATELY:]) > 4 * norms[0]:
        return f"the norm of the parameters has grown from {norms[0]:.3g} to {norms[-1]:.3g}"
    if h.always(h.cross_entropy, low=1.3 * h.ln_k):
        return f"the loss is {losses[-1]:.2f}, and ln K = {h.ln_k:.2f}"
    return None


def shrinking(h: History) -> str | None:
    """Parameters shrink towards 0."""
    norms = [row["param_norm"] for row in h.rows if row.get("param_norm")]
    if len(norms) >= LATELY and max(norms[-LATELY:]) < 0.5 * norms[0]:
        return f"their norm has fallen from {norms[0]:.3g} to {norms[-1]:.3g}"
    return None


def constant_input(h: History) -> str | None:
    """Crops without contrast."""
    if h.always("crop_pixel_spread", high=0.02):
        return f"the normalized pixels of a crop deviate by {h.last('crop_pixel_spread'):.4f}"
    return None


def overfitting_few_images(h: History) -> str | None:
    """Few different images, each seen thousands of times."""
    if h.always("repeated_images", low=0.2):
        return f"{h.last('repeated_images'):.0%} of the images of a batch are copies of others in it"
    epochs = h.setting("epochs", 0)
    if 0 < h.images < 1_000 and epochs > 1_000:
        return f"{h.images:,} images, each seen {epochs:,.0f} times"
    return None


def crops_alike(h: History) -> str | None:
    """Global crops that are nearly the same picture."""
    if h.always("crop_difference", high=0.3):
        return f"they differ by {h.last('crop_difference'):.1%} of what unrelated pixels do"
    return None


def too_many_prototypes(h: History) -> str | None:
    """More prototypes than images."""
    prototypes = h.setting("head.out_dim", 0)
    if 0 < h.images < prototypes and h.rows:
        return f"{prototypes:,} prototypes, {h.images:,} images, {h.last('prototypes_used'):.0f} in use"
    return None


def features_lost(h: History) -> str | None:
    """An evaluation is clearly worse than that of the pretrained weights, twice in a row."""
    if not h.setting("init_from", ""):
        return None
    values = {name: h.measured(name) for name in PROGRESS}
    lost = {name: many for name, many in values.items() if len(many) > 2 and max(many[-2:]) < LOST * many[0]}
    return ", ".join(f"{name} {many[0]:.1f}, now {many[-1]:.1f}" for name, many in lost.items()) or None


def no_progress(h: History) -> str | None:
    """No evaluation is better than that of the untrained network. Pretrained features need not get better."""
    if h.setting("init_from", ""):
        return None
    gains = {name: (values[0], max(values[-2:])) for name in PROGRESS if len(values := h.measured(name)) > 2}
    if gains and all(best <= first for first, best in gains.values()):
        return ", ".join(f"{name} {first:.1f}, now {best:.1f}" for name, (first, best) in gains.items())
    return None


def _information(h: History) -> list[float]:
    return [information(row) for row in h.rows[-LATELY:]]


def _same_targets(h: History) -> bool:
    told = _information(h)
    return len(told) == LATELY and max(told) < NOTHING * h.ln_k


ADVICE = {"overfitting_few_images", "too_many_prototypes"}  # a run may learn nevertheless
PROGRESS = ("probe_crop_retrieval", "knn_top1_teacher")  # higher is better
INPUT = (causes.no_input, causes.copies)
CENTER = (causes.no_centering,)
COLLAPSE = (causes.no_sharpening, causes.no_average, causes.no_centering, causes.high_rate, causes.strong_decay)
EFFECTS = (
    Effect("nonfinite_steps", "steps are not finite and skipped", nonfinite_steps, (causes.high_rate,)),
    Effect("constant_input", "the network sees no contrast", constant_input, (causes.no_input,)),
    Effect(
        "uniform_collapse", "the outputs are uniform", uniform_collapse, INPUT + COLLAPSE, collapse=True, start=0.01
    ),
    Effect(
        "single_prototype",
        "one prototype always wins",
        single_prototype,
        INPUT + CENTER + COLLAPSE,
        collapse=True,
        start=0.01,
    ),
    Effect(
        "partial_collapse",
        "outputs tell nothing about images",
        partial_collapse,
        INPUT + COLLAPSE,
        collapse=True,
        start=0.01,
    ),
    Effect(
        "constant_features",
        "all images have the same features",
        constant_features,
        INPUT + COLLAPSE,
        collapse=True,
        start=0.01,
    ),
    Effect("not_moving", "the networks do not move", not_moving, (causes.fixed_teacher, causes.low_rate)),
    Effect("diverging", "the run diverges", diverging, (causes.high_rate,)),
    Effect("shrinking_weights", "the parameters shrink", shrinking, (causes.strong_decay,)),
    Effect("overfitting_few_images", "different images are few", overfitting_few_images, (causes.copies, causes.few)),
    Effect("crops_too_alike", "the crops of an image are alike", crops_alike, (causes.no_input, causes.weak_crops)),
    Effect("too_many_prototypes", "prototypes are too many", too_many_prototypes, (causes.many_prototypes,)),
    Effect(
        "features_lost",
        "features are worse than those that the run started from",
        features_lost,
        (causes.fresh_heads, causes.large_rate),
    ),
    Effect(
        "no_progress",
        "features are no better than before training",
        no_progress,
        (*COLLAPSE, causes.short_run),
        start=0.2,
    ),
)
