"""Trains the demo with one part of the method removed or replaced at a time: the paper's ablation (section 5).

    dino-jax ablation --workdir=runs/ablation

Each run is written to WORKDIR/CELL in the format of `dino-jax train`. The same command resumes after an interruption.
The command prints a table, and writes ablation.json and ablation.png, which shows the two kinds of collapse (figure 7
of the paper).

Cells: full, no_momentum, once_per_epoch, no_centering, no_sharpening, neither (of the two), no_multicrop, mse,
predictor, sinkhorn, sinkhorn_predictor.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from dino_jax import atomic
from dino_jax.commands import cli, demo
from dino_jax.distributed.processes import set_cpu_device_count
from dino_jax.errors import NotFiniteError, UserError
from dino_jax.evals.common.plots import new_figure, require_matplotlib
from dino_jax.json_files import OBJECT, read_object
from dino_jax.provenance import plain, versions
from dino_jax.training import loop
from dino_jax.training.config_checks import check_config
from dino_jax.training.setup import share_unit
from dino_jax.training.writers import read_metrics
from dino_jax.weights.backbone import load_backbone

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

USAGE = "[--workdir=FOLDER] [--cells=CELL,...] [--config=RECIPE] [--config.KEY=VALUE ...]"


class Cell(NamedTuple):
    """A run of the ablation."""

    title: str
    changes: dict[str, Any]  # of the config, by dotted name
    color: str  # from the color-blind safe palettes of Okabe and Ito and, where those are all taken, of Tol


CELLS = {
    "full": Cell("DINO", {}, "#000000"),
    "no_momentum": Cell("teacher = student", {"dino.teacher_update": "copy"}, "#E69F00"),
    "once_per_epoch": Cell("teacher once an epoch", {"dino.teacher_update": "epoch"}, "#56B4E9"),
    "no_centering": Cell("no centering", {"dino.centering": False}, "#D55E00"),
    "no_sharpening": Cell("no sharpening", {"dino.sharpening": False}, "#0072B2"),
    "neither": Cell("neither of the two", {"dino.centering": False, "dino.sharpening": False}, "#CC79A7"),
    "no_multicrop": Cell("no multi-crop", {"crops.local_number": 0}, "#009E73"),
    "mse": Cell("mean squared error", {"method": "dino_mse"}, "#999999"),
    "predictor": Cell("predictor", {"method": "dino_predictor"}, "#F0E442"),
    "sinkhorn": Cell("Sinkhorn-Knopp", {"method": "dino_sinkhorn"}, "#882255"),
    "sinkhorn_predictor": Cell("Sinkhorn and predictor", {"method": "dino_sinkhorn_predictor"}, "#332288"),
}
SCALARS = ("loss", "teacher_entropy", "kl", "mean_target_entropy")
FINAL = 0.1  # share of the logged steps, at the end of the run, that the final figures average
NEAR = 0.05  # tolerance of the verdict, as a share of ln K
INK, FAINT = "#333333", "#DDDDDD"


def define_flags(arguments: Sequence[str]) -> cli.Settings:
    """Defines the flags for workdir and cells, and returns the settings of the recipe `ablation`."""
    flags.DEFINE_string("workdir", "runs/ablation", "folder for the runs, ablation.json and ablation.png")
    flags.DEFINE_list("cells", [], "runs to train, separated by commas; empty: all; finished runs are not repeated")
    return cli.recipe(arguments, default="ablation")


def main(arguments: Sequence[str]) -> None:
    """Trains the unfinished cells, prints the table, and writes ablation.json and ablation.png."""
    cli.require_no_arguments(arguments)
    config, workdir, names = flags.FLAGS.config, Path(flags.FLAGS.workdir), flags.FLAGS.cells or list(CELLS)
    if set(names) - set(CELLS):
        raise UserError(f"--cells={','.join(names)}: give a subset of {','.join(CELLS)}")
    require_matplotlib()
    set_cpu_device_count(config.batch_size, share_unit(config))
    check_config(config, jax.device_count())
    report: dict[str, Any] = {"config": plain(config), "bank": config.evals.knn.train, "bank_full": config.data.source}
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
    atomic.write_json(workdir / "ablation.json", report)
    curves = {name: read_curve(workdir / name) for name in names}
    with atomic.file(workdir / "ablation.png") as unfinished:
        draw_curves(curves, report["ln_k"]).savefig(unfinished, format="png")
    print(f"\n{table(report)}\nwritten: {workdir / 'ablation.json'}, {workdir / 'ablation.png'}")


def changed(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """Returns a copy of the config with changes by dotted name."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    return config


