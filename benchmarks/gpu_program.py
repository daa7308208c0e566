"""The train step that an H100 would run, compiled for one that is not there: kernels, traffic, memory.

    pip install -U "jax[cuda13]"
    python -m benchmarks.gpu_program [--arch=vit_small,vit_base] [--batch=64] [--programs=xla,cudnn+unroll]

XLA's own program for the GPU, read kernel by kernel. Milliseconds are arithmetic: each kernel takes as long as its
products need at the chip's peak, or as its arguments and results need at the memory's, whichever is longer; launches
cost nothing. What a GPU would do otherwise: it tunes by trying, and may then fuse what stands beside a product into it.
"""

import time
from collections import Counter

import jax
from absl import app, flags
from jax.experimental import topologies

from benchmarks import environment, hlo
from dino_jax.distributed import sharding
from dino_jax.training.setup import abstract_state, build_setup
from dino_jax.training.step import lower_step

ARCH = flags.DEFINE_list("arch", ["vit_small", "vit_base"], "architectures, patch 16")
BATCH = flags.DEFINE_integer("batch", 64, "images on the GPU")
PROGRAMS = flags.DEFINE_list(
    "programs", ["xla", "cudnn", "xla+unroll", "cudnn+unroll"], "config.model.attention, and whether model.unroll"
)

# What XLA asks of a device before it compiles for it: NVIDIA's figures for an H100 SXM.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 13 } runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
UNTUNED = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


def compile_step(arch: str, batch: int, program: str) -> jax.stages.Compiled:
    """The train step for one H100, in bfloat16."""
    config = environment.recipe_config(arch, program)
    config.batch_size, config.dtype = batch, "bfloat16"
    gpu = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    mesh = sharding.make_mesh(list(gpu.devices))
    setup = build_setup(config, steps_per_epoch=1_000)
    return lower_step(setup, mesh, abstract_state(setup, mesh)).compile(compiler_options=UNTUNED)


def main(argv: list[str]) -> None:
    """Prints the table."""
    jax.config.update("jax_platforms", "cpu")  # with its plugin for GPUs installed, JAX would look for one
    print(f"{environment.describe()}; for an H100, batch {BATCH.value}, bfloat16: ms at its peaks\n")
    print(f"| step | kernels | GB moved | {' | '.join(hlo.STAGES)} | ms | GiB of memory | compiled in s |")
    print("|---|---|---|" + "---|" * (len(hlo.STAGES) + 3))
    for arch in ARCH.value:
        for program in PROGRAMS.value:
            start = time.perf_counter()
            compiled = compile_step(arch, BATCH.value, program)
            seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
            stages, number, moved = Counter(), 0, 0
            for kernel in hlo.kernels(*hlo.parse(compiled.as_text())):
                stages[kernel.stage] += 1e3 * kernel.times * kernel.seconds
                number, moved = number + kernel.times, moved + kernel.times * kernel.moved
            each = " | ".join(f"{stages[stage]:.1f}" for stage in hlo.STAGES)
            gib = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30
            print(
                f"| {arch}/16, {program} | {number:,} | {moved / 1e9:.0f} | {each} | {sum(stages.values()):.1f} "
                f"| {gib:.1f} | {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    app.run(main)
