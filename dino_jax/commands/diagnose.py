"""Says whether a run learns, and if not, why and what to change: from its log alone, in seconds.

    dino-jax diagnose runs/mine
    dino-jax diagnose official/log.txt --prototypes=65536
    dino-jax diagnose dinov2/training_metrics.json --json

LOG is a workdir, or the log of the official DINO (log.txt), DINOv2 (training_metrics.json) or lightly-train
(metrics.jsonl). Other code bases log less, and the command says what cannot be told from it. A run writes the same to
WORKDIR/health.json while it trains.
"""

import json
from collections.abc import Sequence

from absl import flags

from dino_jax import storage
from dino_jax.errors import UserError
from dino_jax.health import monitor
from dino_jax.health.logs import read_log

USAGE = "LOG [--json] [--prototypes=K]"


def define_flags(arguments: Sequence[str]) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_bool("json", False, "print the content of health.json instead of text")
    flags.DEFINE_integer("prototypes", None, "out_dim of the head, if the log does not tell it; default: 65536")


def main(arguments: Sequence[str]) -> None:
    """Reads the log and prints the verdict."""
    if len(arguments) != 1:
        raise UserError(f"usage: dino-jax diagnose {USAGE}, where LOG is a workdir or a file of metrics")
    with storage.fetched(arguments[0], storage.top_files) as path:
        values, log = flags.FLAGS, read_log(path)
    settings = dict(log.settings) | ({"head.out_dim": values.prototypes} if values.prototypes else {})
    health = monitor.of_log(settings, log.total_steps, log.images, log.rows)
    report = health.report()
    if values.json:
        print(json.dumps(report, indent=2))
        return
    print(f"{arguments[0]} ({log.form}), {len(log.rows):,} rows, the last of step {report['step']:,}")
    print(health.summary())
    for finding in report["findings"]:
        when = f"since step {finding['since_step']:,}"
        if finding["until_step"] is not None:
            when += f", resolved at step {finding['until_step']:,}"
        print(f"\n{finding['name']} ({when})\n  {finding['evidence']}")
        print(f"  likely cause: {finding['cause']}\n  try {finding['knob']}: {finding['try']}")
    if log.missing:
        print(f"\nnot logged, so not judged: {', '.join(log.missing)}")
