"""A run that is killed again and again must end as if nothing had happened, and lose little time.

    python -m benchmarks.chaos [--kills=20] [--in_saves=0] [--signal=SIGKILL] [--seed=0] [--folder=runs/chaos]
                               [--run=gs://bucket/run] [--config.KEY=VALUE ...]

Trains the demo once without a disturbance, then again in a folder of its own, where the signal ends it at random
moments (while it imports, compiles, trains, saves) and the same command starts it anew. With --run, that folder is
elsewhere, such as in a bucket. Every flag that is not of this program goes to train.py. Prints a row for
docs/reliability.md; exits with 1 unless both runs end with the same bits and, where SIGTERM asks for it, each life with
its code in time.
"""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging

from benchmarks import environment
from dino_jax import checkpoints, storage
from dino_jax.commands.demo import training_rate
from dino_jax.errors import Stopped
from dino_jax.ownership import LOCK

KILLS = flags.DEFINE_integer("kills", 20, "times the run is killed")
SIGNAL = flags.DEFINE_enum("signal", "SIGKILL", ["SIGKILL", "SIGTERM"], "what ends it")
SEED = flags.DEFINE_integer("seed", 0, "of the moments")
IN_SAVES = flags.DEFINE_integer("in_saves", 0, "of the kills, those that come while a checkpoint is written or sent")
RUN = flags.DEFINE_string("run", None, "of the run that is killed; default: FOLDER/killed")
FOLDER = flags.DEFINE_string("folder", "runs/chaos", "where both runs go; what is there is removed")
POLL = 0.02  # seconds
ROOT = Path(__file__).parent.parent
LONGEST = 30  # seconds from SIGTERM to the end that a scheduler gives
UNFINISHED = ("tmp", "unfinished", "previous", "partial", "damaged")  # what no finished run has in a name


@dataclass
class Report:
    """What came of it."""

    number: signal.Signals = signal.SIGKILL
    kills: int = 0
    in_saves: int = 0  # kills that left a checkpoint unfinished
    codes: set[int] = field(default_factory=set)  # that the killed lives ended with
    slowest_end: float = 0.0  # seconds from a signal to the end of its life
    seconds: float = 0.0  # of all lives together
    reference_seconds: float = 0.0
    step_seconds: float = 0.0  # of all steps, once each, at the reference's median rate
    steps: int = 0
    repeated: int = 0  # steps that were logged, but not saved when the kill came
    left_over: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)  # SHA-256 of each part of the last state
    reference_digests: dict[str, str] = field(default_factory=dict)

    @property
    def same(self) -> bool:
        """Whether both runs ended with the same bits."""
        return bool(self.digests) and self.digests == self.reference_digests

    @property
    def good(self) -> bool:
        """Whether all went as docs/reliability.md promises."""
        # A run that has not begun ends by SIGTERM as any program does.
        codes = {-signal.SIGTERM, Stopped.exit_code} if self.number == signal.SIGTERM else {-self.number}
        return self.same and not self.left_over and self.codes <= codes and self.slowest_end <= LONGEST

    def row(self) -> str:
        """For the table in docs/reliability.md."""
        goodput, best = (self.step_seconds / seconds for seconds in (self.seconds, self.reference_seconds))
        parts, codes = ", ".join(self.digests), ", ".join(map(str, sorted(self.codes)))
        return (
            f"| {self.kills} x {self.number.name}, {self.in_saves} in a save, {self.steps:,} steps; codes {codes} "
            f"after {self.slowest_end:.1f} s at most | {'same' if self.same else 'OTHER'} SHA-256 of {parts} | "
            f"{self.repeated:,} steps done twice | {', '.join(self.left_over) or 'nothing'} left over | "
            f"goodput {goodput:.0%} (never killed: {best:.0%}) |"
        )


def start(workdir: Path | str, log: Path, arguments: list[str]) -> subprocess.Popen:
    """train.py in a session of its own, so that its workers die with it; what it says goes to `log`."""
    command = [sys.executable, "train.py", "--config=configs/demo.py", *arguments, f"--workdir={workdir}"]
    with open(log, "a") as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)


def finish(process: subprocess.Popen, log: Path) -> None:
    """Waits for the end, which must be a good one."""
    if process.wait():
        raise SystemExit(f"exit code {process.returncode}, see {log}")


def last_logged(log: Path, since: int) -> int:
    """The last step that the run said it had done, in its log from that byte on; 0 without one."""
    said = log.read_bytes()[since:].decode()
    return max((int(step.replace(",", "")) for step in re.findall(r"^step ([\d,]+)/", said, re.MULTILINE)), default=0)


def names(workdir: Path | str) -> list[str]:
    """All files and folders of a workdir; in a bucket, its objects."""
    if storage.is_remote(workdir):
        return list(storage.Store(str(workdir)).sizes())
    return sorted(path.relative_to(workdir).as_posix() for path in Path(workdir).rglob("*"))


