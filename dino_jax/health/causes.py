"""Why a run goes wrong: guesses from its settings and signals, each with the knob to turn and a value to try."""

from typing import NamedTuple

from dino_jax.health.history import History


class Cause(NamedTuple):
    """Why, and the way out."""

    cause: str  # a sentence
    knob: str  # dotted setting
    try_: str  # a value, or what to do


FEW_STEPS = 5_000  # 1,500 steps of the demo did not make its features better than before
UNKNOWN = Cause(
    "what is logged does not show the cause; a high learning rate is the most common one", "optim.lr", "a third of it"
)


def no_input(h: History) -> Cause | None:
    """Images without contrast, or pixels that normalization makes constant."""
    if not h.always("crop_pixel_spread", high=0.02):
        return None
    if max(h.setting("data.std", [0])) > 1:  # levels are between 0 and 1
        return Cause(f"data.std is {h.setting('data.std')}, which divides all contrast away", "data.std", "0.25")
    return Cause("the images have no contrast", "data.source", "images that `dino-jax preview` shows as pictures")


def copies(h: History) -> Cause | None:
    """Copies of the same images."""
    if h.always("repeated_images", low=0.2):
        return Cause(
            "many images are copies of others: `dino-jax check` lists them", "data.source", "without the copies"
        )
    return None


def no_sharpening(h: History) -> Cause | None:
    """A teacher that is not sharper than the student."""
    if h.setting("dino.sharpening", True) is False:
        return Cause("the teacher is not sharpened, so that uniform outputs are a solution", "dino.sharpening", "True")
    temp, student = h.last("teacher_temp"), h.setting("dino.student_temp", 0.1)
    if temp > 0.8 * student:
        cause = f"the teacher's temperature, {temp:.3g}, is not well below the student's, {student:.3g}"
        return Cause(cause, "dino.teacher_temp", "0.04")
    return None


def no_average(h: History) -> Cause | None:
    """A teacher that is the student."""
    if h.setting("dino.teacher_update", "ema") == "copy":
        return Cause("the teacher is a copy of the student, not its moving average", "dino.teacher_update", "ema")
    if h.always("teacher_momentum", high=0.9) and h.setting("dino.teacher_update", "ema") == "ema":
        momentum = h.last("teacher_momentum")
        return Cause(f"the teacher forgets all in {1 / (1 - momentum):.0f} steps", "dino.teacher_momentum", "0.996")
    return None


def no_centering(h: History) -> Cause | None:
    """A center that is missing, too slow or too fast."""
    if h.setting("dino.centering", True) is False:
        return Cause("the teacher is not centered, so that one prototype can win always", "dino.centering", "True")
    momentum = h.setting("dino.center_momentum", 0.9)
    if momentum > 0.99:
        cause = f"the center takes {1 / max(1 - momentum, 1e-9):,.0f} steps to follow the teacher's outputs"
        return Cause(cause, "dino.center_momentum", "0.9")
    if momentum < 0.5:
        return Cause(
            "the center is that of one batch, whose noise it adds to the targets", "dino.center_momentum", "0.9"
        )
    return None


def high_rate(h: History) -> Cause | None:
    """A learning rate that makes large steps."""
    if h.last("update_ratio") > 0.02 or h.setting("optim.lr", 0) > 0.05:
        lr = h.setting("optim.lr")
        return Cause(f"the learning rate is too high: optim.lr {lr:g}", "optim.lr", f"{lr / 10:g}")
    return None


def fresh_heads(h: History) -> Cause | None:
    """Random heads whose gradients reach pretrained features from the first step on."""
    if h.setting("optim.freeze_backbone_epochs", 0.0) == 0:
        cause = "new heads train the backbone before they have settled; if heads were loaded, optim.lr is too high"
        return Cause(cause, "optim.freeze_backbone_epochs", "a tenth of epochs, or a third of optim.lr")
    return None


def large_rate(h: History) -> Cause | None:
    """A learning rate that is too high for pretrained features."""
    lr = h.setting("optim.lr")
    return Cause(f"the learning rate is too high for pretrained features: optim.lr {lr:g}", "optim.lr", f"{lr / 3:.2g}")


def low_rate(h: History) -> Cause | None:
    """A learning rate that changes nothing."""
    lr = h.setting("optim.lr")
    return Cause(f"the learning rate is too low: optim.lr {lr:g}", "optim.lr", "5e-4")


def fixed_teacher(h: History) -> Cause | None:
    """A teacher that does not follow the student."""
    if h.always("teacher_momentum", low=0.999999):
        return Cause("the teacher never follows the student: its momentum is 1", "dino.teacher_momentum", "0.996")
    return None


def short_run(h: History) -> Cause | None:
    """Fewer steps than features take to get better."""
    if 0 < h.total_steps < FEW_STEPS:
        return Cause(f"the run has only {h.total_steps:,} steps", "epochs", "four times as many")
    return None


def strong_decay(h: History) -> Cause | None:
    """Weight decay that shrinks the parameters faster than they learn."""
    decay = h.last("weight_decay")
    if decay * h.last("lr") > 1e-3 or decay > 2:
        return Cause(f"weight decay {decay:.3g} shrinks the parameters", "optim.weight_decay", "0.04")
    return None


def many_prototypes(h: History) -> Cause | None:
    """More prototypes than images."""
    prototypes = h.setting("head.out_dim", 0)
    if h.images and prototypes > h.images:
        cause = f"{prototypes:,} prototypes for {h.images:,} images"
        return Cause(cause, "head.out_dim", str(max(64, 2 ** (h.images // 8).bit_length() // 2)))
    return None


def few(h: History) -> Cause | None:
    """Images that are seen too often."""
    return Cause("the network can learn these images by heart", "data.source", "more images, or fewer epochs")


def weak_crops(h: History) -> Cause | None:
    """Crops that are the whole image, without changes of color."""
    low = h.setting("crops.global_scale", [0.4, 1.0])[0]
    if low > 0.8:
        return Cause(f"global crops cover {low:.0%} or more of an image", "crops.global_scale", "0.4,1.0")
    return Cause("the crops of an image differ too little", "crops.jitter", "0.8")
