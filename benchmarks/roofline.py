"""Where a step's time must go: FLOPs and bytes of each stage, and what they take at a chip's peaks.

    python -m benchmarks.roofline [--arch=vit_small,vit_base] [--batch=64] [--chip="NVIDIA H100 80GB HBM3"]

Counted in the program as it is written, for one device and in bfloat16, on any machine: 2 FLOPs a multiply-add of
matrix products (also those that the backward pass does again), the bytes that these products read and write, and for
the update those of every array once. Softmax, norms and GELU between the products are free here, and no two products
are fused, as those of a fused attention are.
"""

from functools import partial

import jax
import jax.numpy as jnp
from absl import app, flags

from configs import vits16
from dino_jax import dino, optimizers, sharding
from dino_jax.flops import PEAK_FLOPS, count_flops, count_product_bytes
from dino_jax.recipe import abstract_batch, abstract_state, build_recipe

ARCH = flags.DEFINE_list("arch", ["vit_small", "vit_base"], "architectures, patch 16")
BATCH = flags.DEFINE_integer("batch", 64, "images on the device")
BANDWIDTH = {  # bytes a second
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA H200": 4.8e12,
    "NVIDIA A100-SXM4-80GB": 2.04e12,
    "TPU v5e": 0.82e12,
}
CHIP = flags.DEFINE_enum("chip", "NVIDIA H100 80GB HBM3", list(BANDWIDTH), "device")


def stages(arch: str, batch: int) -> dict[str, tuple[int, int]]:
    """FLOPs and bytes by stage."""
    config = vits16.get_config()
    config.model.arch, config.batch_size, config.dtype = arch, batch, "bfloat16"
    recipe = build_recipe(config, steps_per_epoch=1_000)
    mesh = sharding.make_mesh(jax.devices()[:1])
    state = abstract_state(recipe, mesh)
    network, K = recipe.network, config.head.out_dim
    struct = jax.ShapeDtypeStruct
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    inputs = keys, abstract_batch(config, mesh)
    groups = list(jax.eval_shape(recipe.augment, *inputs))

    def teacher(params, stats, groups):
        z, _ = dino.forward(network, params, stats, groups[:1], [None])
        return dino.logits(network, params, z)

    def student(params, stats, groups, q):
        def loss(params):
            z, _ = dino.forward(network, params, stats, groups, [None, None])
            return dino.head_loss(q, z, partial(dino.logits, network, params), config.dino.student_temp)

        return jax.value_and_grad(loss)(params)

    q = struct((batch, 2, K), jnp.float32)
    programs = {
        "crops": (recipe.augment, inputs),
        "teacher": (teacher, (state.teacher, state.teacher_stats, groups)),
        "student, loss, backward": (student, (state.student, state.student_stats, groups, q)),
    }
    counted = {name: (count_flops(fn, *args), count_product_bytes(fn, *args)) for name, (fn, args) in programs.items()}
    parameters = sum(x.size for x in jax.tree.leaves(state.student))
    moments = sum(x.size for x in jax.tree.leaves(jax.eval_shape(optimizers.build(config.optim).init, state.student)))
    # Gradient in; student, teacher and moments in and out.
    return counted | {"AdamW and averages": (0, 4 * (parameters + 2 * (2 * parameters + moments)))}


def main(argv: list[str]) -> None:
    """Prints the table."""
    peak, bandwidth = PEAK_FLOPS[CHIP.value], BANDWIDTH[CHIP.value]
    print(f"{CHIP.value}: {peak / 1e12:.0f} TFLOP/s, {bandwidth / 1e12:.2f} TB/s; batch {BATCH.value}, bfloat16\n")
    print("| stage | GFLOP | GB | FLOP a byte | ms | bound by |\n|---|---|---|---|---|---|")
    for arch in ARCH.value:
        for name, (flops, moved) in stages(arch, BATCH.value).items():
            compute, memory = 1e3 * flops / peak, 1e3 * moved / bandwidth
            bound = "products" if compute > memory else "memory"
            print(
                f"| {arch}/16, {name} | {flops / 1e9:,.0f} | {moved / 1e9:.2f} | {flops / moved:.0f} "
                f"| {max(compute, memory):.2f} | {bound} |"
            )


if __name__ == "__main__":
    app.run(main)
