"""Images per second of the whole train step and of feature extraction.

    python -m benchmarks.step [--batch=4] [--arch=vit_small,vit_tiny] [--repeats=7]

The train step is the real one: crops made on the device from uint8 canvases (2 x 224 and 8 x 96), student, teacher,
loss with K = 65,536, gradients, clip, AdamW, teacher and centre. float32 on a CPU, bfloat16 elsewhere.
"""

import resource
from functools import partial

import jax
import numpy as np
from absl import app, flags

from benchmarks import environment
from configs import vits16
from dino_jax import dino, sharding, train_loop

BATCH = flags.DEFINE_integer("batch", 4, "images a step")
ARCH = flags.DEFINE_list("arch", ["vit_small", "vit_tiny"], "architectures, patch 16")
REPEATS = flags.DEFINE_integer("repeats", 7, "timed runs; the median counts")
FEATURE_BATCH = 16


def train_images_per_second(arch: str, batch: int, repeats: int) -> float:
    """Of the full step on all devices."""
    config = vits16.get_config()
    config.model.arch, config.batch_size = arch, batch
    mesh = sharding.make_mesh()
    recipe = train_loop.build_recipe(config, steps_per_epoch=1_000)
    state = train_loop.init_state(recipe, mesh)
    step = jax.jit(partial(dino.train_step, recipe, mesh), donate_argnums=0)
    rng = np.random.default_rng(0)
    side = config.data.canvas_size
    canvas = rng.integers(0, 256, (batch, side, side, 3), np.uint8)
    size = np.full((batch, 2), (375, 500), np.float32)
    arrays = train_loop.DeviceBatch(canvas, size, np.arange(batch, dtype=np.int32))
    inputs = sharding.shard_batch(arrays, mesh)

    def run():
        nonlocal state
        state, metrics = step(state, inputs)
        return metrics

    return batch / environment.median_seconds(run, repeats)


def feature_images_per_second(arch: str, repeats: int) -> float:
    """Of the backbone at 224 x 224, batch 16."""
    backbone = train_loop.build_recipe(_config(arch), steps_per_epoch=1).network.backbone
    images = jax.random.normal(jax.random.key(0), (FEATURE_BATCH, 224, 224, 3))
    variables = jax.jit(backbone.init)(jax.random.key(1), images[:1])
    apply = jax.jit(backbone.apply)
    return FEATURE_BATCH / environment.median_seconds(lambda: apply(variables, images), repeats)


def _config(arch: str):
    config = vits16.get_config()
    config.model.arch = arch
    return config


def main(argv: list[str]) -> None:
    """Prints the table."""
    print(f"{environment.describe()}; batch {BATCH.value}, median of {REPEATS.value}\n")
    print("| stage | images/s |\n|---|---|")
    for arch in ARCH.value:
        rate = train_images_per_second(arch, BATCH.value, REPEATS.value)
        print(f"| train step {arch}/16, 2x224 + 8x96, K 65,536 | {rate:.2f} |", flush=True)
    for arch in ARCH.value:
        rate = feature_images_per_second(arch, REPEATS.value)
        print(f"| features {arch}/16, 224, batch {FEATURE_BATCH} | {rate:.1f} |", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\npeak resident memory of the process, all rows: {peak:.1f} GiB")


if __name__ == "__main__":
    app.run(main)
