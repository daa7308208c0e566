"""Pretrains a backbone with DINO.

python train.py --config=configs/vits16.py --workdir=runs/a --config.data.source=folder:photos --config.optim.lr=1e-3

The same command with the same workdir resumes.
"""

from absl import flags

from dino_jax.commands import cli
from dino_jax.distributed import processes

CONFIG = cli.config_file_flag("configs/default.py")
WORKDIR = flags.DEFINE_string("workdir", None, "folder for checkpoints, metrics and the exported backbone")


def main(argv: list[str]) -> None:
    """Flags in, training out."""
    from dino_jax.training import loop  # not above: processes that read images start with this file, too

    cli.require_no_arguments(argv)
    config, workdir = CONFIG.value, cli.required("workdir", WORKDIR.value)
    processes.set_cpu_device_count(config.batch_size, config.accum_steps * config.distributed.num_processes)
    loop.train(config, workdir)


if __name__ == "__main__":
    cli.run(main)
