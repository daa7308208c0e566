"""How long a run takes to its first step: `python -m benchmarks.startup`.

Starts train.py twice in a row, the first time without compiled programs, the second with those that the first left
behind, and reads what it says of its first step. Compilation includes tracing, and goes on while the reader starts.
"""

import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from absl import app, flags

from benchmarks import environment

REPEATS = flags.DEFINE_integer("repeats", 3, "times that both starts are made; the medians count")
ROOT = Path(__file__).parent.parent
RUNS = {
    "ViT-S/16, batch 4": ("vits16", "--config.data.source=demo:train", "--config.batch_size=4", "--config.epochs=20"),
    "the demo": ("demo",),
}
GOALS = {"ViT-S/16, batch 4": "15, 5", "the demo": "10"}


def start(folder: Path, config: str, *settings: str) -> tuple[float, float]:
    """Seconds that compilation takes of a run in `folder`, and all until its first step is done; it is ended there."""
    command = [sys.executable, "train.py", f"--config=configs/{config}.py", f"--workdir={folder / 'run'}", *settings]
    command.append("--config.evals.knn.every_epochs=0")
    shutil.rmtree(folder / "run", ignore_errors=True)
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "programs")}
    said = ""
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | cache, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        said += line
        if seconds := re.match(r"first step after ([\d.]+) s, of which compilation ([\d.]+) s", line):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return float(seconds[2]), float(seconds[1])
    raise SystemExit(f"train.py ended before its first step:\n{said}")


def main(argv: list[str]) -> None:
    """Prints the table."""
    print(f"{environment.describe()}\n")
    print("| | first start: compilation | first step | second start: compilation | first step | goals |")
    print("|---|---|---|---|---|---|")
    for name, settings in RUNS.items():
        times = []
        for _ in range(REPEATS.value):
            with tempfile.TemporaryDirectory() as folder:
                times.append([*start(Path(folder), *settings), *start(Path(folder), *settings)])
        medians = " | ".join(f"{statistics.median(column):.1f} s" for column in zip(*times, strict=True))
        print(f"| {name} | {medians} | {GOALS[name]} |", flush=True)


if __name__ == "__main__":
    app.run(main)
