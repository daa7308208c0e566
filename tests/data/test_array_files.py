"""Images that are arrays: .npy, .npz, TIFFs of many channels, 16 bits in color; the same pixels from any container."""

import io
import sys
import tarfile
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image

from dino_jax import recipes
from dino_jax.commands.prepare import prepare
from dino_jax.data.decoding import DecodeError, decode, eval_image, to_canvas
from dino_jax.data.multicrop import multicrop
from dino_jax.data.pipeline import train_batches
from dino_jax.data.pixels import Pixels, to_rgb
from dino_jax.data.sources import open_source
from dino_jax.errors import UserError

tifffile = pytest.importorskip("tifffile")
DEEP = Pixels(5, "uint16", (0.0, 4095.0))


def bands(channels=5, seed=0, high=4096, height=20, width=30, dtype=np.uint16):
    return np.random.default_rng(seed).integers(0, high, (height, width, channels)).astype(dtype)


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def tiff(array, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def interleaved(array):
    return tiff(array, photometric="minisblack", planarconfig="contig")


def planes(array):
    return tiff(np.moveaxis(array, -1, 0), photometric="minisblack", planarconfig="separate")


def pages(array):
    return tiff(np.moveaxis(array, -1, 0), photometric="minisblack", metadata={"axes": "CYX"})


def tiles(array):
    return tiff(array, photometric="minisblack", planarconfig="contig", tile=(16, 16))


def volume(axes):
    return tiff(np.zeros((3, 4, 20, 30), np.uint16), photometric="minisblack", metadata={"axes": axes})


FILES = {
    "npy": npy,
    "npy, channels first": lambda array: npy(np.moveaxis(array, -1, 0)),
    "npy, big-endian": lambda array: npy(array.astype(">u2")),
    "npz": lambda array: npz(anything=array),
    "npz, named": lambda array: npz(mask=array[..., 0], image=array),
    "interleaved": interleaved,
    "planes": planes,
    "pages": pages,
    "tiles": tiles,
}


@pytest.mark.parametrize("kind", FILES)
def test_every_file_gives_the_values_of_its_array(kind):
    array = bands()
    expected = np.round(array * (65_535 / 4095)).astype(np.uint16)
    np.testing.assert_array_equal(decode(FILES[kind](array), DEEP), decode(array, DEEP))
    np.testing.assert_allclose(decode(array, DEEP), expected, atol=1)  # computed in float32, of 24 bits


def test_a_range_is_black_to_white_and_clips():
    array = np.array([[[0.0, 100.0, 350.0, 600.0, 9_999.0]]], np.float32)
    out = decode(array, Pixels(5, "float32", (100.0, 600.0)))
    np.testing.assert_allclose(out[0, 0], [0, 0, 0.5, 1, 1], atol=1e-6)
    assert decode(array, Pixels(5, "uint8", (100.0, 600.0)))[0, 0].tolist() == [0, 0, 128, 255, 255]
    signed = np.array([[[-100, -50, 0, 50, 100]]], np.int16)
    np.testing.assert_allclose(decode(signed, Pixels(5, "float32", (-100, 100)))[0, 0], [0, 0.25, 0.5, 0.75, 1])


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_deep_canvases_keep_what_eight_bits_lose(dtype):
    ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64, 1)
    pixels = Pixels(1, dtype, (0, 4095))
    assert len(np.unique(decode(ramp, pixels))) == 4096
    assert len(np.unique(decode(ramp, pixels._replace(dtype="uint8")))) == 256
    canvas, size = to_canvas(ramp, 32, pixels)
    assert (canvas.shape, canvas.dtype, size) == ((32, 32, 1), np.dtype(dtype), (64, 64))
    assert len(np.unique(canvas)) > 900
    crop = eval_image(ramp, resize=32, crop=24, pixels=pixels)
    assert (crop.shape, crop.dtype) == ((24, 24, 1), np.dtype(dtype))


