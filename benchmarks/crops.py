"""All ten crops of a batch on the device: ours, torchvision v2's and kornia's, from the same uint8 canvases.

    python -m benchmarks.crops [--batch=8] [--repeats=10]

2 x 224 and 8 x 96 with flip, jitter, gray, blur, solarize and normalization. torchvision draws one set of random
numbers a call, so it is called for each crop; kornia draws them for each image of a batch. On a GPU ours end in
bfloat16, which the step wants, theirs in float32.
"""

import json
import resource
from functools import partial

import jax
import numpy as np
from absl import app, flags

from benchmarks import environment
from configs import vits16
from dino_jax.data.multicrop import multicrop
from dino_jax.training.setup import compute_dtype

BATCH = flags.DEFINE_integer("batch", 8, "canvases")
REPEATS = flags.DEFINE_integer("repeats", 10, "timed runs; the median counts")
ROW = flags.DEFINE_string("row", "", "one row, as JSON: what the command runs in processes of their own")


def ours(batch: int):
    """The trainer's, one program for the batch."""
    config = vits16.get_config()
    settings = {"crops": config.crops, "mean": config.data.mean, "std": config.data.std}
    crop = jax.jit(partial(multicrop, **settings, dtype=compute_dtype("auto")))
    canvases = jax.device_put(_canvases(batch))
    keys, sizes = jax.random.split(jax.random.key(0), batch), np.full((batch, 2), (375, 500), np.float32)
    return lambda: jax.block_until_ready(crop(keys, canvases, sizes))


def torchvision(batch: int):
    """v2 transforms of uint8 tensors, a call for each crop."""
    environment.import_torchvision()
    import torch
    from torchvision.transforms import v2

    canvases, normalization = _tensors(batch), vits16.get_config().data

    def view(size, scale, blur, solarize):
        return v2.Compose(
            [
                v2.RandomResizedCrop(size, scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.GaussianBlur(9 if size == 224 else 5, (0.1, 2.0))], blur),
                v2.RandomSolarize(128, solarize),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(normalization.mean, normalization.std),
            ]
        )

    views = _views(view)

    def run():
        for image in canvases:
            for transform in views:
                transform(image)
        environment.wait_for_torch()

    return run


def kornia(batch: int):
    """Augmentations of float tensors, a call for each view of the batch."""
    import torch
    from kornia import augmentation as K

    canvases, normalization = _tensors(batch), vits16.get_config().data

    def view(size, scale, blur, solarize):
        kernel = (9, 9) if size == 224 else (5, 5)
        return torch.nn.Sequential(
            K.RandomResizedCrop((size, size), scale, resample="bicubic"),
            K.RandomHorizontalFlip(),
            K.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
            K.RandomGrayscale(p=0.2),
            K.RandomGaussianBlur(kernel, (0.1, 2.0), p=blur),
            K.RandomSolarize(0.0, 0.0, p=solarize),
            K.Normalize(normalization.mean, normalization.std),
        )

    views = _views(view)

    def run():
        with torch.inference_mode():
            images = canvases.float() / 255
            for transform in views:
                transform(images)
        environment.wait_for_torch()

    return run


def _views(view) -> list:
    globals_ = [view(224, (0.4, 1.0), 1.0, 0.0), view(224, (0.4, 1.0), 0.1, 0.2)]
    return globals_ + [view(96, (0.05, 0.4), 0.5, 0.0)] * 8


def _canvases(batch: int) -> np.ndarray:
    side = vits16.get_config().data.canvas_size
    return np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), np.uint8)


def _tensors(batch: int):
    """The canvases, uint8 [B, 3, S, S], where PyTorch computes."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.from_numpy(_canvases(batch).transpose(0, 3, 1, 2).copy()).to(device)


def measure(who: str, batch: int, repeats: int) -> dict:
    """Wall and processor milliseconds an image."""
    run = {"ours": ours, "torchvision": torchvision, "kornia": kornia}[who](batch)
    run()
    before = resource.getrusage(resource.RUSAGE_SELF)
    wall = environment.median_seconds(run, repeats, warmup=0)
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / repeats
    return {"wall": 1e3 * wall / batch, "cpu": 1e3 * cpu / batch}


def main(argv: list[str]) -> None:
    """Prints the table, or with --row a row."""
    if ROW.value:
        print(json.dumps(measure(**json.loads(ROW.value))))
        return
    batch, repeats = BATCH.value, REPEATS.value
    print(f"{environment.describe()}; batch {batch}, median of {repeats}\n")
    print("| crops | ms an image | processor ms an image |\n|---|---|---|")
    for who in ("ours", "torchvision", "kornia"):
        found = environment.in_own_process("benchmarks.crops", who=who, batch=batch, repeats=repeats)
        words = f"{found['error']} |" if "error" in found else f"{found['wall']:.2f} | {found['cpu']:.2f}"
        print(f"| {who} | {words} |", flush=True)


if __name__ == "__main__":
    app.run(main)
