import os
import subprocess
import sys
from functools import cache, partial

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from PIL import Image

from dino_jax import recipes
from dino_jax.data import photometric
from dino_jax.data.decoding import to_canvas
from dino_jax.data.multicrop import (
    BOX_NUMBERS,
    JITTER_NUMBERS,
    crop_and_resize,
    multicrop,
    random_box,
    random_jitter,
    resize_matrix,
)
from dino_jax.data.pixels import Pixels

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


SETTINGS = {
    "global_size": 24,
    "local_size": 12,
    "local_number": 3,
    "global_scale": (0.4, 1.0),
    "local_scale": (0.05, 0.4),
    "flip": 0.5,
    "jitter": 0.8,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
    "grayscale": 0.2,
    "global_blur": (1.0, 0.1),
    "local_blur": 0.5,
    "blur_sigma": (0.1, 2.0),
    "blur_taps": 0,
    "global_solarize": (0.0, 0.2),
}
BOXES_ONLY = {
    "flip": 0.0,
    "jitter": 0.0,
    "grayscale": 0.0,
    "global_blur": (0.0, 0.0),
    "local_blur": 0.0,
    "global_solarize": (0.0, 0.0),
}


def settings(**changes):
    return ml_collections.ConfigDict(SETTINGS | changes)


@cache
def cropper(channels=3, dtype="float32", **changes):
    """multicrop(keys, canvas, sizes), jitted once for all tests that ask for the same."""
    mean, std = (MEAN * 2)[:channels], (STD * 2)[:channels]
    return jax.jit(partial(multicrop, crops=settings(**changes), mean=mean, std=std, dtype=dtype))


def inputs(channels=3, batch=4, side=32):
    """Keys, canvases of noise, sizes."""
    keys = jax.random.split(jax.random.key(0), batch)
    canvas = np.random.default_rng(0).integers(0, 256, (batch, side, side, channels)).astype(np.uint8)
    return keys, canvas, np.tile(np.float32([30, 40]), (batch, 1))


def levels(crops):
    """Normalized crops -> 0..255"""
    return (np.asarray(crops, np.float32) * STD + MEAN) * 255


def photographs():
    from skimage import data

    return [image[:256, :256] for image in (data.astronaut()[:, 100:], data.coffee(), data.chelsea(), data.rocket())]


def test_crop_is_the_references(golden):
    arrays, meta = golden("aug_ops")
    image, config = arrays["in/image"].astype(np.float32), meta["config"]
    top, left, height, width = config["box"]
    rows = resize_matrix(image.shape[0], config["out"], top, height)
    columns = resize_matrix(image.shape[1], config["out"], left, width)
    made = jnp.clip(jnp.einsum("oh,hwc,pw->opc", rows, image, columns), 0, 255)
    # Pillow rounds to whole levels after each direction: columns first, and the rows amplify that half level.
    bound = 0.5 * np.abs(rows).sum(1).max() + 0.5
    assert np.abs(made - arrays["resized_crop_bicubic"]).max() <= bound + 1e-3