def run_cell(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains a cell, or resumes it, and evaluates its teacher.

    Returns the final `SCALARS` and k-NN top-1 ("few" and "full", see `demo.Accuracy`). If the run could not be trained
    to the end, the accuracies are None and "stopped" is the reason. The figures are cached in workdir/report.json as
    long as the config does not change.
    """
    path = workdir / "report.json"
    report = read_object(path, {"config": OBJECT, "figures": OBJECT}, "delete it") if path.exists() else {}
    if report.get("config") == plain(config):
        print(f"already finished: {path}")
        return report["figures"]
    accuracy, stopped = {"few": None, "full": None}, None
    try:
        loop.train(config, workdir)
    except NotFiniteError as error:  # a valid result of the ablation
        stopped = str(error).split(" (")[0]
        print(f"stopped: {error}")
    else:
        accuracy = demo.knn_top1(config, load_backbone(workdir))._asdict()
    figures = final(read_curve(workdir)) | accuracy | {"stopped": stopped}
    atomic.write_json(path, {"config": plain(config), "figures": figures})
    return figures


def read_curve(workdir: Path) -> dict[str, np.ndarray]:
    """Reads what a run logged during training: "step" and each of `SCALARS`, float64 [N]."""
    rows = [row for row in read_metrics(workdir / "metrics.jsonl") if "loss" in row]
    return {name: np.array([row.get(name) for row in rows], float) for name in ("step", *SCALARS)}


def final(curve: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """Returns means over the last logged steps (`FINAL`), because one batch is noisy; None if nothing was logged."""
    last = math.ceil(FINAL * len(curve["step"]))
    return {name: float(curve[name][-last:].mean()) if last else None for name in SCALARS}


def verdict(figures: Mapping[str, Any], ln_k: float, untrained: float) -> str:
    """Classifies a run by its final figures and the k-NN top-1 of the untrained network.

    A run has collapsed if the teacher's output is the same for every image: if the entropy of a batch's mean target
    equals the entropy of the single targets, within `NEAR` ln K. (The difference is the information of a target about
    its image, in nats.) The teacher's entropy shows the kind of collapse: near 0, one prototype has all the mass; near
    ln K, all prototypes are equal. Without centering and sharpening, any other constant output is possible.
    """
    if figures["stopped"]:
        return f"stopped: {figures['stopped']}"
    if figures["mean_target_entropy"] - figures["teacher_entropy"] < NEAR * ln_k:
        if figures["teacher_entropy"] < NEAR * ln_k:
            return "collapsed: one prototype"
        return "collapsed: uniform" if figures["teacher_entropy"] > (1 - NEAR) * ln_k else "collapsed: one answer"
    return "learns" if figures["few"] > untrained else "no better than untrained"


def table(report: Mapping[str, Any]) -> str:
    """Formats the report as a table."""
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


def draw_curves(curves: Mapping[str, Mapping[str, np.ndarray]], ln_k: float) -> "Figure":
    """Draws teacher entropy and KL over steps, one line per cell (see `read_curve`), as in figure 7 of the paper."""
    figure = new_figure(12, 4)
    entropy, kl = figure.subplots(1, 2)
    _draw_panel(entropy, curves, "teacher_entropy", "teacher entropy, nats")
    entropy.axhline(ln_k, color=INK, linestyle="--", linewidth=1, zorder=2)
    entropy.annotate("ln K", (1, ln_k), (6, 0), entropy.get_yaxis_transform(), "offset points", va="center")
    entropy.set_ylim(0, 1.1 * ln_k)
    _draw_panel(kl, curves, "kl", "KL(teacher || student), nats")
    kl.set_ylim(bottom=0)
    handles = dict(zip(_front_to_back(curves)[::-1], entropy.lines, strict=False))
    legend = figure.legend(handles=[handles[name] for name in curves], loc="outside right upper", frameon=False)
    for line in legend.get_lines():
        line.set_linewidth(4)
    return figure


def _draw_panel(axes: "Axes", curves: Mapping[str, Mapping[str, np.ndarray]], scalar: str, title: str) -> None:
    names = _front_to_back(curves)
    for depth, name in reversed(list(enumerate(names))):
        curve, cell = curves[name], CELLS[name]
        # Lines further back are wider, so that lines that coincide stay visible. Lines at 0 cover the x axis.
        width = 1.2 + 0.45 * depth
        axes.plot(curve["step"], curve[scalar], cell.color, label=cell.title, linewidth=width, clip_on=False, zorder=3)
    axes.set_title(title, loc="left", fontsize="medium")
    axes.set_xlabel("step", loc="right")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(nbins=6)
    axes.set_xlim(0, max((curve["step"][-1] for curve in curves.values() if len(curve["step"])), default=1))
    axes.grid(axis="y", color=FAINT)
    axes.spines[["top", "right"]].set_visible(False)


def _front_to_back(curves: Mapping[str, object]) -> list[str]:
    """Returns the cells' names in drawing order, frontmost first: DINO is in front of all others."""
    return sorted(curves, key=lambda name: name != "full")
