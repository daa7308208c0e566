"""Pretrains a backbone with DINO.

    dino-jax train --config=vits16 --workdir=runs/a --config.data.source=folder:photos --config.optim.lr=1e-3

The same command with the same workdir resumes the run. The teacher's backbone is exported to WORKDIR/export. Metrics
are written to WORKDIR/metrics.jsonl and to TensorBoard files. With --config=auto, `dino-jax suggest` chooses the
settings for these images and --hours, and writes them to WORKDIR/suggested.py.
"""

from collections.abc import Sequence

from absl import flags

from dino_jax.commands import cli, report, suggest
from dino_jax.distributed import processes
from dino_jax.training import loop
from dino_jax.training.setup import share_unit

USAGE = "--workdir=FOLDER [--config=RECIPE] [--config.KEY=VALUE ...]"


def define_flags(arguments: Sequence[str]) -> cli.Settings:
    """Defines the flag for the workdir, and returns a recipe's settings."""
    flags.DEFINE_string("workdir", None, "folder, gs:// or s3:// path for checkpoints, metrics and the export")
    flags.DEFINE_float("hours", 1.0, "time for the training, with --config=auto only", lower_bound=0.001)
    with suggest.automatic(arguments) as chosen:
        return cli.recipe(chosen, default="default")


def main(arguments: Sequence[str]) -> None:
    """Trains or resumes a run."""
    cli.require_no_arguments(arguments)
    config, workdir = flags.FLAGS.config, cli.required("workdir", flags.FLAGS.workdir)
    processes.set_cpu_device_count(config.batch_size, share_unit(config) * config.distributed.num_processes)
    loop.train(config, workdir)
    report.after_training(config, workdir)
