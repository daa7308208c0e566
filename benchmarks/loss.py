"""Memory and time of head and loss, forward and backward, beside the straightforward implementation.

    python -m benchmarks.loss [--batch=64] [--out_dim=65536,262144] [--repeats=3]

10 views an image, float32. Straightforward is what the formula says: log softmax of all the student's logits
[B, V, K], one cross-entropy for each pair of views. Memory is XLA's own figure for what it allocates beside arguments
and results, also as a multiple of one such [B, V, K].
"""

from functools import partial

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import environment
from dino_jax import dino
from dino_jax.models import DINOHead
from dino_jax.training import chunked_loss

BATCH = flags.DEFINE_integer("batch", 64, "images")
OUT_DIM = flags.DEFINE_list("out_dim", ["65536", "262144"], "K, prototypes")
REPEATS = flags.DEFINE_integer("repeats", 3, "timed runs; the median counts")
VIEWS, EMBED_DIM, STUDENT_TEMP, TEACHER_TEMP = 10, 384, 0.1, 0.04


def targets(head: DINOHead, params: dict, features: jax.Array) -> jax.Array:
    """The teacher's, of the two global crops; student and teacher are the same here."""
    return dino.targets(head.apply({"params": params}, features[:, :2]), jnp.zeros(head.out_dim), TEACHER_TEMP)


def ours(head: DINOHead, params: dict, features: jax.Array) -> jax.Array:
    """The trainer's."""
    z = head.apply({"params": params}, features, method="bottleneck")
    prototypes = dino.DINO(None, head, STUDENT_TEMP, 0.9).prototypes
    return chunked_loss.loss_from_head(
        targets(head, params, features), z, prototypes, params["last_layer"], STUDENT_TEMP
    )


def straightforward(head: DINOHead, params: dict, features: jax.Array) -> jax.Array:
    """Pair by pair."""
    q = targets(head, params, features)
    log_p = jax.nn.log_softmax(head.apply({"params": params}, features) / STUDENT_TEMP)
    pairs = [(g, v) for g in range(2) for v in range(VIEWS) if v != g]
    return sum(-(q[:, g] * log_p[:, v]).sum(-1).mean() for g, v in pairs) / len(pairs)


def main(argv: list[str]) -> None:
    """Prints the table."""
    print(f"{environment.describe()}; batch {BATCH.value}, {VIEWS} views, median of {REPEATS.value}\n")
    print("| K | implementation | MiB | of one [B, V, K] | ms |\n|---|---|---|---|---|")
    features = jax.random.normal(jax.random.key(0), (BATCH.value, VIEWS, EMBED_DIM))
    for K in map(int, OUT_DIM.value):
        head = DINOHead(out_dim=K)
        params = head.init(jax.random.key(1), features[:1, :1])["params"]
        for loss in (ours, straightforward):
            compiled = jax.jit(jax.value_and_grad(partial(loss, head), (0, 1))).lower(params, features).compile()
            used = compiled.memory_analysis().temp_size_in_bytes
            seconds = environment.median_seconds(partial(compiled, params, features), REPEATS.value)
            multiple = used / (4 * BATCH.value * VIEWS * K)
            row = f"{used / 2**20:,.0f} | {multiple:.2f} | {1e3 * seconds:.1f}"
            print(f"| {K:,} | {loss.__name__} | {row} |", flush=True)


if __name__ == "__main__":
    app.run(main)
