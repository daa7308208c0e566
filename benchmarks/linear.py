"""What a grid of linear probes costs beside a single one.

    python -m benchmarks.linear [--batch=32] [--arch=vit_small] [--classes=1000] [--repeats=5]

One training step at 224 pixels, patch 16: a random crop of each canvas, the frozen backbone, loss and SGD of all heads.
"""

import resource
from functools import partial

import jax
import numpy as np
from absl import app, flags

from benchmarks import environment
from dino_jax.distributed import sharding
from dino_jax.evals import linear
from dino_jax.evals.common import linear_heads
from dino_jax.models import build_backbone
from dino_jax.weights.backbone import Backbone

BATCH = flags.DEFINE_integer("batch", 32, "images a step")
ARCH = flags.DEFINE_string("arch", "vit_small", "a vision transformer, patch 16")
CLASSES = flags.DEFINE_integer("classes", 1_000, "number of classes")
REPEATS = flags.DEFINE_integer("repeats", 5, "timed steps; the median counts")

CARD = {"preprocessing": {"resize": 256, "crop": 224, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}}


def step_seconds(backbone: Backbone, classes: int, batch: int, repeats: int, **grid) -> tuple[int, float]:
    """Number of heads, and median seconds of a step with the default grid changed by `grid`."""
    config, mesh = linear.default_config(), sharding.make_mesh()
    config.update(batch_size=batch, **grid)
    probe = linear.design(backbone, config, classes, images=batch, devices=mesh.size)
    variables = jax.device_get(backbone.variables)
    heads = linear_heads.init_heads(probe, variables)
    momentum = jax.tree.map(np.zeros_like, heads)
    state = sharding.replicate(linear_heads.ProbeState(np.int32(0), variables, heads, momentum), mesh)
    step = sharding.distribute(partial(linear_heads.train_step, probe), mesh)
    rng = np.random.default_rng(0)
    rows = linear_heads.TrainRows(
        canvas=rng.integers(0, 256, (batch, probe.config.canvas_size, probe.config.canvas_size, 3), np.uint8),
        size=np.full((batch, 2), (375, 500), np.float32),
        position=np.arange(batch, dtype=np.int32),
        label=rng.integers(0, classes, batch, np.int32),
    )
    inputs = sharding.shard_batch(rows, mesh)

    def run():
        nonlocal state
        state, losses = step(state, inputs)
        return losses

    return len(probe.kinds) * len(probe.config.lr), environment.median_seconds(run, repeats)


def main(argv: list[str]) -> None:
    """Prints the table."""
    model = build_backbone(ARCH.value, patch_size=16)
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 224, 224, 3), np.float32))
    backbone = Backbone(model, variables, CARD | {"architecture": {"arch": ARCH.value}})
    official = linear_heads.official_kind(backbone)
    one_kind = {"blocks": (official.blocks,), "pooling": official.pooling}
    grids = {
        "the official head alone": {"lr": (linear.OFFICIAL_LR,), **one_kind},
        "its features, all learning rates": one_kind,
        "the whole grid": {},
    }
    print(f"{environment.describe()}; {ARCH.value}/16, 224, batch {BATCH.value}, {CLASSES.value:,} classes\n")
    print("| heads | number | s a step | images/s | against one |\n|---|---|---|---|---|")
    alone = None
    for name, grid in grids.items():
        heads, seconds = step_seconds(backbone, CLASSES.value, BATCH.value, REPEATS.value, **grid)
        alone = alone or seconds
        print(f"| {name} | {heads} | {seconds:.3f} | {BATCH.value / seconds:.1f} | {seconds / alone:.2f} |", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\npeak resident memory of the process, all rows: {peak:.1f} GiB")


if __name__ == "__main__":
    app.run(main)
