"""Projects features to two dimensions and plots them: each image is a point in the color of its class."""

import colorsys
import csv
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_collections
import numpy as np

from dino_jax import atomic
from dino_jax.errors import UserError, missing_extras
from dino_jax.evals.common.extraction import image_size, l2_normalize
from dino_jax.evals.common.pca import principal_components
from dino_jax.evals.common.plots import new_figure, require_matplotlib
from dino_jax.evals.features import LIMITS as FEATURES_LIMITS
from dino_jax.evals.features import FeatureSet, extract_set, knobs, read_set
from dino_jax.limits import COUNT, SEED, SHARE
from dino_jax.weights.backbone import Backbone

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = ("pca", "umap")
NAMED = 30  # most classes in the legend
LONGEST = 28  # characters of a name in the legend
UNLABELED = "#969696"
# Ten colors that color-blind people can tell apart as far as possible; more classes get evenly spaced hues.
COLORS = (
    "#1f77b4",
    "#ff7f0e",
    "#2ca02c",
    "#d62728",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#6e6e6e",
    "#bcbd22",
    "#17becf",
)


LIMITS = {**FEATURES_LIMITS, "most": COUNT, "neighbors": (2, 100_000), "min_dist": SHARE, "seed": SEED}


def default_config() -> ml_collections.ConfigDict:
    """Every knob of `dino-jax evaluate projection`."""
    own = {
        "features": "",  # a features.npy of `dino-jax evaluate features`, instead of a source
        "method": "pca",  # pca, or umap (pip install 'dino_jax[umap]')
        "most": 20_000,  # maximal number of points, drawn at random from more images
        "neighbors": 15,  # umap: small values show local structure, large values global structure
        "min_dist": 0.1,  # umap: small values give tighter clusters
        "seed": 0,  # of umap and of the random choice of points
    }
    return ml_collections.ConfigDict(knobs() | own)


def run(backbone: Backbone, config: ml_collections.ConfigDict, out: Path) -> dict[str, Any]:
    """Projects L2-normalized features to two dimensions; writes METHOD.png, and METHOD.csv with the images.

    Returns:
        The content of results.json: {"figures" (for pca: {"explained": shares of the variance [2]}), "pictures",
        "files", "settings", "images", "seconds", "images_per_second" (of extraction; None without)}.

    Raises:
        UserError: neither or both of source and features are set, or matplotlib or umap-learn is not installed.
    """
    start = time.monotonic()
    _check(config)
    require_matplotlib()
    umap = _import_umap() if config.method == "umap" else None
    rows, _, rate = (
        extract_set(backbone, config, out) if config.source else (read_set(Path(config.features)), None, None)
    )
    rows = _some(rows, config.most, config.seed)
    unit = l2_normalize(rows.features)
    if umap is None:
        points, shares = principal_components(unit, 2)
        figures = {"explained": [round(float(share), 4) for share in shares]}
        about = f"principal components, {100 * shares.sum():.0f}% of the variance"
    else:
        if len(unit) <= config.neighbors:
            raise UserError(f"neighbors {config.neighbors}: set --config.neighbors below {len(unit)}, the images")
        settings = {"n_neighbors": config.neighbors, "min_dist": config.min_dist, "random_state": config.seed}
        points = umap.UMAP(**settings, n_jobs=1, metric="cosine").fit_transform(unit)
        figures, about = {}, f"UMAP of {config.neighbors} neighbors"
    picture, listed = out / f"{config.method}.png", out / f"{config.method}.csv"
    figure = draw(points, rows.labels, _class_names(rows), f"{len(points):,} images, {about}")
    with atomic.file(picture) as unfinished:
        figure.savefig(unfinished, format="png")
    _write_points(rows, points, listed)
    print(
        f"{'images':>8} {'classes':>8}  {about}\n{len(points):>8,} {len(_class_names(rows)):>8,}  {picture}, {listed}"
    )
    return {
        "figures": figures,
        "pictures": [str(picture)],
        "files": [str(listed)],
        "settings": {**config.to_dict(), **image_size(backbone, config)},
        "images": len(points),
        "seconds": round(time.monotonic() - start, 1),
        "images_per_second": rate,
    }


