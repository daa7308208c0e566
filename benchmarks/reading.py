"""Reading speed of the sources, from local disk, on the same JPEGs.

    python -m benchmarks.reading [--images=3000] [--rounds=3] [--folder=runs/reading]

Writes smooth random JPEGs of 500 x 375 pixels (as large as ImageNet's) as a folder, ArrayRecord, tar, zip and Parquet,
and reads an epoch of training batches: `read` are stored bytes of random records in one thread, `1 process` and `all`
are canvases of 256 pixels from `data.workers` processes. Files are in the page cache. Readers of Parquet keep a sixth
of the images in memory, as if the set were larger. Of the rounds over all sources, the fastest counts. Also times the
first index of a tar of 10,000 small images.
"""

import io
import os
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import app, flags
from PIL import Image

from benchmarks import environment
from dino_jax.commands.prepare import prepare
from dino_jax.data.order import shuffled
from dino_jax.data.pipeline import train_batches
from dino_jax.data.pixels import Pixels
from dino_jax.data.sources import open_source, parquet

IMAGES = flags.DEFINE_integer("images", 3_000, "number of images", lower_bound=256)
ROUNDS = flags.DEFINE_integer("rounds", 3, "times that each source is read", lower_bound=1)
FOLDER = flags.DEFINE_string("folder", "runs/reading", "where the images go; what is there is removed")
BATCH, CANVAS, WINDOWS, INDEXED = 64, 256, 6, 10_000


def jpeg(rng: np.random.Generator, height: int = 375, width: int = 500) -> bytes:
    """Returns a picture with structures of all sizes, about 60 KB."""
    small = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    picture = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    noisy = np.clip(picture + rng.normal(0, 8, picture.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_tar(path: Path, images: list[bytes]) -> None:
    """Writes images to a tar."""
    with tarfile.open(path, "w") as tar:
        for i, content in enumerate(images):
            member = tarfile.TarInfo(f"{i:06}.jpg")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def containers(folder: Path, images: list[bytes]) -> dict[str, str]:
    """Writes the images in every container; returns the sources by name."""
    (folder / "files").mkdir(parents=True)
    for i, content in enumerate(images):
        (folder / "files" / f"{i:06}.jpg").write_bytes(content)
    write_tar(folder / "all.tar", images)
    shutil.make_archive(str(folder / "all"), "zip", folder / "files")
    rows = [{"bytes": content, "path": None} for content in images]
    pq.write_table(pa.table({"image": rows}), folder / "all.parquet", row_group_size=100)
    prepare(
        f"folder:{folder}/files", folder / "records", canvas_size=0, pixels=Pixels(3), shard_images=1_024, workers=0
    )
    return {
        "folder": f"folder:{folder}/files",
        "ArrayRecord": f"array_record:{folder}/records/*.array_record",
        "tar": f"wds:{folder}/all.tar",
        "zip": f"zip:{folder}/all.zip",
        "Parquet, groups of 100": f"parquet:{folder}/all.parquet",
    }


def read(spec: str) -> float:
    """Returns stored images per second, one epoch in the order of training, in this thread."""
    source = open_source(spec)
    order = shuffled(source, seed=0)
    start = time.perf_counter()
    for i in range(len(source)):
        source[order[i]]  # type: ignore[index]
    return len(source) / (time.perf_counter() - start)


def canvases(spec: str, workers: int) -> float:
    """Returns canvases per second over an epoch, after the first batch."""
    source = open_source(spec)
    steps = len(source) // BATCH
    settings = {"batch_size": BATCH, "canvas_size": CANVAS, "pixels": Pixels(3), "seed": 0}
    with train_batches(source, **settings, workers=workers) as batches:  # type: ignore[arg-type]
        next(batches)
        start = time.perf_counter()
        for _ in range(steps):
            next(batches)
        return steps * BATCH / (time.perf_counter() - start)


def main(arguments: list[str]) -> None:
    """Writes the images, reads them and prints a table."""
    del arguments
    folder, rng = Path(FOLDER.value), np.random.default_rng(0)
    shutil.rmtree(folder, ignore_errors=True)
    images = [jpeg(rng) for _ in range(IMAGES.value)]
    sources = containers(folder, images)
    parquet.MEMORY = sum(map(len, images)) // WINDOWS
    measures = {"read": read, "1 process": lambda spec: canvases(spec, 1)}
    measures["all"] = lambda spec: canvases(spec, os.cpu_count() or 1)
    best = {(name, measure): 0.0 for name in sources for measure in measures}
    for _ in range(ROUNDS.value):
        for (name, measure), value in best.items():
            best[name, measure] = max(value, measures[measure](sources[name]))
    print(f"{environment.describe()}; {IMAGES.value:,} JPEGs of {np.mean(list(map(len, images))) / 1e3:.0f} KB\n")
    print("| images/s | " + " | ".join(measures) + " |\n|---|" + "---|" * len(measures))
    for name in sources:
        print(f"| {name} | " + " | ".join(f"{best[name, measure]:,.0f}" for measure in measures) + " |")
    write_tar(folder / "large.tar", [jpeg(rng, 24, 32)] * INDEXED)
    start = time.perf_counter()
    open_source(f"wds:{folder}/large.tar")
    print(f"\nindex of a tar of {INDEXED:,} images: {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    app.run(main)