def natural_texture(height, width):
    """An image with the spectrum of photographs, 1 / frequency: uint8 [height, width, 3]."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = 1
    noise = np.fft.fft2(np.random.default_rng(0).standard_normal((3, height, width))) / frequency
    planes = np.fft.ifft2(noise).real
    planes = (planes - planes.mean()) / planes.std() * 20 + 128  # Pillow clips between its two passes, we do not
    return planes.clip(0, 255).round().astype(np.uint8).transpose(1, 2, 0)


def sharpness(crop):
    """Variance of the Laplacian of the gray image."""
    gray = crop.astype(np.float64).mean(-1)
    return (4 * gray[1:-1, 1:-1] - gray[:-2, 1:-1] - gray[2:, 1:-1] - gray[1:-1, :-2] - gray[1:-1, 2:]).var()


@pytest.mark.parametrize(("kind", "out"), [("global", 224), ("local", 96)])
@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333)])
def test_crops_of_imagenets_sizes_are_as_sharp_as_torchvisions(kind, out, height, width):
    """On the canvas of the recipes; RandomResizedCrop resizes the box of the whole image with Pillow."""
    photo, side = natural_texture(height, width), recipes.get_config("vits16").data.canvas_size
    size, scale = jnp.array([height, width], jnp.float32), SETTINGS[f"{kind}_scale"]
    numbers = np.random.default_rng(1).random((40, BOX_NUMBERS)).astype(np.float32)
    boxes = jax.vmap(lambda draw: random_box(draw, size, scale))(numbers)

    def ours(canvas_size):
        plane = jnp.asarray(to_canvas(photo, canvas_size, Pixels(3))[0], jnp.float32).transpose(0, 2, 1)
        crops = jax.jit(jax.vmap(lambda box: crop_and_resize(plane, size, box, False, out)))(boxes)
        return np.asarray(crops).transpose(0, 1, 3, 2)

    def theirs(box):
        top, left, tall, wide = map(int, box)
        part = Image.fromarray(photo[top : top + tall, left : left + wide])
        return np.asarray(part.resize((out, out), Image.Resampling.BICUBIC))

    expected, made = np.stack([theirs(box) for box in np.asarray(boxes)]), ours(side)
    assert np.abs(made - expected).max() <= 1.5  # Pillow rounds twice, see test_crop_is_the_references
    reference = np.mean([sharpness(crop) for crop in expected])
    assert np.mean([sharpness(crop) for crop in made]) == pytest.approx(reference, rel=0.03)
    assert np.mean([sharpness(crop) for crop in ours(256)]) < 0.85 * reference  # the test can tell


def test_normalization_is_the_references(golden):
    """A ratio other than 1 never fits at scale 1, so the crop is nearly always all of a square image, unresized."""
    arrays, _ = golden("aug_ops")
    side = min(arrays["in/image"].shape[:2])
    canvas = np.tile(arrays["in/image"][:side, :side], (4, 1, 1, 1))
    function = cropper(**BOXES_ONLY | {"global_size": side, "global_scale": (1.0, 1.0), "local_number": 0})
    made = function(jax.random.split(jax.random.key(0), 4), canvas, np.full((4, 2), side)).global_crops
    expected = arrays["normalized_chw"][:, :side, :side].transpose(1, 2, 0)
    gaps = np.abs(made - expected).max(axis=(2, 3, 4))
    assert np.median(gaps) < 1e-4


@pytest.mark.parametrize("kind", ["global", "local"])
def test_boxes_are_distributed_as_torchvisions(golden, kind):
    """As many draws as the golden has, on the same image size: 20,000 on 500 x 375 (meta.note).

    Sampling error of a difference of two empirical distribution functions: sqrt(q (1 - q) 2 / n), at most 0.005 here;
    5 of these are allowed. Atoms (a ratio of 1, say) make the function jump, so each quantile must lie within a jump.
    """
    arrays, meta = golden("aug_ops")
    n, size = 20_000, jnp.array([375.0, 500.0])
    scale = SETTINGS[f"{kind}_scale"]
    numbers = jax.random.uniform(jax.random.key(0), (n, BOX_NUMBERS))
    boxes = np.asarray(jax.vmap(partial(random_box, size=size, scale=scale))(numbers))
    top, left, height, width = boxes.T
    assert np.all(boxes == np.round(boxes))
    assert min(top.min(), left.min(), height.min() - 1, width.min() - 1) >= 0
    assert np.all(top + height <= 375)
    assert np.all(left + width <= 500)

    tolerance = 5 * np.sqrt(0.25 * 2 / n)
    for name, values in {"area": height * width / (375 * 500), "ratio": width / height}.items():
        for level, quantile in zip(meta["quantiles"], arrays[f"crop_{kind}_{name}_quantiles"], strict=True):
            below, up_to = np.mean(values < quantile - 1e-6), np.mean(values <= quantile + 1e-6)
            assert below - tolerance <= level <= up_to + tolerance, f"{name} quantile {level}: {below}..{up_to}"
    for values, expected in zip((top, left), arrays[f"crop_{kind}_meanpos"], strict=True):
        assert abs(values.mean() - expected) < 5 * values.std() * np.sqrt(2 / n)


@pytest.mark.parametrize("size", [(20, 4000), (4000, 20), (2, 3), (1, 1), (1, 50_000)])
def test_extreme_shapes_fall_back_to_the_central_box_and_stay_finite(size):
    """The fallback's box is thinner than a pixel of the canvas for the most elongated ones."""
    numbers = jax.random.uniform(jax.random.key(1), (50, BOX_NUMBERS))
    boxes = np.asarray(jax.vmap(partial(random_box, size=jnp.float32(size), scale=(0.9, 1.0)))(numbers))
    assert np.all(boxes[:, 2:] >= 1)
    assert np.all(boxes[:, :2] >= 0)
    assert np.all(boxes[:, :2] + boxes[:, 2:] <= size)
    if max(size) > 1000 and min(size) > 1:
        height, width = boxes[0, 2:]
        assert min(size) in (height, width)
        assert round(max(height, width) / min(height, width), 1) == 1.4  # 27 / 20
        np.testing.assert_array_equal(boxes[0, :2], (np.array(size) - boxes[0, 2:]) // 2)
    image = jnp.full((32, 3, 32), 100.0)
    crop = jax.vmap(lambda box: crop_and_resize(image, jnp.float32(size), box, False, 16))(boxes)
    np.testing.assert_allclose(crop, 100.0, atol=1e-2)


@pytest.mark.parametrize("out", [224, 96])
def test_crops_of_photographs_are_pillows(out):
    """Boxes of every size, on photographs that are their own canvas: at most a level from Pillow on average."""
    compiled = jax.jit(crop_and_resize, static_argnames="out")
    rng = np.random.default_rng(0)
    for photograph in photographs():
        side = photograph.shape[0]
        for flip in (False, True):
            height, width = rng.integers(20, side + 1, 2)
            top, left = rng.integers(0, side - height + 1), rng.integers(0, side - width + 1)
            picture = Image.fromarray(photograph).crop((left, top, left + width, top + height))
            picture = picture.resize((out, out), Image.Resampling.BICUBIC)
            if flip:
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            planes = photograph.swapaxes(1, 2).astype(np.float32)
            box = jnp.float32([top, left, height, width])
            made = compiled(planes, jnp.float32([side, side]), box, flip, out=out).swapaxes(1, 2)
            gap = np.abs(made - np.asarray(picture, np.float32))
            assert gap.mean() < 0.5
            assert np.quantile(gap, 0.999) < 2.0


def test_crops_of_a_squeezed_canvas_have_the_originals_aspect():
    """A wide photograph through a square canvas of the same height: close to Pillow on the original."""
    from skimage import data

    original = Image.fromarray(data.coffee())  # 400 x 600
    width, height = original.size
    canvas = np.asarray(original.resize((height, height), Image.Resampling.BICUBIC))
    box = (50, 120, 300, 330)
    made = crop_and_resize(
        canvas.swapaxes(1, 2).astype(np.float32), jnp.float32([height, width]), jnp.float32(box), False, 96
    )
    top, left = box[:2]
    expected = original.crop((left, top, left + box[3], top + box[2])).resize((96, 96), Image.Resampling.BICUBIC)
    assert np.abs(made.swapaxes(1, 2) - np.asarray(expected, np.float32)).mean() < 2.0


def test_shapes_dtype_and_range():
    made = cropper(dtype="bfloat16")(*inputs())
    assert made.global_crops.shape == (4, 2, 24, 24, 3)
    assert made.local_crops.shape == (4, 3, 12, 12, 3)
    assert made.global_crops.dtype == made.local_crops.dtype == jnp.bfloat16
    for crops in made:
        assert -2 < levels(crops).min() < levels(crops).max() < 257


def test_bfloat16_is_only_the_last_rounding():
    for a, b in zip(cropper()(*inputs()), cropper(dtype="bfloat16")(*inputs()), strict=True):
        np.testing.assert_allclose(b.astype(jnp.float32), a, rtol=2**-8, atol=1e-3)


def test_no_local_crops():
    assert cropper(local_number=0)(*inputs()).local_crops.shape == (4, 0, 12, 12, 3)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channel_counts(channels):
    made = cropper(channels=channels)(*inputs(channels))
    assert made.global_crops.shape == (4, 2, 24, 24, channels)
    assert made.local_crops.shape == (4, 3, 12, 12, channels)
    assert all(np.isfinite(crops).all() for crops in made)


def test_bands_change_on_their_own():
    """Every channel has factors of its own, and a channel's crop depends on no other channel."""
    keys, canvas, sizes = inputs(5)
    plain = BOXES_ONLY | {"jitter": 1.0, "global_solarize": (1.0, 1.0)}
    crops = np.asarray(cropper(channels=5, **plain)(keys, canvas, sizes).global_crops)
    other = canvas.copy()
    other[..., 2] = 255 - other[..., 2]
    changed = np.asarray(cropper(channels=5, **plain)(keys, other, sizes).global_crops)
    np.testing.assert_allclose(np.delete(changed, 2, -1), np.delete(crops, 2, -1), atol=1e-5)
    same = np.repeat(canvas[..., :1], 5, -1)
    spread = np.ptp(np.asarray(cropper(channels=5, **plain)(keys, same, sizes).global_crops) * (STD * 2)[0], axis=-1)
    assert np.median(spread) > 0.02, "equal channels get different factors"


def test_channel_jitter_is_brightness_and_contrast():
    image = jnp.asarray(np.random.default_rng(0).uniform(60, 120, (6, 4, 7)), jnp.float32)
    factors = jnp.array([[1.0, 1.5, 1.0, 0.5], [1.0, 1.0, 0.5, 1.2]])
    brightness, contrast = factors[..., None]
    mean = image.mean((0, 2))[:, None]
    expected = brightness * (mean + contrast * (image - mean))
    np.testing.assert_allclose(photometric.channel_jitter(image, factors), expected, rtol=1e-5)


def test_gray_images_stay_gray():
    keys, canvas, sizes = inputs()
    for crops in cropper()(keys, np.repeat(canvas[..., :1], 3, axis=-1), sizes):
        assert np.ptp(levels(crops), axis=-1).max() < 0.1


def test_grayscale_makes_crops_gray():
    assert np.ptp(levels(cropper(**BOXES_ONLY | {"grayscale": 1.0})(*inputs()).local_crops), axis=-1).max() < 0.1


def test_an_images_crops_do_not_depend_on_the_rest_of_the_batch():
    keys, canvas, sizes = inputs()
    whole, alone = cropper()(keys, canvas, sizes), cropper()(keys[2:3], canvas[2:3], sizes[2:3])
    for a, b in zip(whole, alone, strict=True):
        np.testing.assert_allclose(a[2:3], b, atol=1e-4)


def test_crops_of_one_image_differ_and_so_do_those_of_another_key():
    keys, canvas, sizes = inputs()
    for crops in cropper()(keys, np.repeat(canvas[:1], 4, axis=0), sizes):
        flat = np.asarray(crops).reshape(-1, crops[0, 0].size)
        assert len(np.unique(flat, axis=0)) == len(flat)


def test_a_crop_does_not_change_with_the_number_of_local_ones():
    many, few = cropper()(*inputs()), cropper(local_number=1)(*inputs())
    np.testing.assert_allclose(many.global_crops, few.global_crops, atol=1e-4)
    np.testing.assert_allclose(many.local_crops[:, :1], few.local_crops, atol=1e-4)


def test_flip_mirrors_the_same_box():
    never, always = cropper(**BOXES_ONLY)(*inputs()), cropper(**BOXES_ONLY | {"flip": 1.0})(*inputs())
    for a, b in zip(never, always, strict=True):
        np.testing.assert_allclose(a[:, :, :, ::-1], b, atol=1e-4)


def test_blur_and_solarize_have_a_probability_per_global_crop():
    expected = cropper(**BOXES_ONLY)(*inputs()).global_crops
    blur = {"global_blur": (1.0, 0.0), "blur_sigma": (1.0, 1.0)}
    made = cropper(**BOXES_ONLY | blur)(*inputs()).global_crops
    assert made[:, 0].std() < 0.8 * expected[:, 0].std()
    np.testing.assert_allclose(made[:, 1], expected[:, 1], atol=1e-4)
    made = cropper(**BOXES_ONLY | {"global_solarize": (0.0, 1.0)})(*inputs()).global_crops
    np.testing.assert_allclose(made[:, 0], expected[:, 0], atol=1e-4)
    before, after = levels(expected[:, 1]), levels(made[:, 1])
    np.testing.assert_allclose(after, np.minimum(before, 255 - before), atol=1e-2)


def test_jitter_draws_all_24_orders_and_its_probability():
    n = 4800
    numbers = jax.random.uniform(jax.random.key(0), (n, JITTER_NUMBERS))
    factors, places = jax.vmap(partial(random_jitter, crops=settings()))(numbers)
    orders, counts = np.unique(places, axis=0, return_counts=True)
    assert len(orders) == 24
    assert np.abs(counts - n / 24).max() < 5 * np.sqrt(n / 24)  # 5 standard deviations of a count
    neutral = np.all(np.asarray(factors) == [1.0, 1.0, 1.0, 0.0], axis=1)
    assert abs(neutral.mean() - 0.2) < 5 * np.sqrt(0.2 * 0.8 / n)
    low, high = np.asarray(factors).min(axis=0), np.asarray(factors).max(axis=0)
    np.testing.assert_allclose(low, [0.6, 0.6, 0.8, -0.1], atol=2e-3)
    np.testing.assert_allclose(high, [1.4, 1.4, 1.2, 0.1], atol=2e-3)


DEVICES = """
import sys
from functools import partial
import jax, jax.numpy as jnp, ml_collections, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from dino_jax.data.multicrop import multicrop

crops = ml_collections.ConfigDict(eval(sys.argv[1]))
assert jax.device_count() == 8
made = partial(multicrop, crops=crops, mean=(0.5,) * 3, std=(0.2,) * 3, dtype=jnp.float32)
keys = jax.random.split(jax.random.key(3), 16)
canvas = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3)).astype(np.uint8)
sizes = np.tile(np.float32([30, 40]), (16, 1))
one = jax.jit(made)(keys, canvas, sizes)
mesh = Mesh(np.array(jax.devices()), "data")
sharded = jax.shard_map(made, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
eight = jax.jit(sharded)(*jax.device_put((keys, canvas, sizes), NamedSharding(mesh, P("data"))))
for a, b in zip(one, eight):
    assert len(b.sharding.device_set) == 8
    np.testing.assert_allclose(a, b, atol=1e-4)
"""


@pytest.mark.slow
def test_crops_are_the_same_on_one_device_and_on_eight():
    flags = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", DEVICES, repr(SETTINGS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
