import numpy as np
import pytest
from PIL import Image

from dino_jax.errors import UserError
from dino_jax.evals.common.label_maps import (
    CLASS_COLORS,
    PALETTE,
    read_labels,
    read_objects,
    tint_objects,
    write_labels,
)


def test_labels_are_kept_in_the_palette_of_davis(tmp_path):
    labels = np.arange(24, dtype=np.uint8).reshape(4, 6)
    write_labels(tmp_path / "a.png", labels)
    assert np.array_equal(read_labels(tmp_path / "a.png", "knob"), labels)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "P"
        colors = np.asarray(picture.convert("RGB")).reshape(-1, 3).tolist()
    # As DAVIS's annotations have them: black, dark red, dark green, olive, navy; 191 rather than VOC's 192; then gray.
    assert colors[:5] == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]]
    assert colors[8:10] == [[64, 0, 0], [191, 0, 0]]
    assert colors[21:] == [[128, 64, 128], [22, 22, 22], [23, 23, 23]]


def test_classes_have_the_colors_of_voc():
    assert CLASS_COLORS[[0, 1, 8, 9, 20]].tolist() == [[0, 0, 0], [128, 0, 0], [64, 0, 0], [192, 0, 0], [0, 64, 128]]
    assert len(np.unique(CLASS_COLORS, axis=0)) == 256


@pytest.mark.parametrize("paint", [255, 1, (255, 255, 255), (200, 0, 0)])
def test_a_mask_drawn_by_hand_becomes_objects(tmp_path, paint):
    picture = Image.new("L" if isinstance(paint, int) else "RGB", (6, 4))
    picture.paste(paint, (1, 1, 3, 3))
    picture.save(tmp_path / "mask.png")
    expected = np.zeros((4, 6), np.uint8)
    expected[1:3, 1:3] = 1
    assert np.array_equal(read_objects(tmp_path / "mask.png", "knob"), expected)


def test_each_color_is_an_object(tmp_path):
    picture = Image.new("RGB", (6, 4))
    picture.paste((255, 0, 0), (0, 0, 2, 2))
    picture.paste((0, 0, 255), (3, 0, 6, 2))
    picture.save(tmp_path / "mask.png")
    assert read_objects(tmp_path / "mask.png", "knob")[0].tolist() == [2, 2, 0, 1, 1, 1]


def test_only_objects_are_tinted():
    image = np.full((1, 2, 3), 100, np.uint8)
    shown = tint_objects(image, np.array([[0, 1]], np.uint8))
    assert shown[0, 0].tolist() == [100, 100, 100]
    assert shown[0, 1].tolist() == (50 + PALETTE[1] // 2).tolist()


def test_mistakes_are_named(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "black.png")
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    Image.fromarray(np.full((4, 4), 300, np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "text.png").write_text("no picture")
    for read, name, message in (
        (read_labels, "photo.png", "colors"),
        (read_labels, "deep.png", "deep.png has labels of 16 bits or more: .* 8-bit PNG"),
        (read_labels, "text.png", "text.png can't be read"),
        (read_labels, "none.png", "none.png can't be read"),
        (read_objects, "black.png", "all black"),
        (read_objects, "photo.png", "64 colors"),
        (read_objects, "text.png", "text.png can't be read"),
    ):
        with pytest.raises(UserError, match=message) as error:
            read(tmp_path / name, "--config.mask")
        assert str(error.value).startswith("--config.mask")
