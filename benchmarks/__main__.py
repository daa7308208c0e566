"""Every table that this machine can give: `python -m benchmarks`.

On a GPU: ViT-S/16 and ViT-B/16 at batch 64 and at the largest that fits, with XLA's and with cuDNN's attention, with
and without a loop over the blocks; crops, loss. It takes jax, flax, optax, numpy and ml_collections, and for the peers
torch, timm, torchvision and kornia. On a CPU: the small models, crops, loss, and what the host does, for which all of
requirements.txt is needed.
"""

import subprocess
import sys

from benchmarks import environment

GPU = (
    ("ceilings",),
    (
        "step",
        "--arch=vit_small,vit_base",
        "--batch=64,largest",
        "--repeats=20",
        "--ours=xla,cudnn,xla+unroll,cudnn+unroll",
    ),
    ("crops", "--batch=64", "--repeats=20"),
    ("loss", "--repeats=10"),
)
CPU = (("ceilings",), ("step",), ("crops",), ("loss",), ("input",), ("startup",), ("linear",))


def main() -> None:
    """Runs them one after the other."""
    failed = []
    for stage, *options in CPU if environment.on_cpu() else GPU:
        print(f"\n## {stage}\n", flush=True)
        if subprocess.call([sys.executable, "-m", f"benchmarks.{stage}", *options]):
            failed.append(stage)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
