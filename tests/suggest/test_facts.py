"""The facts that suggestions rest on, from folders whose contents are known."""

import numpy as np
import pytest
from PIL import Image

from dino_jax.data.sources import open_source
from dino_jax.errors import UserError
from dino_jax.suggest import facts


def write(folder, images, mode=None):
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image, mode).save(folder / f"{i:03d}.png")
    return f"folder:{folder}"


def looked_at(spec):
    return facts.of_images(spec, open_source(spec), workers=0)


def test_sizes_copies_and_levels_of_color_images(tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (30, 50, 3), np.uint8) for _ in range(9)]
    found = looked_at(write(tmp_path / "color", [*images, images[0]]))
    assert (found.number, found.classes, found.copies, found.channels) == (10, 0, 1, 3)
    assert (found.short_side, found.long_side) == (30, 50)
    expected = np.concatenate([image.reshape(-1, 3) for image in [*images, images[0]]]) / 255
    np.testing.assert_allclose(found.mean, expected.mean(0), atol=1e-3)  # rounded to three digits
    np.testing.assert_allclose(found.std, expected.std(0), atol=1e-3)


def test_gray_images_stored_in_color_have_one_channel(tmp_path):
    gray = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 1), np.uint8)
    assert looked_at(write(tmp_path / "gray", list(np.repeat(gray, 3, axis=3)))).channels == 1


def test_one_color_image_among_gray_ones_keeps_the_color(tmp_path):
    rng = np.random.default_rng(0)
    gray = [rng.integers(0, 256, (20, 20), np.uint8) for _ in range(5)]
    assert looked_at(write(tmp_path / "mixed", [*gray, rng.integers(0, 256, (20, 20, 3), np.uint8)])).channels == 3


def test_the_level_of_white_of_12_bit_scans(tmp_path):
    scans = [np.full((20, 20), 4_000, np.uint16) for _ in range(3)]
    found = looked_at(write(tmp_path / "scans", scans))
    assert (found.brightest, found.white) == (4_000, 65_535)


def test_damaged_images_are_counted(tmp_path):
    spec = write(tmp_path / "some", [np.zeros((8, 8), np.uint8)] * 2)
    (tmp_path / "some" / "bad.png").write_bytes(b"no image")
    assert looked_at(spec).undecodable == 1


def test_a_source_without_a_whole_image_is_refused_with_the_reason(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"none of 1 images can be decoded.*not a whole image"):
        looked_at(f"folder:{tmp_path}")


def test_the_machine_has_memory_and_devices():
    machine = facts.of_machine()
    assert machine.platform == "cpu"
    assert machine.devices >= 1
    assert machine.memory > 2**28


def test_files_of_arrays_have_the_channels_of_their_arrays(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    bands = np.random.default_rng(0).integers(0, 3000, (20, 24, 5)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "0.tif", bands, photometric="minisblack", planarconfig="contig")
    tifffile.imwrite(tmp_path / "1.tif", np.moveaxis(bands, -1, 0), photometric="minisblack", planarconfig="separate")
    found = looked_at(f"folder:{tmp_path}")
    assert (found.channels, found.undecodable, len(found.mean)) == (5, 0, 5)
    assert (found.brightest, found.white) == (bands.max(), 65_535)