def test_pictures_of_eight_bits_are_the_same_picture_in_every_dtype():
    picture = bands(3, high=256, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    for pixels, white in ((Pixels(3, "uint16"), 65_535), (Pixels(3, "float32"), 1)):
        np.testing.assert_allclose(decode(file.getvalue(), pixels) / white, picture / 255, atol=1e-5)
    keys = jax.random.split(jax.random.key(0), 1)
    settings = recipes.get_config().crops
    settings.global_size, settings.local_number = 16, 0
    made = [
        multicrop(keys, canvas[None], np.float32([size]), settings, (0.5,) * 3, (0.25,) * 3, np.float32).global_crops
        for canvas, size in (
            to_canvas(file.getvalue(), 32, Pixels(3, dtype)) for dtype in ("uint8", "uint16", "float32")
        )
    ]
    np.testing.assert_allclose(made[1], made[0], atol=1e-3)  # 16 bits: steps of 1/65,535, divided by std 0.25
    np.testing.assert_allclose(made[2], made[0], atol=1e-3)


def test_color_of_sixteen_bits_keeps_them():
    pytest.importorskip("imagecodecs")
    import imagecodecs

    color = bands(3, high=65_536)
    png, tif = imagecodecs.png_encode(color), tiff(color, photometric="rgb")
    for file in (png, tif):
        np.testing.assert_array_equal(decode(file, Pixels(3, "uint16")), color)
    assert np.abs(decode(png, Pixels(3)).astype(int) - color // 256).max() <= 1  # Pillow's own upper 8 bits


def test_a_tiff_is_turned_upright():
    array = bands(4, high=256, dtype=np.uint8)
    turned = tiff(array, photometric="minisblack", planarconfig="contig", extratags=[(274, 3, 1, 6, True)])
    out, (height, width) = to_canvas(turned, 64, Pixels(4))
    np.testing.assert_array_equal(out[:height, :width], np.rot90(array, -1))


SPOILT = {
    "band count": (lambda: interleaved(bands(4)), "it has 4 channels, but model.in_channels is 5"),
    "not a number": (lambda: npy(np.full((4, 4, 5), np.nan, np.float32)), "mask what is not finite"),
    "cut npy": (lambda: npy(bands())[:-100], "."),
    "cut tiff": (lambda: planes(bands())[:-1000], "."),
    "cut npz": (lambda: npz(image=bands())[:-100], "."),
    "objects": (lambda: npy(np.array([[{}]], object)), "Object arrays"),
    "a vector": (lambda: npy(np.zeros(7, np.uint16)), "is no image"),
    "several arrays": (lambda: npz(a=bands(), b=bands()), "none of its 2 arrays is named image"),
    "a huge header": (lambda: npy(np.zeros((1, 1, 5), np.uint16)).replace(b"(1, 1, 5)", b"(1e6,1,5)"), "."),
    "zeros that unpack": (lambda: npz(image=np.zeros((9_000, 9_000, 5), np.uint16)), "more than the limit of 600"),
    "a jpeg": (lambda: b"\xff\xd8\xff", "."),
    "volume": (lambda: volume("ZCYX"), "axes ZCYX"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_what_cannot_be_read_is_refused_in_one_line(kind):
    make, message = SPOILT[kind]
    with pytest.raises(DecodeError, match=message) as error:
        decode(make(), DEEP)
    assert "\n" not in str(error.value)


def folder_of(path, count=9, write=interleaved, suffix="tif"):
    for i in range(count):
        (path / f"class{i % 3}").mkdir(exist_ok=True, parents=True)
        (path / f"class{i % 3}" / f"{i}.{suffix}").write_bytes(write(bands(seed=i)))
    return f"folder:{path}"


def batches(spec, **options):
    order = {"batch_size": 4, "canvas_size": 24, "seed": 3, "pixels": DEEP} | options
    with train_batches(open_source(spec), **order) as stream:
        return [next(stream) for _ in range(5)]


def test_the_batches_are_the_same_from_every_container(tmp_path):
    spec = folder_of(tmp_path / "tiffs")
    source = open_source(spec)
    expected = batches(spec)
    arrays = folder_of(tmp_path / "arrays", write=npy, suffix="npy")
    names = [source.name(i) for i in range(len(source))]
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive, tarfile.open(tmp_path / "all.tar", "w") as tar:
        for i, name in enumerate(names):
            archive.writestr(name, source[i].image)
            for suffix, content in (("tif", source[i].image), ("cls", str(source.label(i)).encode())):
                member = tarfile.TarInfo(f"{i}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    prepare(spec, tmp_path / "shards", canvas_size=0, pixels=DEEP, shard_images=4, workers=0)
    for other in (
        arrays,
        f"zip:{tmp_path}/all.zip",
        f"wds:{tmp_path}/all.tar",
        f"array_record:{tmp_path}/shards/*.array_record",
    ):
        for ours, theirs in zip(batches(other), expected, strict=True):
            assert ours.canvas.dtype == np.uint16
            np.testing.assert_array_equal(ours.canvas, theirs.canvas)
            np.testing.assert_array_equal(ours.label, theirs.label)


def test_bad_files_are_counted_and_replaced(tmp_path):
    spec = folder_of(tmp_path)
    (tmp_path / "class0" / "0.tif").write_bytes(interleaved(bands(4)))
    (tmp_path / "class1" / "1.tif").write_bytes(npy(np.full((4, 4, 5), np.nan, np.float32)))
    bad = {int(record) for batch in batches(spec) for record in batch.bad if record >= 0}
    source = open_source(spec)
    assert {source.name(record) for record in bad} == {"class0/0.tif", "class1/1.tif"}


def test_arrays_count_only_where_there_are_no_pictures(tmp_path, capsys):
    folder_of(tmp_path)
    (tmp_path / "features.npy").write_bytes(npy(bands()))
    assert len(open_source(f"folder:{tmp_path}")) == 9
    assert "passed over 1 files that are no images (1 x .npy)" in capsys.readouterr().err


def test_a_missing_decoder_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(UserError, match=r"tifffile is not installed: pip install 'dino_jax\[bands\]'"):
        decode(interleaved(bands()), DEEP)


def test_chosen_bands_are_stretched_for_the_eye():
    array = np.zeros((50, 50, 5), np.uint16)
    array[..., 3] = np.linspace(1_000, 1_200, 50)[None]
    shown = to_rgb(array, (3, 0, 1))
    assert (shown[0, 0].tolist(), shown[0, -1].tolist()) == ([0, 0, 0], [255, 0, 0])
    gray = np.full((4, 4, 1), 7, np.uint8)
    np.testing.assert_array_equal(to_rgb(gray, (0, 1, 2)), np.full((4, 4, 3), 7))
