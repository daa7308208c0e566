import io
import os
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dino_jax.data import decoding
from dino_jax.data.decoding import DecodeError, decode, eval_image, to_canvas
from dino_jax.data.pipeline import eval_batches, train_batches
from dino_jax.data.pixels import Pixels
from dino_jax.data.sources import Example, Source, open_source
from dino_jax.data.sources.array_record import write_array_record
from dino_jax.errors import UserError


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photo(height=60, width=80, seed=0):
    """A smooth color picture, uint8 [H, W, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


class Memory(Source):
    """A source of given images; image i has label i % 3."""

    num_classes = 3

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return Example(self.images[i], i % 3)

    def name(self, i):
        return f"image {i}"


def numbered(n):
    """A source whose image i is filled with the value i."""
    return Memory([np.full((4, 4, 1), i, np.uint8) for i in range(n)])


def take(source, steps, **options):
    settings = {"batch_size": 4, "canvas_size": 4, "pixels": Pixels(1), "seed": 0, **options}
    with train_batches(source, **settings) as batches:
        return [next(batches) for _ in range(steps)]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for a, b in zip(batches, others, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


# --- decoding ---


def test_eval_resize_and_center_crop_match_torchvision(golden):
    arrays, _ = golden("aug_ops")
    image = encoded(Image.fromarray(arrays["in/image"]))
    sizes = {
        match[1]: int(match[2]) for key in arrays if (match := re.fullmatch(r"eval_(resize|centercrop)(\d+)", key))
    }
    resize, crop = sizes["resize"], sizes["centercrop"]
    ours = eval_image(image, resize=resize, crop=crop, pixels=Pixels(3))
    np.testing.assert_array_equal(ours, arrays[f"eval_centercrop{crop}"])
    # The whole resized image, through the widest crop that fits inside it.
    expected = arrays[f"eval_resize{resize}"]
    top, left = (round((side - resize) / 2) for side in expected.shape[:2])
    ours = eval_image(image, resize=resize, crop=resize, pixels=Pixels(3))
    np.testing.assert_array_equal(ours, expected[top : top + resize, left : left + resize])


def test_ordinary_formats_come_out_exactly():
    rgb = photo()
    gray = rgb[..., 0]
    for format in ("PNG", "BMP", "TIFF"):
        np.testing.assert_array_equal(decode(encoded(Image.fromarray(rgb), format), Pixels(3)), rgb)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(gray)), Pixels(1)), gray[..., None])
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(gray)), Pixels(3)), np.dstack([gray] * 3))
    luma = np.asarray(Image.fromarray(rgb).convert("L"))
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(rgb)), Pixels(1))[..., 0], luma)
    one_bit = Image.fromarray(gray > 100)
    np.testing.assert_array_equal(decode(encoded(one_bit), Pixels(1))[..., 0], (gray > 100) * 255)


def test_cmyk_and_palette_become_rgb():
    picture = Image.fromarray(photo())
    palette = picture.quantize(64)
    np.testing.assert_array_equal(decode(encoded(palette), Pixels(3)), np.asarray(palette.convert("RGB")))
    cmyk = decode(encoded(picture.convert("CMYK"), "JPEG", quality=95), Pixels(3))
    assert np.abs(cmyk.astype(int) - np.asarray(picture)).mean() < 5


def test_transparency_is_composited_on_white():
    rgba = Image.fromarray(np.dstack([photo(), np.zeros((60, 80), np.uint8)]), "RGBA")
    rgba.putpixel((3, 2), (10, 20, 30, 255))
    out = decode(encoded(rgba), Pixels(3))
    assert out[2, 3].tolist() == [10, 20, 30]
    assert np.all(np.delete(out.reshape(-1, 3), 2 * 80 + 3, axis=0) == 255)
    gray_alpha = Image.new("LA", (4, 4), (0, 0))
    assert np.all(decode(encoded(gray_alpha), Pixels(1)) == 255)
    gif = Image.new("P", (4, 4), 0)
    gif.putpalette([0, 0, 0, 200, 0, 0])
    gif.putpixel((1, 1), 1)
    out = decode(encoded(gif, "GIF", transparency=0), Pixels(3))
    assert out[0, 0].tolist() == [255, 255, 255]
    assert out[1, 1].tolist() == [200, 0, 0]


def test_deep_images_are_scaled_by_the_range_of_their_type():
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    expected = np.round(ramp / 257).astype(np.uint8)[..., None]
    for format in ("PNG", "TIFF"):
        np.testing.assert_array_equal(decode(encoded(Image.fromarray(ramp), format), Pixels(1)), expected)
    np.testing.assert_array_equal(decode(ramp, Pixels(3)), np.repeat(expected, 3, -1))
    for floats in (ramp / np.float32(65535), ramp.astype(np.float64) / 65535):
        np.testing.assert_allclose(decode(floats, Pixels(1)), expected, atol=1)
    half = np.full((4, 4), 0.5, np.float32)  # of one picture alone nobody could tell that this is gray
    for image in (half, encoded(Image.fromarray(half), "TIFF")):
        assert np.all(decode(image, Pixels(1)) == 128)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64, np.uint32, np.float32, np.float64, np.uint16])
def test_with_a_stated_range_all_types_show_the_same_picture(dtype):
    picture = photo(16, 24)
    np.testing.assert_array_equal(decode(picture.astype(dtype), Pixels(3, range=(0.0, 255.0))), picture)
    np.testing.assert_array_equal(decode(picture, Pixels(3, range=(0.0, 4095.0))), picture)  # 8 bits are always 0..255


def test_twelve_bits_in_sixteen_use_all_levels_with_a_stated_range():
    scan = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    file = encoded(Image.fromarray(scan), "TIFF")
    assert len(np.unique(decode(file, Pixels(1)))) == 17
    assert len(np.unique(decode(file, Pixels(1, range=(0.0, 4095.0))))) == 256


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4), np.int32), "int32 pixels have no range of their own: state the values of black and white"),
        (np.zeros((4, 4), np.int64), "int64 pixels have no range of their own"),
        (
            np.full((4, 4), 200.0, np.float32),
            "float32 pixels from 200 to 200 do not fit 0..1: state the values of black and white",
        ),
        (np.full((4, 4), -0.5), "float64 pixels from -0.5 to -0.5 do not fit 0..1"),
        (np.full((4, 4), np.nan), "float64 pixels from nan to nan do not fit 0..1"),
        (np.full((4, 4), np.inf, np.float16), "float16 pixels from inf to inf do not fit 0..1"),
    ],
)
def test_values_without_a_known_range_are_refused_by_their_type(image, message):
    with pytest.raises(DecodeError, match=message):
        decode(image, Pixels(1))
    with pytest.raises(DecodeError, match=message):
        eval_image(image, resize=4, crop=4, pixels=Pixels(1))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_exif_orientation_is_applied(format):
    upright = photo(64, 96)
    # By the standard's definition: which visual edge the stored row 0 and column 0 are.
    stored_as = {
        1: upright,  # top, left
        2: upright[:, ::-1],  # top, right
        3: upright[::-1, ::-1],  # bottom, right
        4: upright[::-1],  # bottom, left
        5: upright.swapaxes(0, 1),  # left, top
        6: upright[:, ::-1].swapaxes(0, 1),  # right, top
        7: upright[::-1, ::-1].swapaxes(0, 1),  # right, bottom
        8: upright[::-1].swapaxes(0, 1),  # left, bottom
    }
    for orientation, stored in stored_as.items():
        exif = Image.Exif()
        exif[decoding.ORIENTATION_TAG] = orientation
        options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 98}}.get(format, {})
        data = encoded(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif, **options)
        out = decode(data, Pixels(3))
        assert out.shape == upright.shape, orientation
        assert np.abs(out.astype(int) - upright).mean() < 3, orientation
        canvas, size = to_canvas(data, 16, Pixels(3))
        assert size == (64, 96)
        assert np.abs(canvas.astype(int) - to_canvas(upright, 16, Pixels(3))[0]).mean() < 4, orientation


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_lose_the_image():
    data = encoded(Image.fromarray(photo()), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff garbage")
    assert decode(data, Pixels(3)).shape == (60, 80, 3)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (6, 5), color) for color in ("red", "blue")]
    for format in ("GIF", "WEBP", "TIFF"):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        assert np.abs(decode(data, Pixels(3)).astype(int) - [255, 0, 0]).max() <= 2, format


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_before_anything_is_unpacked(monkeypatch):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 20_000, 6_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    monkeypatch.setattr(Image.Image, "load", None)  # would fail if it were called
    with pytest.raises(DecodeError, match="20000 x 6000"):
        decode(bomb, Pixels(3))


def test_memory_that_decoding_takes_is_bounded():
    transparent = io.BytesIO()
    Image.new("P", (9_000, 9_000)).save(transparent, "PNG", transparency=0)
    assert len(transparent.getvalue()) < 20_000
    with pytest.raises(DecodeError, match="decoding 9000 x 9000 pixels of P takes"):
        decode(transparent.getvalue(), Pixels(3))


def test_what_cannot_be_decoded_says_so():
    jpeg = encoded(Image.fromarray(photo()), "JPEG")
    png = encoded(Image.fromarray(photo()))
    for data in (b"", b"hello", jpeg[: len(jpeg) // 2], png[: len(png) // 2], jpeg[:20]):
        with pytest.raises(DecodeError):
            decode(data, Pixels(3))
    with pytest.raises(DecodeError, match="elongated"):
        eval_image(encoded(Image.new("L", (60_000, 1))), resize=256, crop=224, pixels=Pixels(1))


def test_any_number_of_channels_comes_from_arrays():
    stack = np.random.default_rng(0).integers(0, 256, (12, 10, 5), np.uint8)
    np.testing.assert_array_equal(decode(stack, Pixels(5)), stack)
    canvas, size = to_canvas(stack, 6, Pixels(5))
    assert canvas.shape == (6, 6, 5)
    assert size == (12, 10)
    for c in range(5):
        np.testing.assert_array_equal(canvas[..., c], to_canvas(stack[..., c], 6, Pixels(1))[0][..., 0])
    assert eval_image(stack, resize=8, crop=6, pixels=Pixels(5)).shape == (6, 6, 5)
    for image in (stack, encoded(Image.fromarray(photo()))):
        with pytest.raises(DecodeError, match="in_channels is 4"):
            decode(image, Pixels(4))


def test_jpeg_canvas_by_dct_downscaling_is_the_same_picture():
    image = photo(600, 900)
    data = encoded(Image.fromarray(image), "JPEG", quality=95)
    for side in (64, 100):
        canvas, size = to_canvas(data, side, Pixels(3))
        exact = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))
        assert size == (600, 900)
        assert np.abs(canvas.astype(int) - exact).mean() < 1.5


# --- batches ---


def test_every_epoch_shows_every_image_in_a_new_order():
    stream = np.concatenate([batch.index for batch in take(numbered(10), 10)])
    epochs = stream.reshape(4, 10)  # batches of 4 run across the ends of epochs of 10
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    other_seed = np.concatenate([batch.index for batch in take(numbered(10), 10, seed=1)])
    assert not any(np.array_equal(epoch, other) for epoch in epochs for other in other_seed.reshape(4, 10))


def test_batches_hold_what_they_say():
    for batch in take(numbered(10), 3):
        assert np.all(batch.canvas == batch.index[:, None, None, None])
        np.testing.assert_array_equal(batch.size, np.full((4, 2), 4, np.float32))
        assert batch.position.tolist() == [0, 1, 2, 3]
        assert batch.bad.tolist() == [-1] * 4
        assert [array.dtype for array in batch] == [np.uint8, np.float32, *[np.int32] * 4]


def test_starting_at_a_step_is_skipping_batches():
    whole = take(numbered(10), 9)
    assert_same(take(numbered(10), 2, start_step=7), whole[7:])


def test_processes_share_the_global_batch():
    whole = take(numbered(10), 5)
    shares = [take(numbered(10), 3, start_step=2, process_index=p, process_count=2) for p in (0, 1)]
    for step, batch in enumerate(whole[2:]):
        for share in (shares[0][step], shares[1][step]):
            assert len(share.index) == 2
            np.testing.assert_array_equal(share.index, batch.index[share.position])
            np.testing.assert_array_equal(share.canvas, batch.canvas[share.position])
        # Neighbors in the batch stay together: methods may compare the images of a group.
        assert [list(shares[p][step].position) for p in (0, 1)] == [[0, 1], [2, 3]]


@pytest.mark.slow
def test_workers_change_nothing():
    source = Memory([encoded(Image.fromarray(photo(seed=i))) for i in range(7)])
    options = {"canvas_size": 16, "pixels": Pixels(3), "start_step": 1}
    assert_same(take(source, 5, workers=2, **options), take(source, 5, workers=0, **options))
    settings = {"batch_size": 3, "resize": 20, "crop": 16, "pixels": Pixels(3)}
    with eval_batches(source, workers=2, **settings) as two, eval_batches(source, workers=0, **settings) as none:
        assert_same(list(two), list(none))


def test_an_undecodable_image_is_replaced_by_another_one_and_named():
    source = numbered(10)
    broken = {3, 4}
    for i in broken:
        source.images[i] = b"not an image"
    first, second = (take(source, 10) for _ in range(2))
    assert_same(first, second)
    plain = take(numbered(10), 10)
    for batch, wanted in zip(first, plain, strict=True):
        hit = np.isin(wanted.index, list(broken))
        np.testing.assert_array_equal(batch.bad, np.where(hit, wanted.index, -1))
        np.testing.assert_array_equal(batch.index[~hit], wanted.index[~hit])
        assert not np.isin(batch.index, list(broken)).any()
        assert np.all(batch.canvas == batch.index[:, None, None, None])
        np.testing.assert_array_equal(batch.label, batch.index % 3)  # of the image shown, not of the one replaced


def test_a_file_that_vanished_is_replaced_too(tmp_path):
    for i in range(6):
        Image.new("L", (4, 4), i).save(tmp_path / f"{i}.png")
    source = open_source(f"folder:{tmp_path}")
    (tmp_path / "2.png").unlink()
    bad = np.concatenate([batch.bad for batch in take(source, 3)])
    assert sorted(bad.tolist()) == [-1] * 10 + [2, 2]


@pytest.mark.parametrize("harm", ["pipe", "device", "sparse", "folder"])
def test_a_file_that_became_something_else_is_replaced(tmp_path, harm):
    """Nothing waits for a writer of the pipe, and nothing is read of a device or of an enormous file."""
    for i in range(6):
        Image.new("L", (4, 4), i).save(tmp_path / f"{i}.png")
    source = open_source(f"folder:{tmp_path}")
    path = tmp_path / "2.png"
    path.unlink()
    if harm == "pipe":
        os.mkfifo(path)
    elif harm == "device":
        path.symlink_to("/dev/zero")
    elif harm == "folder":
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, 3 * 2**30)
    bad = np.concatenate([batch.bad for batch in take(source, 3)])
    assert sorted(bad.tolist()) == [-1] * 10 + [2, 2]


@pytest.mark.parametrize("error", [RuntimeError("bad crc"), MemoryError(), EOFError(), KeyError("image")])
def test_whatever_a_source_raises_for_an_image_replaces_it(error):
    class Failing(Memory):
        def __getitem__(self, i):
            if i == 2:
                raise error
            return super().__getitem__(i)

    source = Failing(numbered(6).images)
    bad = np.concatenate([batch.bad for batch in take(source, 3)])
    assert sorted(bad.tolist()) == [-1] * 10 + [2, 2]


def test_a_flipped_byte_in_an_array_record_replaces_that_image(tmp_path):
    write_array_record(numbered(50), str(tmp_path / "part"))
    data = bytearray((tmp_path / "part").read_bytes())
    used = np.flatnonzero(np.frombuffer(data, np.uint8))
    data[used[len(used) // 2]] ^= 1
    (tmp_path / "part").write_bytes(data)
    source = open_source(f"array_record:{tmp_path}/part")
    bad = np.concatenate([batch.bad for batch in take(source, 13)])
    assert len(set(bad[bad >= 0].tolist())) == 1
    with eval_batches(source, batch_size=10, resize=4, crop=4, pixels=Pixels(1)) as batches:
        assert sum(len(batch.index) for batch in batches) == 49


def test_nothing_decodable_is_an_error_with_a_name():
    with pytest.raises(UserError, match="cannot be decoded.*image"):
        take(Memory([b"text"] * 12), 1)


def test_mistakes_name_the_knob():
    with pytest.raises(UserError, match="batch_size 4 .* 3 processes"):
        take(numbered(10), 1, process_count=3)
    with pytest.raises(UserError, match="data.workers"):
        take(numbered(10), 1, workers=-1)
    with pytest.raises(UserError, match="eval.crop 32 .* eval.resize 16"):
        eval_batches(numbered(10), batch_size=4, resize=16, crop=32, pixels=Pixels(1))


def evaluated(source, **options):
    with eval_batches(source, **{"batch_size": 4, "resize": 4, "crop": 4, "pixels": Pixels(1), **options}) as batches:
        return list(batches)


def test_evaluation_sees_every_image_once_in_order():
    batches = evaluated(numbered(10))
    assert [len(batch.labels) for batch in batches] == [4, 4, 2]
    assert np.concatenate([batch.index for batch in batches]).tolist() == list(range(10))
    assert np.concatenate([batch.labels for batch in batches]).tolist() == [i % 3 for i in range(10)]
    for batch in batches:
        assert np.all(batch.images == batch.index[:, None, None, None])
        assert [array.dtype for array in batch] == [np.uint8, np.int32, np.int32]


def test_evaluation_is_shared_by_processes_with_equal_batch_counts():
    shares = [evaluated(numbered(9), process_index=p, process_count=2) for p in (0, 1)]
    assert [[batch.index.tolist() for batch in share] for share in shares] == [
        [[0, 2], [4, 6], [8]],
        [[1, 3], [5, 7], []],
    ]
    assert shares[1][2].images.shape == (0, 4, 4, 1)


def test_evaluation_leaves_out_what_it_cannot_decode():
    source = numbered(6)
    source.images[1] = b"not an image"
    batches = evaluated(source)
    assert [batch.index.tolist() for batch in batches] == [[0, 2, 3], [4, 5]]
    assert batches[0].labels.tolist() == [0, 2, 0]
