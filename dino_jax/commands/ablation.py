"""The paper's ablation (section 5) on the bundled garments: each part left out in turn, and what happens then.

    python -m dino_jax.commands.ablation --workdir=runs/ablation

One run after the other, each in WORKDIR/CELL as train.py would leave it; the same command goes on where it stopped.
Prints a table, and writes it as ablation.json beside ablation.png, the two kinds of collapse (the paper's figure 7).
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont

from dino_jax.commands import cli, demo
from dino_jax.distributed.processes import set_cpu_device_count
from dino_jax.errors import NotFiniteError, UserError
from dino_jax.provenance import plain, versions
from dino_jax.training import loop
from dino_jax.training.config_checks import check_config
from dino_jax.weights.backbone import load_backbone


class Cell(NamedTuple):
    """A run of the ablation."""

    title: str
    changes: dict  # of the config, by dotted name
    color: str  # Okabe and Ito's, which color-blind people tell apart


CELLS = {
    "full": Cell("DINO", {}, "#000000"),
    "no_momentum": Cell("teacher = student", {"dino.teacher_update": "copy"}, "#E69F00"),
    "once_per_epoch": Cell("teacher once an epoch", {"dino.teacher_update": "epoch"}, "#56B4E9"),
    "no_centering": Cell("no centering", {"dino.centering": False}, "#D55E00"),
    "no_sharpening": Cell("no sharpening", {"dino.sharpening": False}, "#0072B2"),
    "neither": Cell("neither of the two", {"dino.centering": False, "dino.sharpening": False}, "#CC79A7"),
    "no_multicrop": Cell("no multi-crop", {"crops.local_number": 0}, "#009E73"),
}
SCALARS = ("loss", "teacher_entropy", "kl", "mean_target_entropy")
FINAL = 0.1  # share of the logged steps, the last ones, whose means are the final figures
NEAR = 0.05  # of ln K: as near as this to an end counts as there


def main(argv: list[str]) -> None:
    """Trains the cells that are not done, prints the table, writes ablation.json and ablation.png."""
    cli.require_no_arguments(argv)
    config, workdir, names = flags.FLAGS.config, Path(flags.FLAGS.workdir), flags.FLAGS.cells
    if not names or set(names) - set(CELLS):
        raise UserError(f"--cells={','.join(names)}: give some of {','.join(CELLS)}")
    set_cpu_device_count(config.batch_size)
    check_config(config, jax.device_count())
    report: dict = {"config": plain(config), "bank": config.evals.knn.train, "bank_full": config.data.source}
    report["ln_k"] = math.log(config.head.out_dim)
    report["pixels"] = demo.knn_top1(config, None)._asdict()
    report["untrained"] = demo.knn_top1(config, demo.untrained(config))._asdict()
    report["cells"] = {}
    for number, name in enumerate(names, 1):
        changes = CELLS[name].changes
        print(f"\n{number} of {len(names)}, {name}: {changes or 'nothing changed'}", flush=True)
        figures = run_cell(changed(config, changes), workdir / name)
        report["cells"][name] = figures | {
            "changes": changes,
            "verdict": verdict(figures, report["ln_k"], report["untrained"]["few"]),
        }
    report["devices"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    report["versions"] = versions()
    (workdir / "ablation.json").write_text(json.dumps(report, indent=2) + "\n")
    picture({name: read_curve(workdir / name) for name in names}, report["ln_k"]).save(workdir / "ablation.png")
    print(f"\n{table(report)}\nwritten: {workdir / 'ablation.json'}, {workdir / 'ablation.png'}")


def changed(config: ConfigDict, changes: Mapping) -> ConfigDict:
    """A copy of the config with changes by dotted name."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    return config


