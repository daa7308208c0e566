"""Writes a run as one self-contained HTML page: nothing in it is loaded from elsewhere."""

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dino_jax import atomic, checkpoints, provenance, recipes
from dino_jax.data.sources import Source, open_source
from dino_jax.errors import UserError
from dino_jax.evals.common import pictures
from dino_jax.health import monitor
from dino_jax.health.history import cross_entropy_of, information, number, split_rows
from dino_jax.health.logs import Log, read_log
from dino_jax.provenance import flat
from dino_jax.report.charts import Chart, Curve, svg
from dino_jax.report.crops import load_crops, picture
from dino_jax.weights.backbone import Backbone, load_backbone
from dino_jax.weights.load import covers

CROPPED = 4  # images whose crops are shown
SHEETS = {
    "neighbors": "Nearest neighbors over the run",
    "attention": "Attention over the run",
    "components": "Components of patches over the run",
}
TILE = 128  # pixels of the longer side of a picture in the page
STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --soft: #5c5f66; --line: #d9dbe0; --back: #fff; --good: #0072b21f }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ea; --soft: #a2a5ad; --line: #3a3c42; --back: #17181b; --good: #56b4e933 }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); margin: 0 auto }
body { max-width: 1320px; padding: 16px }
h1 { font-size: 22px; margin: 0 } h2 { font-size: 17px; margin: 28px 0 8px } p { margin: 4px 0 }
.soft { color: var(--soft) } .verdict { font-weight: 600 }
.finding { border-left: 4px solid #d55e00; padding: 2px 12px; margin: 10px 0 } .over { border-color: var(--line) }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr)); gap: 12px }
svg { width: 100%; height: auto; border: 1px solid var(--line); border-radius: 6px }
svg text { font-size: 11px; fill: var(--soft) } svg .title { font-size: 12.5px; fill: var(--ink) }
svg .grid { stroke: var(--line) } svg .collapse { stroke: #d55e00; stroke-dasharray: 5 4 }
svg .healthy { fill: var(--good) }
.rows { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 596px), 1fr)); gap: 6px 24px }
.row { display: flex; gap: 6px; overflow-x: auto } figure { margin: 0; flex: none; width: 94px }
figure img { width: 94px; height: auto; border-radius: 4px } figcaption { font-size: 11px; color: var(--soft) }
.sheet { overflow-x: auto } .sheet img { max-width: 100%; border-radius: 4px }
table { border-collapse: collapse }
td { padding: 1px 16px 1px 0; font: 12.5px ui-monospace, monospace; overflow-wrap: anywhere }
"""
CHARTS = "Shaded: the healthy range. Dashed: where a collapse ends."
CROPS = "A row for each image: the image, its global crops and its local crops in the first step."
NEIGHBORS = "An image, and the five most similar others with their cosine."
ATTENTION = "Of CLS in the last block, over the image and by head."
COMPONENTS = "The first three principal components of the patches of all these images, as red, green and blue."


def write_report(workdir: str | Path) -> str:
    """Writes WORKDIR/report.html from the log, the export and the training source of a run. Returns its path.

    Pictures are left out, with a line that says why, where the export or the images cannot be read.

    Raises:
        UserError: there is no log, or the page cannot be written.
    """
    with checkpoints.mirrored(workdir, covers=covers) as mirror:
        _write(mirror.local)
    return f"{str(workdir).rstrip('/')}/report.html"


def _write(workdir: Path) -> None:
    log = read_log(workdir)
    health = monitor.of_log(log.settings, log.total_steps, log.images, log.rows)
    sections = [_head(workdir, log, health), *_charts(log)]
    sections += [*_crops(log), *_pictures(workdir, log), *_over_the_run(workdir), _settings(log)]
    title = html.escape(f"{workdir.resolve().name}: {health.verdict()}")
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<link rel="icon" href="data:,"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )
    with atomic.file(workdir / "report.html") as unfinished:
        unfinished.write_text(page, encoding="utf-8")


def _head(workdir: Path, log: Log, health: monitor.Monitor) -> str:
    report = health.report()
    parts = [
        f"<h1>{html.escape(workdir.resolve().name)}: <span class=verdict>{report['verdict']}</span></h1>",
        f"<p class=soft>{html.escape(_about(log, report))}</p>",
        f"<p>{html.escape(health.summary())}</p>",
    ]
    for one in report["findings"]:
        over = one["until_step"] is not None
        when = f"since step {one['since_step']:,}" + (f", until step {one['until_step']:,}" if over else "")
        parts.append(
            f'<div class="finding{" over" if over else ""}"><p><b>{html.escape(one["name"])}</b> '
            f"<span class=soft>{when}</span></p><p>{html.escape(one['evidence'])}</p>"
            f"<p>Likely cause: {html.escape(one['cause'])}. "
            f"Try <code>{html.escape(one['knob'])}</code>: {html.escape(str(one['try']))}</p></div>"
        )
    return "".join(parts)


def _about(log: Log, report: Mapping[str, Any]) -> str:
    settings = log.settings
    speed = [number(row["images_per_second"]) for row in log.rows if "images_per_second" in row]
    parts = [
        f"step {report['step']:,} of {report['total_steps']:,}",
        *([f"{settings['model.arch']}"] if "model.arch" in settings else []),
        *([f"{log.images:,} images of {settings.get('data.source', '?')}"] if log.images else []),
        *([f"{np.median(speed):,.0f} images/s"] if speed else []),
        f"jax {provenance.versions()['jax']}",
    ]
    return " · ".join(parts)


def _charts(log: Log) -> list[str]:
    steps, evaluations = split_rows(log.rows)
    rows = [{**row, "information": information(row)} for row in steps]
    prototypes = log.settings.get("head.out_dim")
    uniform = [("uniform: ln K", math.log(prototypes))] if prototypes else []
    measures, ranks = ("probe_crop_retrieval", "knn_top1_teacher"), ("probe_rankme", "probe_rankme_patch")
    charts = [
        Chart("crop retrieval and k-NN, %", _curves(evaluations, measures, ("crops", "k-NN"))),
        Chart("loss, nats", _curves(rows, (cross_entropy_of(rows),)), uniform),
        Chart(
            "entropy of targets, nats",
            _curves(rows, ("teacher_entropy", "mean_target_entropy"), ("each", "of mean")),
            [*uniform, ("one prototype", 0.0)],
        ),
        Chart("what a target tells of its image, nats", _curves(rows, ("information",)), [("nothing", 0.0)]),
        Chart(
            "spread of features",
            _curves(rows, ("teacher_spread", "student_spread"), ("teacher", "student")),
            [("collapse", 0.0)],
            healthy=(0.1, 1.0),
        ),
        Chart("prototypes in use", _curves(rows, ("prototypes_used",)), [("one", 1.0)], log=True),
        Chart("RankMe", _curves(evaluations, ranks, ("CLS", "patches"))),
        Chart("size of updates, relative", _curves(rows, ("update_ratio",)), healthy=(1e-5, 0.03), log=True),
        Chart("difference of crops", _curves(rows, ("crop_difference",)), [("the same", 0.0)], healthy=(0.3, 1.5)),
        Chart("gradient norm", _curves(rows, ("grad_norm", "grad_norm_q99"), ("", "q 0.99")), log=True),
        Chart("learning rate", _curves(rows, ("lr",))),
        Chart("images per second", _curves(rows, ("images_per_second",))),
    ]
    drawn = "".join(svg(chart) for chart in charts)
    return [f"<h2>Curves</h2><p class=soft>{CHARTS}</p><div class=charts>{drawn}</div>"] if drawn else []


def _curves(rows: Sequence[Mapping[str, Any]], names: Sequence[str], labels: Sequence[str] = ("",)) -> list[Curve]:
    return [
        Curve(label, *zip(*points, strict=True))
        for name, label in zip(names, labels, strict=True)
        if (points := [(row["step"], number(row[name])) for row in rows if name in row])
    ]


def _crops(log: Log) -> list[str]:
    """Crops of a few images as the network saw them in the first step."""
    config = recipes.get_config("default")
    known = flat(config.to_dict())
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in log.settings.items() if name in known}
    if "data.source" not in given:
        return []
    try:
        config.update_from_flattened_dict(given)
        batch, crops = load_crops(config, min(CROPPED, len(open_source(config.data.source))))
        drawn = picture(batch, crops, config.data)
    except (UserError, OSError, TypeError, ValueError) as error:
        return [f"<h2>Crops</h2><p class=soft>left out: {html.escape(str(error))}</p>"]
    return [f"<h2>Crops</h2><p class=soft>{CROPS}</p><div class=sheet>{_image(drawn, 'crops')}</div>"]


def _over_the_run(workdir: Path) -> list[str]:
    """The sheets that the run drew at its start, in its middle and at its end."""
    sections = []
    for name, title in SHEETS.items():
        found = sorted((workdir / "pictures").glob(f"{name}-*.png"))
        if not found:
            continue
        last = _step(found[-1])
        middle = min(found, key=lambda path: abs(_step(path) - last / 2))
        figures = []
        for path in dict.fromkeys([found[0], middle, found[-1]]):
            caption = f"step {_step(path):,}"
            figures.append(f"<div class=sheet>{_image(Image.open(path), caption)}<p class=soft>{caption}</p></div>")
        sections.append(f"<h2>{title}</h2><div class=charts>{''.join(figures)}</div>")
    return sections


def _step(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def _pictures(workdir: Path, log: Log) -> list[str]:
    try:
        backbone = load_backbone(workdir)
        source = open_source(log.settings["data.source"])
    except (UserError, KeyError, OSError) as error:
        return [f"<h2>Pictures</h2><p class=soft>left out: {html.escape(str(error))}</p>"]
    return list(_sections(backbone, source))


def _sections(backbone: Backbone, source: Source) -> Iterable[str]:
    yield _rows("Nearest neighbors", NEIGHBORS, pictures.neighbors(backbone, source))
    if backbone.family.attention_maps:
        yield _rows("Attention", ATTENTION, pictures.attention(backbone, source))
    if backbone.patch_size:
        yield _rows("Components of patches", COMPONENTS, pictures.components(backbone, source))


def _rows(title: str, about: str, rows: Iterable[pictures.Row]) -> str:
    drawn = "".join(f"<div class=row>{''.join(_figure(*one) for one in row)}</div>" for row in rows)
    return f"<h2>{title}</h2><p class=soft>{about}</p><div class=rows>{drawn}</div>"


def _figure(caption: str, image: np.ndarray) -> str:
    tile = Image.fromarray(np.ascontiguousarray(image))
    tile.thumbnail((TILE, TILE), Image.Resampling.BICUBIC)
    return f"<figure>{_image(tile, caption)}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _image(image: Image.Image, caption: str) -> str:
    data = io.BytesIO()
    image.save(data, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    return f'<img src="{source}" alt="{html.escape(caption)}">'


def _settings(log: Log) -> str:
    cells = [(html.escape(name), html.escape(str(value))) for name, value in log.settings.items()]
    rows = "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in cells)
    return f"<h2>Settings</h2><details><summary>{len(cells)} settings</summary><table>{rows}</table></details>"
