"""What this machine's matrix products and memory can do: `python -m benchmarks.ceilings`.

The products are those of a ViT's block for eight images of 224 pixels, forward and backward (weights' and inputs'
gradients), float32 on a CPU, bfloat16 elsewhere, in XLA and in PyTorch: nobody's step can be faster than its products.
GFLOP/s are the FLOPs of all of them by the sum of their median times. The bandwidth is that of a copy of 256 MiB, read
and written.
"""

import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import environment
from dino_jax.models.registry import ARCHITECTURES

ROW = flags.DEFINE_string("row", "", "one measurement, as JSON: what the command runs in processes of their own")
TOKENS = 8 * 197
REPEATS = 7
COPIED = 256 * 2**20  # bytes


def shapes(arch: str) -> list[tuple[int, int, int]]:
    """The products (m, k) x (k, n) of a block: qkv, proj, fc1 and fc2 with their two backward products each."""
    D = ARCHITECTURES[arch].sizes["embed_dim"]
    layers = [(D, 3 * D), (D, D), (D, 4 * D), (4 * D, D)]
    return [shape for k, n in layers for shape in ((TOKENS, k, n), (TOKENS, n, k), (k, TOKENS, n))]


def rate(arch: str, run: Callable[[int, int, int], Callable[[], object]]) -> float:
    """GFLOP/s over all shapes; run(m, k, n) returns a call that does the product and waits for it."""
    seconds = [environment.median_seconds(run(*shape), REPEATS, warmup=2) for shape in shapes(arch)]
    return sum(2 * m * k * n for m, k, n in shapes(arch)) / sum(seconds) / 1e9


def xla_product(m: int, k: int, n: int) -> Callable[[], object]:
    """A product in XLA."""
    dtype = jnp.float32 if environment.on_cpu() else jnp.bfloat16
    a, b = (jax.random.normal(jax.random.key(0), shape, dtype) for shape in ((m, k), (k, n)))
    product = jax.jit(jnp.matmul)
    return lambda: product(a, b)


def torch_product(m: int, k: int, n: int) -> Callable[[], object]:
    """A product in PyTorch."""
    import torch

    on_gpu = torch.cuda.is_available()
    kind = {"dtype": torch.bfloat16, "device": "cuda"} if on_gpu else {"dtype": torch.float32}
    a, b = torch.randn(m, k, **kind), torch.randn(k, n, **kind)

    def run() -> None:
        torch.matmul(a, b)
        environment.wait_for_torch()

    return run


def copy_rate() -> float:
    """GB/s of a copy in XLA: bytes read and written."""
    x = jnp.zeros(COPIED // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)  # XLA would return the argument of a plain copy
    return 2 * COPIED / environment.median_seconds(lambda: copy(x), REPEATS, warmup=2) / 1e9


def measure(who: str, arch: str = "") -> dict[str, float]:
    """One measurement: GFLOP/s of `xla` or `torch` products, or the GB/s of a `copy`."""
    if who == "copy":
        return {"rate": copy_rate()}
    return {"rate": rate(arch, {"xla": xla_product, "torch": torch_product}[who])}


def main(argv: list[str]) -> None:
    """Prints the table, or with --row one measurement."""
    if ROW.value:
        print(json.dumps(measure(**json.loads(ROW.value))))
        return
    del argv
    print(f"{environment.describe()}\n\n| | XLA | PyTorch |\n|---|---|---|")
    for arch in ("vit_tiny", "vit_small", "vit_base"):
        found = [environment.in_own_process("benchmarks.ceilings", who=who, arch=arch) for who in ("xla", "torch")]
        shown = " | ".join(f"{one['rate']:,.0f}" if "rate" in one else one["error"] for one in found)
        print(f"| products of {arch}, GFLOP/s | {shown} |", flush=True)
    found = environment.in_own_process("benchmarks.ceilings", who="copy")
    print(f"| copy, GB/s | {found.get('rate', float('nan')):.1f} | |")


if __name__ == "__main__":
    app.run(main)
