"""Pretrains a backbone with DINO.

python train.py --config=configs/vits16.py --workdir=runs/a --config.data.source=folder:photos --config.optim.lr=1e-3

The same command with the same workdir resumes.
"""

from absl import flags

from dino_jax import cli, sharding

CONFIG = cli.config_file_flag("configs/default.py")
WORKDIR = flags.DEFINE_string("workdir", None, "folder for checkpoints, metrics and the exported backbone")


def main(argv: list[str]) -> None:
    """Flags in, training out."""
    from dino_jax import train_loop  # not above: processes that read images start with this file, too

    cli.require_no_arguments(argv)
    config, workdir = CONFIG.value, cli.required("workdir", WORKDIR.value)
    sharding.one_device_a_core(config.batch_size, config.accum_steps * config.distributed.num_processes)
    train_loop.train(config, workdir)


if __name__ == "__main__":
    cli.run(main)