def run_cell(config: ConfigDict, workdir: Path) -> dict:
    """Trains a cell (or goes on) and evaluates its teacher.

    Returns its final `SCALARS` and k-NN top-1 ("few", "full", see `demo.Accuracy`; None where it could not be trained
    to the end, with the reason as "stopped"). They are kept in workdir/report.json, which stands for the run as long as
    the config is the same.
    """
    path = workdir / "report.json"
    if path.exists() and (report := json.loads(path.read_text()))["config"] == plain(config):
        print(f"done before: {path}")
        return report["figures"]
    accuracy, stopped = {"few": None, "full": None}, None
    try:
        loop.train(config, workdir)
    except NotFiniteError as error:  # a result like any other
        stopped = str(error).split(" (")[0]
        print(f"stopped: {error}")
    else:
        accuracy = demo.knn_top1(config, load_backbone(workdir))._asdict()
    figures = final(read_curve(workdir)) | accuracy | {"stopped": stopped}
    path.write_text(json.dumps({"config": plain(config), "figures": figures}, indent=2) + "\n")
    return figures


def read_curve(workdir: Path) -> dict[str, np.ndarray]:
    """What a run logged while training: "step" and each of `SCALARS`, float64 [N]."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    return {name: np.array([line[name] for line in lines], float) for name in ("step", *SCALARS)}


def final(curve: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """Means of the last steps logged (`FINAL`), one batch being noisy; None where nothing was."""
    last = math.ceil(FINAL * len(curve["step"]))
    return {name: float(curve[name][-last:].mean()) if last else None for name in SCALARS}


def verdict(figures: Mapping, ln_k: float, untrained: float) -> str:
    """What became of a run, from its final figures and the k-NN top-1 of the untrained network.

    It has collapsed if the teacher says the same of every image: if the entropy of a batch's mean target is that of the
    single targets, within `NEAR` ln K. (Their difference is what a target tells of its image, in nats.) Which way is
    the teacher's entropy: near 0 one prototype has won, near ln K all are equal; without centering and sharpening
    any other constant answer may come out.
    """
    if figures["stopped"]:
        return f"stopped: {figures['stopped']}"
    if figures["mean_target_entropy"] - figures["teacher_entropy"] < NEAR * ln_k:
        if figures["teacher_entropy"] < NEAR * ln_k:
            return "collapsed: one prototype"
        return "collapsed: uniform" if figures["teacher_entropy"] > (1 - NEAR) * ln_k else "collapsed: one answer"
    return "learns" if figures["few"] > untrained else "no better than untrained"


def table(report: Mapping) -> str:
    """The report for people."""
    lines = [
        f"k-NN top-1 in percent with the labels of {report['bank']} (few) and of {report['bank_full']} (all); "
        f"ln K = {report['ln_k']:.2f}",
        f"{'':<24}{'few':>6}{'all':>6}{'loss':>8}{'entropy':>9}{'KL':>7}",
    ]
    for title, key in (("raw pixels", "pixels"), ("untrained network", "untrained")):
        lines.append(f"{title:<24}{report[key]['few']:>6.1f}{report[key]['full']:>6.1f}")
    for name, figures in report["cells"].items():
        columns = (("few", 6, 1), ("full", 6, 1), ("loss", 8, 2), ("teacher_entropy", 9, 2), ("kl", 7, 2))
        numbers = (
            f"{'-':>{width}}" if figures[key] is None else f"{figures[key]:>{width}.{digits}f}"
            for key, width, digits in columns
        )
        lines.append(f"{CELLS[name].title:<24}{''.join(numbers)}  {figures['verdict']}")
    return "\n".join(lines)


# Pixels of the picture: a panel's axes, what is around them, the legend's column.
PANEL, MARGIN, LEGEND = (430, 300), (52, 44, 56, 56), 200  # width, height; left, top, right, bottom
FONT, SMALL = 15, 13
INK, FAINT = "#333333", "#DDDDDD"
FINER = 3  # it is drawn so many times larger and shrunk, which makes smooth lines


class Panel(NamedTuple):
    """A pair of axes from 0 to `top` and 0 to `end`; pixels are those of the finished picture."""

    left: float  # pixels
    end: float  # of the x axis, steps
    top: float  # of the y axis, nats

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixel of a point."""
        width, height = PANEL
        return self.left + width * x / self.end, MARGIN[1] + height * (1 - y / self.top)