def draw(points: np.ndarray, labels: np.ndarray, names: dict[int, str], title: str) -> "Figure":
    """Draws points, float [N, 2], in the color of their label, int [N], with a legend of the names of labels.

    Both axes have the same scale. Points cover each other in random order, so that no class hides another.
    """
    colors = class_colors(sorted(names))
    order = np.random.default_rng(0).permutation(len(points))
    figure = new_figure(10, 8)
    axes = figure.subplots()
    axes.scatter(
        points[order, 0],
        points[order, 1],
        s=np.clip(40_000 / len(points), 4, 40),  # area in points^2
        c=[colors.get(label, UNLABELED) for label in labels[order].tolist()],
        linewidths=0,
    )
    axes.set_aspect("equal", "datalim")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color("#d2d2d2")
    axes.set_title(title, loc="left")
    if names:
        _draw_legend(figure, {names[label]: color for label, color in colors.items()})
    return figure


def _draw_legend(figure: "Figure", colors: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    shown = list(colors.items())
    if len(shown) > NAMED:
        shown = [*shown[: NAMED - 1], (f"... and {len(shown) - NAMED + 1:,} more", "none")]
    dots = [Line2D([], [], linestyle="", marker="o", color=color) for _, color in shown]
    texts = [name if len(name) <= LONGEST else name[: LONGEST - 1] + "..." for name, _ in shown]
    legend = figure.legend(dots, texts, loc="outside right upper", frameon=False, handletextpad=0.1)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may contain $


def class_colors(labels: list[int]) -> dict[int, str]:
    """Returns a color for each label: a table for up to ten, else hues around the circle in two alternating shades."""
    if len(labels) <= len(COLORS):
        return dict(zip(labels, COLORS, strict=False))
    return {label: _hue(i / len(labels), (0.35, 0.6)[i % 2]) for i, label in enumerate(labels)}


def _hue(hue: float, lightness: float) -> str:
    return "#" + "".join(f"{round(255 * x):02x}" for x in colorsys.hls_to_rgb(hue, lightness, 0.75))


def _check(config: ml_collections.ConfigDict) -> None:
    if bool(config.source) == bool(config.features):
        raise UserError("set one of --config.source (images) and --config.features (a features.npy)")
    if config.method not in METHODS:
        raise UserError(f"method {config.method!r} is unknown: set --config.method to {' or '.join(METHODS)}")
    for key, least in (("most", 2), ("neighbors", 2)):
        if config[key] < least:
            raise UserError(f"{key} is {config[key]}: set --config.{key} to {least} or more")


def _import_umap() -> Any:
    with missing_extras():
        import umap
    return umap


def _some(rows: FeatureSet, most: int, seed: int) -> FeatureSet:
    """Draws at most `most` of the rows at random, in their order."""
    if len(rows.features) <= most:
        return rows
    print(f"{most:,} of {len(rows.features):,} images are drawn (--config.most)", file=sys.stderr)
    chosen = np.sort(np.random.default_rng(seed).choice(len(rows.features), most, replace=False))
    names, classes = ([x[i] for i in chosen.tolist()] for x in (rows.names, rows.classes))
    return FeatureSet(np.asarray(rows.features[chosen]), rows.records[chosen], rows.labels[chosen], names, classes)


def _class_names(rows: FeatureSet) -> dict[int, str]:
    """Returns {label: name} for the classes that occur."""
    return {label: name for label, name in zip(rows.labels.tolist(), rows.classes, strict=True) if label >= 0}


def _write_points(rows: FeatureSet, points: np.ndarray, path: Path) -> None:
    with (
        atomic.file(path) as unfinished,
        unfinished.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(("record", "name", "label", "class", "x", "y"))
        for record, name, label, known, (x, y) in zip(
            rows.records.tolist(), rows.names, rows.labels.tolist(), rows.classes, points.tolist(), strict=True
        ):
            writer.writerow((record, name, label, known, f"{x:.6g}", f"{y:.6g}"))
