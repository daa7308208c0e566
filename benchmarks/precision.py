"""What bfloat16 changes: a few hundred steps of the demo in float32 and in bfloat16, losses and k-NN side by side.

    python -m benchmarks.precision [--epochs=3]

6,400 bundled images, so that an epoch has 200 steps; in the first the learning rate rises and the last layer is frozen,
as in the demo. On a CPU, bfloat16 is emulated: this compares results, not speed.
"""

import json
import tempfile
from pathlib import Path

from absl import app, flags

from benchmarks import environment
from configs import demo
from dino_jax.training import loop

EPOCHS = flags.DEFINE_integer("epochs", 3, "of 200 steps; the first warms up")
SEED = flags.DEFINE_integer("seed", 0, "config.seed of both")


def curves(dtype: str, epochs: int) -> tuple[list[float], dict[str, float]]:
    """Losses, every 10 steps, and the last k-NN accuracies."""
    config = demo.get_config()
    config.dtype, config.epochs, config.log_every, config.seed = dtype, epochs, 10, SEED.value
    config.data.source = "demo:train:640"
    with tempfile.TemporaryDirectory() as workdir:
        loop.train(config, workdir)
        rows = [json.loads(line) for line in Path(workdir, "metrics.jsonl").read_text().splitlines()]
    knn = [row for row in rows if "knn_top1_teacher" in row][-1]
    return [row["loss"] for row in rows if "loss" in row], {k: v for k, v in knn.items() if k.startswith("knn")}


def main(argv: list[str]) -> None:
    """Prints the comparison."""
    (exact, exact_knn), (fast, fast_knn) = (curves(dtype, EPOCHS.value) for dtype in ("float32", "bfloat16"))
    print(f"\n{environment.describe()}\n\n| | float32 | bfloat16 | difference |\n|---|---|---|---|")
    apart = max(abs(a - b) / a for a, b in zip(exact, fast, strict=True))
    print(f"| loss at the end, largest difference on the way | {exact[-1]:.4f} | {fast[-1]:.4f} | {apart:.2%} |")
    for name, value in exact_knn.items():
        print(f"| {name} | {value:.2f} | {fast_knn[name]:.2f} | {fast_knn[name] - value:+.2f} |")


if __name__ == "__main__":
    app.run(main)