def picture(curves: Mapping[str, Mapping[str, np.ndarray]], ln_k: float) -> Image.Image:
    """Teacher entropy and KL over steps, a line for each cell (`read_curve`), as in figure 7 of the paper."""
    end = max((curve["step"][-1] for curve in curves.values() if len(curve["step"])), default=1)
    highest = max((curve["kl"].max() for curve in curves.values() if len(curve["step"])), default=1)
    left, top, right, bottom = MARGIN
    width, height = left + PANEL[0] + right, top + PANEL[1] + bottom
    pen = Pen((2 * width + LEGEND, height))
    panels = (
        ("teacher_entropy", "teacher entropy, nats", 1.12 * ln_k),
        ("kl", "KL(teacher || student), nats", 1.05 * highest),
    )
    for number, (scalar, title, highest) in enumerate(panels):
        panel = Panel(number * width + left, end, highest)
        draw_axes(pen, panel, title)
        if scalar == "teacher_entropy":
            pen.dashed(panel.at(0, ln_k), panel.at(end, ln_k))
            pen.text((panel.at(end, ln_k)[0] + 6, panel.at(end, ln_k)[1]), "ln K", "lm", SMALL)
        names = sorted(curves, key=lambda name: name != "full")
        for above, name in reversed(list(enumerate(names))):
            points = [panel.at(x, y) for x, y in zip(curves[name]["step"], curves[name][scalar], strict=True)]
            # Lines that lie on one another are all seen: what is drawn first is the widest.
            pen.line(points, CELLS[name].color, 1.8 + 0.5 * above)
    for place, name in enumerate(curves):
        x, y = 2 * width, top + 10 + 24 * place
        pen.line([(x, y), (x + 26, y)], CELLS[name].color, 4)
        pen.text((x + 34, y), CELLS[name].title, "lm")
    return pen.finished()


def draw_axes(pen: "Pen", panel: Panel, title: str) -> None:
    """Frame, numbers, faint lines at them, title."""
    for x in ticks(panel.end):
        pen.text((panel.at(x, 0)[0], panel.at(0, 0)[1] + 6), f"{x:,.0f}", "mt", SMALL)
    for y in ticks(panel.top):
        pen.line([panel.at(0, y), panel.at(panel.end, y)], FAINT if y else INK, 1)
        pen.text((panel.left - 7, panel.at(0, y)[1]), f"{y:g}", "rm", SMALL)
    pen.line([panel.at(0, 0), panel.at(0, panel.top)], INK, 1)
    pen.text((panel.at(panel.end, 0)[0], panel.at(0, 0)[1] + 26), "step", "rt", SMALL)
    pen.text((panel.left, MARGIN[1] - 14), title, "lb")


def ticks(end: float, most: int = 6) -> Sequence[float]:
    """At most so many and one round numbers from 0 to `end`, evenly spaced: by 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(end / most))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if end / step <= most)
    return [round(place * step, 10) for place in range(int(end / step + 1e-9) + 1)]


class Pen:
    """Draws on a white sheet; places and widths are pixels of the finished picture."""

    def __init__(self, size: tuple[int, int]):
        self._sheet = Image.new("RGB", (size[0] * FINER, size[1] * FINER), "white")
        self._draw = ImageDraw.Draw(self._sheet)

    def line(self, points: Sequence[tuple[float, float]], color: str, width: float) -> None:
        """A line through the points; nothing for less than two."""
        if len(points) > 1:
            self._draw.line([(x * FINER, y * FINER) for x, y in points], color, round(width * FINER), joint="curve")

    def dashed(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """A level line in dashes."""
        for x in np.arange(start[0], end[0], 10):
            self.line([(x, start[1]), (min(x + 6, end[0]), start[1])], INK, 1.5)

    def text(self, at: tuple[float, float], text: str, anchor: str, size: int = FONT) -> None:
        """Text with its anchor (Pillow's letters) there."""
        font = ImageFont.load_default(size * FINER)
        self._draw.text((at[0] * FINER, at[1] * FINER), text, INK, font, anchor=anchor)

    def finished(self) -> Image.Image:
        """The picture in its size."""
        return self._sheet.reduce(FINER)


if __name__ == "__main__":
    cli.config_file_flag("configs/ablation.py")
    flags.DEFINE_string("workdir", "runs/ablation", "folder for the runs, ablation.json and ablation.png")
    flags.DEFINE_list("cells", list(CELLS), "which runs, with commas between; those done before are not trained again")
    cli.run(main)
