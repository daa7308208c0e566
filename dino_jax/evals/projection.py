"""A set of features as a picture: each image a point in the plane, colored by its class."""

import colorsys
import csv
import sys
import time
from pathlib import Path

import ml_collections
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dino_jax.errors import UserError
from dino_jax.evals.common.extraction import image_size, l2_normalize
from dino_jax.evals.common.pca import principal_components
from dino_jax.evals.features import FeatureSet, extract_set, knobs, read_set
from dino_jax.weights.backbone import Backbone

METHODS = ("pca", "umap")
SIDE, MARGIN, SMOOTH = 900, 40, 3  # pixels of the plane and around it; drawn so many times larger, then shrunk
NAMED = 30  # classes in the legend at most
UNLABELED = (150, 150, 150)
INK = (40, 40, 40)
# Ten colors told apart by the color-blind too, as far as ten can be; more classes get hues of their own.
COLORS = (
    (31, 119, 180),
    (255, 127, 14),
    (44, 160, 44),
    (214, 39, 40),
    (148, 103, 189),
    (140, 86, 75),
    (227, 119, 194),
    (110, 110, 110),
    (188, 189, 34),
    (23, 190, 207),
)


def default_config() -> ml_collections.ConfigDict:
    """Every knob of `python evaluate.py projection`."""
    own = {
        "features": "",  # a features.npy of `evaluate.py features`, in the place of a source
        "method": "pca",  # or umap (pip install umap-learn)
        "most": 20_000,  # points; of more images so many are drawn at random
        "neighbors": 15,  # of umap: fewer show finer structure, more the whole
        "min_dist": 0.1,  # of umap: the smaller, the tighter the groups
        "seed": 0,  # of umap and of drawing
    }
    return ml_collections.ConfigDict(knobs() | own)


def run(backbone: Backbone, config: ml_collections.ConfigDict, out: Path) -> dict:
    """Projects L2-normalized features to two dimensions; writes METHOD.png and METHOD.csv with each point's image.

    Returns what belongs into results.json: {"figures" (of pca, {"explained": shares of the variance [2]}), "pictures",
    "files", "settings", "images", "seconds", "images_per_second" (of extraction; None without)}.

    Raises UserError: neither or both of source and features are set, or umap-learn is not installed.
    """
    start = time.monotonic()
    _check(config)
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
    draw(points, rows.labels, _class_names(rows), f"{len(points):,} images, {about}").save(picture)
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


def draw(points: np.ndarray, labels: np.ndarray, names: dict[int, str], title: str) -> Image.Image:
    """Points float [N, 2] (x to the right, y up) in the color of their label int [N], with a legend of the names.

    Both axes have the same scale. The order in which points cover each other is random, so that no class hides another.
    """
    colors = class_colors(sorted(names))
    low, high = points.min(0), points.max(0)
    span = float((high - low).max()) or 1.0
    # As large as the points need, but not a strip.
    size = np.ceil(2 * MARGIN + (SIDE - 2 * MARGIN) * np.maximum((high - low) / span, 0.6)).astype(int)
    inside = SMOOTH * (size / 2 + (points - (low + high) / 2) * ((SIDE - 2 * MARGIN) / span))
    radius = SMOOTH * float(np.clip(120 / np.sqrt(len(points)), 1.5, 5))
    plane = Image.new("RGB", tuple((SMOOTH * size).tolist()), "white")
    brush = ImageDraw.Draw(plane)
    for i in np.random.default_rng(0).permutation(len(points)).tolist():
        x, y = inside[i, 0], plane.height - inside[i, 1]
        fill = colors.get(int(labels[i]), UNLABELED)
        brush.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    plane = plane.resize(tuple(size.tolist()), Image.Resampling.LANCZOS)
    return _framed(plane, title, {names[label]: colors[label] for label in sorted(names)})


def class_colors(labels: list[int]) -> dict[int, tuple[int, int, int]]:
    """A color for each label: a table for up to ten, else hues around the circle, neighbors in two brightnesses."""
    if len(labels) <= len(COLORS):
        return dict(zip(labels, COLORS, strict=False))
    hues = {label: i / len(labels) for i, label in enumerate(labels)}
    return {
        label: tuple(round(255 * x) for x in colorsys.hls_to_rgb(hue, (0.35, 0.6)[i % 2], 0.75))  # type: ignore[misc]
        for i, (label, hue) in enumerate(hues.items())
    }


def _framed(plane: Image.Image, title: str, legend: dict[str, tuple[int, int, int]]) -> Image.Image:
    """The plane under its title, with the legend at its right."""
    large, small, line, top = ImageFont.load_default(22), ImageFont.load_default(16), 24, 50
    entries = list(legend.items())
    if len(entries) > NAMED:
        entries = [*entries[: NAMED - 1], (f"... and {len(entries) - NAMED + 1:,} more", (255, 255, 255))]
    texts = [(name if len(name) <= 28 else name[:27] + "...", color) for name, color in entries]
    column = 50 + int(max((small.getlength(name) for name, _ in texts), default=-30))
    width = max(plane.width + column, int(large.getlength(title)) + 2 * 20)
    sheet = Image.new("RGB", (width, top + max(plane.height, 30 + len(texts) * line)), "white")
    sheet.paste(plane, (0, top))
    brush = ImageDraw.Draw(sheet)
    brush.text((20, 14), title, fill=INK, font=large)
    brush.rectangle((20, top + 2, plane.width - 1, top + plane.height - 20), outline=(210, 210, 210))
    for i, (name, color) in enumerate(texts):
        y = top + 10 + i * line
        brush.ellipse((plane.width + 14, y + 3, plane.width + 26, y + 15), fill=color)
        brush.text((plane.width + 34, y), name, fill=INK, font=small)
    return sheet


def _check(config: ml_collections.ConfigDict) -> None:
    if bool(config.source) == bool(config.features):
        raise UserError("set one of --config.source (images) and --config.features (a features.npy)")
    if config.method not in METHODS:
        raise UserError(f"method {config.method!r} is unknown: set --config.method to {' or '.join(METHODS)}")
    for key, least in (("most", 2), ("neighbors", 2)):
        if config[key] < least:
            raise UserError(f"{key} is {config[key]}: set --config.{key} to {least} or more")


def _import_umap():
    try:
        import umap
    except ImportError as error:
        raise UserError(
            f"--config.method=umap needs umap-learn ({error}): pip install umap-learn, or set --config.method=pca"
        ) from error
    return umap


def _some(rows: FeatureSet, most: int, seed: int) -> FeatureSet:
    """At most so many of the rows."""
    if len(rows.features) <= most:
        return rows
    print(f"{most:,} of {len(rows.features):,} images are drawn (--config.most)", file=sys.stderr)
    chosen = np.sort(np.random.default_rng(seed).choice(len(rows.features), most, replace=False))
    names, classes = ([x[i] for i in chosen.tolist()] for x in (rows.names, rows.classes))
    return FeatureSet(np.asarray(rows.features[chosen]), rows.records[chosen], rows.labels[chosen], names, classes)


def _class_names(rows: FeatureSet) -> dict[int, str]:
    """{label: name} of the classes that there are."""
    return {label: name for label, name in zip(rows.labels.tolist(), rows.classes, strict=True) if label >= 0}


def _write_points(rows: FeatureSet, points: np.ndarray, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(("record", "name", "label", "class", "x", "y"))
        for record, name, label, known, (x, y) in zip(
            rows.records.tolist(), rows.names, rows.labels.tolist(), rows.classes, points.tolist(), strict=True
        ):
            writer.writerow((record, name, label, known, f"{x:.6g}", f"{y:.6g}"))
