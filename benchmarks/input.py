"""What an image costs on its way in: decoding on the host; and whether steps wait for it.

    python -m benchmarks.input [--repeats=20] [--seconds=60]

One 500 x 375 JPEG of a photograph (scikit-image's), made into a 256 px canvas on one core; the crops are the device's
(`benchmarks.crops`). In the same run: decoding and the ten crops, photometric operations included, by Pillow on one
core, the way the reference makes them on the host. Then the trainer's stream of batches from a folder of
such files, read by one process, against a step that takes 20 ms an image.
"""

import io
import tempfile
import time
from pathlib import Path

import numpy as np
import skimage.data
from absl import app, flags
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from benchmarks import environment
from configs import vits16
from dino_jax.data.decoding import to_canvas
from dino_jax.data.pipeline import train_batches
from dino_jax.data.pixels import Pixels
from dino_jax.data.sources import open_source
from dino_jax.training import metrics

REPEATS = flags.DEFINE_integer("repeats", 20, "timed runs; the median counts")
SECONDS = flags.DEFINE_float("seconds", 60, "how long steps are watched waiting for data")
BATCH = 8
STEP_PER_IMAGE = 0.02  # seconds


def photograph() -> bytes:
    """A 500 x 375 JPEG."""
    file = io.BytesIO()
    Image.fromarray(skimage.data.coffee()).resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def cpu_milliseconds(run, repeats: int) -> float:
    """Median processor time of this thread."""
    times = []
    for _ in range(repeats + 1):
        start = time.thread_time()
        run()
        times.append(time.thread_time() - start)
    return 1e3 * float(np.median(times[1:]))


def pillow_crops(jpeg: bytes, rng: np.random.Generator) -> list[np.ndarray]:
    """Decode and ten crops with Pillow: crop and resize, flip, jitter, gray, blur, solarize, normalize."""
    crops = vits16.get_config().crops
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    out = []
    for view in range(2 + crops.local_number):
        size, scale, blur = (
            (crops.global_size, crops.global_scale, crops.global_blur[view])
            if view < 2
            else (crops.local_size, crops.local_scale, crops.local_blur)
        )
        area = image.width * image.height * rng.uniform(*scale)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = min(round((area * ratio) ** 0.5), image.width), min(round((area / ratio) ** 0.5), image.height)
        left, top = rng.integers(0, image.width - w + 1), rng.integers(0, image.height - h + 1)
        box = (left, top, left + w, top + h)
        crop = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
        if rng.random() < crops.flip:
            crop = ImageOps.mirror(crop)
        if rng.random() < crops.jitter:
            enhancers = [(ImageEnhance.Brightness, crops.brightness), (ImageEnhance.Contrast, crops.contrast)]
            for enhance, strength in [*enhancers, (ImageEnhance.Color, crops.saturation)]:
                crop = enhance(crop).enhance(rng.uniform(1 - strength, 1 + strength))
            h, s, v = crop.convert("HSV").split()
            shift = np.uint8(int(rng.uniform(-crops.hue, crops.hue) * 255) % 256)
            crop = Image.merge("HSV", (Image.fromarray(np.asarray(h) + shift), s, v)).convert("RGB")
        if rng.random() < crops.grayscale:
            crop = crop.convert("L").convert("RGB")
        if rng.random() < blur:
            crop = crop.filter(ImageFilter.GaussianBlur(rng.uniform(*crops.blur_sigma)))
        if view == 1 and rng.random() < crops.global_solarize[1]:
            crop = ImageOps.solarize(crop)
        out.append((np.asarray(crop, np.float32) / 255 - 0.45) / 0.22)
    return out


def data_wait(jpeg: bytes, seconds: float) -> float:
    """Share of the time that a device with steps of STEP_PER_IMAGE waits for a batch, fed as by `train_loop.Run`."""
    with tempfile.TemporaryDirectory() as folder:
        for number in range(256):
            Path(folder, f"{number}.jpg").write_bytes(jpeg)
        source, canvas_size = open_source(f"folder:{folder}"), vits16.get_config().data.canvas_size
        settings = {"canvas_size": canvas_size, "channels": 3, "seed": 0, "start_step": 0, "workers": 1}
        with train_batches(source, batch_size=BATCH, **settings, process_index=0, process_count=1) as batches:
            next(batches)  # the reader has started
            rate, start = metrics.Rate(), time.perf_counter()
            done = start  # when the device will have nothing left to do
            while time.perf_counter() - start < seconds:
                with rate.waiting(busy=lambda until=done: time.perf_counter() < until):
                    next(batches)
                before, done = done, max(done, time.perf_counter()) + BATCH * STEP_PER_IMAGE
                time.sleep(max(0.0, before - time.perf_counter()))  # the step before is looked at behind this one
            return rate.read()["data_wait"]


def main(argv: list[str]) -> None:
    """Prints the table."""
    config, jpeg, repeats = vits16.get_config(), photograph(), REPEATS.value
    host = cpu_milliseconds(lambda: to_canvas(jpeg, config.data.canvas_size, Pixels(3)), repeats)
    rng = np.random.default_rng(0)
    pillow = cpu_milliseconds(lambda: pillow_crops(jpeg, rng), repeats)

    print(f"{environment.describe()}; median of {repeats}\n")
    print("| stage | ms per image |\n|---|---|")
    print(f"| ours, host: JPEG -> canvas {config.data.canvas_size}, one core | {host:.2f} |")
    print(f"| Pillow, host: decode and the same 10 crops, one core | {pillow:.2f} |")
    wait, step = data_wait(jpeg, SECONDS.value), 1e3 * STEP_PER_IMAGE
    print(f"\nwaiting for data, in {SECONDS.value:.0f} s of steps of {step:.0f} ms an image: {wait:.1%}")


if __name__ == "__main__":
    app.run(main)