def last_saved(workdir: Path | str) -> int:
    """The step of the newest checkpoint; 0 without one."""
    manifests = (re.fullmatch(r"checkpoints/(\d+)/manifest.json", name) for name in names(workdir))
    return max((int(found[1]) for found in manifests if found), default=0)


def unfinished(workdir: Path | str) -> list[str]:
    """Checkpoints that are being written or sent."""
    found = {name.split("/")[1] for name in names(workdir) if name.startswith("checkpoints/")}
    return sorted(found - {name.split("/")[1] for name in names(workdir) if name.endswith("/manifest.json")})


def digests(workdir: Path | str) -> dict[str, str]:
    """SHA-256 of every part (student, teacher, center, opt_state, ...) of the newest state."""
    with storage.fetched(f"{workdir}/checkpoints/{last_saved(workdir)}/state") as folder:
        state = checkpoints.restore_arrays(folder, checkpoints.tree_of(folder))
    return {name: _digest(part) for name, part in state.items() if jax.tree.leaves(part)}


def _digest(tree) -> str:
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def left_over(workdir: Path | str) -> list[str]:
    """Files and folders that a killed process left half-written."""
    words = (*UNFINISHED, LOCK) if storage.is_remote(workdir) else UNFINISHED
    return unfinished(workdir) + [name for name in names(workdir) if any(word in name for word in words)]


def run(
    kills: int,
    seed: int,
    folder: Path,
    arguments: list[str],
    number: signal.Signals = signal.SIGKILL,
    workdir: str | None = None,
    in_saves: int = 0,
) -> Report:
    """Trains `folder`/reference in one go, and `workdir` (by default `folder`/killed) in kills + 1 lives."""
    folder = folder.resolve()  # as Orbax wants it
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    reference, killed = folder / "reference", workdir or folder / "killed"
    said, log = folder / "reference.log", folder / "killed.log"
    report, rng = Report(number), random.Random(seed)

    began = time.monotonic()
    process = start(reference, said, arguments)
    while process.poll() is None and not last_logged(said, 0):
        time.sleep(POLL)
    startup = time.monotonic() - began
    finish(process, said)
    report.reference_seconds = time.monotonic() - began
    config = json.loads((reference / "config.json").read_text())
    report.steps = last_saved(reference)
    report.step_seconds = report.steps * config["batch_size"] / training_rate(reference / "metrics.jsonl")
    pace = report.step_seconds / report.steps * config["log_every"]  # seconds from one line of the log to the next

    began = time.monotonic()
    for life in range(kills):
        # A fifth of the kills come while the run starts, the others by a step that leaves the later ones theirs.
        saved = last_saved(killed)
        moment = rng.uniform(-0.4, 1.6)
        in_save = rng.random() < (in_saves - report.in_saves) / (kills - life)
        until = saved + (0 if in_save else moment) * (report.steps - saved) / (kills - life + 1)
        latest = (1 + 2 * moment) * startup if moment < 0 and not in_save else float("inf")
        since = log.stat().st_size if log.exists() else 0
        born, process = time.monotonic(), start(killed, log, arguments)
        while process.poll() is None and time.monotonic() - born < latest and last_logged(log, since) <= until:
            time.sleep(POLL)
        while in_save and process.poll() is None and not unfinished(killed):
            time.sleep(POLL)
        time.sleep(0 if in_save else rng.uniform(0, pace))
        if process.poll() is not None:
            finish(process, log)
            break  # faster than thought: fewer kills, which the report says
        struck = time.monotonic()
        os.killpg(process.pid, number)
        report.codes.add(process.wait())
        report.slowest_end = max(report.slowest_end, time.monotonic() - struck)
        report.in_saves += bool(in_save and unfinished(killed))
        reached, saved = max(last_logged(log, since), saved), last_saved(killed)
        report.kills += 1
        report.repeated += max(0, reached - saved)
        print(f"kill {report.kills} at step {reached:,}, step {saved:,} is saved", flush=True)
    finish(start(killed, log, arguments), log)
    report.seconds = time.monotonic() - began
    report.digests, report.reference_digests = digests(killed), digests(reference)
    report.left_over = left_over(killed)
    return report


def main(argv: list[str]) -> None:
    """Prints the row; the arguments are train.py's."""
    logging.set_verbosity(logging.WARNING)  # Orbax tells a page about every checkpoint
    number, folder = signal.Signals[SIGNAL.value], Path(FOLDER.value)
    report = run(KILLS.value, SEED.value, folder, argv[1:], number, RUN.value, IN_SAVES.value)
    print(f"\n{environment.describe()}; {' '.join(argv[1:]) or 'configs/demo.py as it is'}\n")
    print(report.row())
    sys.exit(0 if report.good and report.kills == KILLS.value else 1)


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: flags.FLAGS(argv, known_only=True))
