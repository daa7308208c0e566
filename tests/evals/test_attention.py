from fractions import Fraction
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from dino_jax.errors import UserError
from dino_jax.evals import attention
from dino_jax.evals.common.images import crop_to_patches, heatmap, normalize_images, upsample
from dino_jax.evals.common.video import read_video, write_video
from dino_jax.models import build_backbone
from dino_jax.weights.backbone import Backbone


def make_backbone(arch="vit_nano", channels=3):
    model = build_backbone(arch, patch_size=8, image_size=16)
    variables = model.init(jax.random.key(0), np.zeros((1, 16, 16, channels), np.float32))
    card = {
        "architecture": {"arch": arch, "in_channels": channels},
        "preprocessing": {"mean": [0.5] * channels, "std": [0.5] * channels, "resize": 16, "crop": 16},
    }
    return Backbone(model, variables, card)


@pytest.fixture(scope="module")
def backbone():
    return make_backbone()


def settings(**values):
    config = attention.default_config()
    config.update(values)
    return config


def test_maps_are_the_reference_cls_row(golden):
    arrays, meta = golden("vit")
    patch = meta["config"]["patch_size"]
    for height, width in meta["config"]["sizes"]:
        rows, columns = height // patch, width // patch
        whole = arrays[f"attn_last_{height}x{width}"]
        model = SimpleNamespace(patch_size=patch, apply=lambda variables, images, method, whole=whole: whole)
        images = np.zeros((len(whole), rows * patch, columns * patch, 3), np.float32)
        maps = attention.attention_maps(Backbone(model, {}, {"architecture": {"arch": "vit"}}), images)
        for y in range(rows):
            for x in range(columns):
                assert np.array_equal(maps[:, :, y, x], whole[:, :, 0, 1 + y * columns + x])


def test_maps_of_a_rectangular_image(backbone):
    maps = attention.attention_maps(backbone, np.random.default_rng(0).standard_normal((2, 16, 32, 3), np.float32))
    assert maps.shape == (2, 4, 2, 4)
    assert (maps > 0).all()
    assert (maps.sum((2, 3)) < 1).all()


def test_maps_leave_registers_out():
    model = build_backbone("vit_nano", patch_size=8, image_size=16, registers=3)
    images = np.random.default_rng(0).standard_normal((2, 16, 32, 3), np.float32)
    variables = model.init(jax.random.key(0), images)
    whole = model.apply(variables, images, method="last_attention")
    maps = attention.attention_maps(Backbone(model, variables, {"architecture": {"arch": "vit_nano"}}), images)
    np.testing.assert_allclose(maps.reshape(2, 4, 8), whole[:, :, 0, 4:], rtol=1e-5)


def test_masks_keep_the_mass():
    maps = np.array([[[0.5, 0.1], [0.25, 0.15]], [[1.0, 1.0], [7.0, 1.0]]])
    # Shares in ascending order: 0.1, 0.15, 0.25, 0.5; the first two stay within the 0.4 to drop, the third does not.
    assert attention.mass_masks(maps, 0.6)[0].tolist() == [[True, False], [True, False]]
    assert attention.mass_masks(maps, 0.6)[1].tolist() == [[False, False], [True, False]]
    assert attention.mass_masks(maps, 0.45)[0].tolist() == [[True, False], [False, False]]
    kept = np.random.default_rng(0).random((3, 5, 6, 7)) ** 4
    share = (kept * attention.mass_masks(kept, 0.6)).sum((2, 3)) / kept.sum((2, 3))
    assert (share >= 0.6).all()


def test_jaccard_takes_the_best_head_of_each_object():
    objects = np.zeros((2, 4, 4), bool)
    objects[:, :2] = True  # upper half
    masks = np.zeros((2, 3, 4, 4), bool)
    masks[0, 1, :2] = True  # exact: 8 / 8
    masks[0, 2] = True
    masks[1, 0, :, :2] = True  # left half: 4 / 12
    masks[1, 2] = True  # everything: 8 / 16
    heads, scores = attention.best_heads(masks, objects)
    assert heads.tolist() == [1, 2]
    assert scores.tolist() == [1.0, 0.5]


@pytest.mark.parametrize("channels", [1, 3])
def test_evaluate_masks_scores_and_draws(tmp_path, channels):
    images = np.random.default_rng(0).integers(0, 256, (5, 20, 20, channels), np.uint8)
    objects = np.zeros((5, 20, 20), bool)
    objects[:, 4:12, 4:12] = True
    backbone = make_backbone(channels=channels)
    sheet = tmp_path / "pictures" / "sheet.png"
    # 20 pixels are 60 enlarged, of which 56 are whole patches.
    score = attention.evaluate_masks(backbone, images, objects, sheet, upscale=3, rows=4, batch_size=2)
    assert 0 < score < 1
    assert score == pytest.approx(attention.evaluate_masks(backbone, images, objects, upscale=3))
    with Image.open(sheet) as picture:
        assert picture.width > 7 * 120  # image, mean, four heads, mask
        assert picture.height > 4 * 120
        assert len(picture.getcolors(1 << 20)) > 100


@pytest.mark.parametrize("shape", [(30, 50), (75, 21)])
def test_run_writes_a_picture_for_a_photo_of_any_shape(backbone, tmp_path, shape):
    photo = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)).save(photo)
    written = attention.run(backbone, settings(images=str(photo), size=40), tmp_path / "out")["pictures"]
    with Image.open(written[0]) as picture:
        assert min(picture.size) > 100


def test_run_takes_a_folder_or_a_list(backbone, tmp_path):
    for name in ("b.png", "a.JPG", "notes.txt"):
        if name == "notes.txt":
            (tmp_path / name).write_text("no picture")
        else:
            Image.new("RGB", (24, 24)).save(tmp_path / name)
    assert len(attention.run(backbone, settings(images=str(tmp_path), size=0), tmp_path / "out")["pictures"]) == 2
    both = f"{tmp_path / 'b.png'}, {tmp_path / 'a.JPG'}"
    assert len(attention.run(backbone, settings(images=both, size=16), tmp_path / "out")["pictures"]) == 2


def test_run_writes_each_tile_in_full_size(backbone, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 45, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "v1.2.png")
    attention.run(backbone, settings(images=str(tmp_path / "v1.2.png"), size=0), tmp_path / "out")
    folder = tmp_path / "out" / "000_v1.2"
    tiles = {path.stem: np.asarray(Image.open(path)) for path in folder.iterdir()}
    assert set(tiles) == {"image", "mean", "head1", "head2", "head3", "head4", "mask"}
    assert {tile.shape for tile in tiles.values()} == {(24, 40, 3)}  # cut to whole patches
    assert np.array_equal(tiles["image"], pixels[:, :40])
    maps = attention.attention_maps(backbone, (pixels[None, :, :40] / np.float32(255) - 0.5) / 0.5)[0]
    assert np.array_equal(tiles["head2"], heatmap(upsample(maps[1], 8)))
    kept = upsample(attention.mass_masks(maps.mean(0)), 8)
    assert np.array_equal((tiles["mask"] != tiles["image"]).any(-1), kept)


@pytest.mark.parametrize("channels", [1, 3])
def test_run_draws_a_video(tmp_path, channels):
    pytest.importorskip("av")
    frames = np.full((5, 42, 60, 3), 40, np.uint8)
    for t, frame in enumerate(frames):
        frame[8 + 4 * t : 24 + 4 * t, 16:40] = 240, 200, 30
    with write_video(tmp_path / "clip.mp4", Fraction(10)) as append:
        for frame in frames:
            append(frame)
    backbone, values = make_backbone(channels=channels), {"video": str(tmp_path / "clip.mp4"), "size": 0}
    results = attention.run(backbone, settings(**values, batch_size=2), tmp_path / "out")
    assert results["images"] == 5
    shown = read_video(tmp_path / "out" / "clip_attention.mp4")
    assert results["pictures"] == [str(tmp_path / "out" / "clip_attention.mp4")]
    assert shown.rate == 10
    drawn = list(shown.frames)
    assert len(drawn) == 5  # the last batch was filled up
    assert drawn[0].shape == (40, 56, 3)
    image = crop_to_patches(next(read_video(tmp_path / "clip.mp4").frames), 8)[None]
    image = image if channels == 3 else np.asarray(Image.fromarray(image[0]).convert("L"))[None, ..., None]
    maps = attention.attention_maps(backbone, normalize_images(backbone, image))[0]
    assert np.abs(drawn[0].astype(int) - attention.overlay(image[0], maps)).mean() < 8  # compression


def test_mistakes_are_named(backbone, tmp_path):
    broken, small = tmp_path / "broken.jpg", tmp_path / "small.png"
    broken.write_bytes(b"not a picture")
    Image.new("RGB", (5, 90)).save(small)
    (tmp_path / "empty").mkdir()
    for images, message in (
        ("", "config.images is empty"),
        (str(tmp_path / "none.jpg"), "no such picture"),
        (str(tmp_path / "empty"), "no images"),
        (str(broken), "broken.jpg"),
        (str(small), "smaller than a patch"),
    ):
        with pytest.raises(UserError, match=message):
            attention.run(backbone, settings(images=images, size=0), tmp_path / "out")
    for values, message in (
        ({"images": "a.png", "video": "b.mp4"}, "both set"),
        ({"video": "b.mp4", "batch_size": 0}, "set --config.batch_size"),
    ):
        with pytest.raises(UserError, match=message):
            attention.run(backbone, settings(**values), tmp_path / "out")


def test_convnet_is_refused():
    convnet = Backbone(build_backbone("resnet18"), {}, {"architecture": {"arch": "resnet18"}})
    with pytest.raises(UserError, match="vision transformer"):
        attention.attention_maps(convnet, np.zeros((1, 32, 32, 3), np.float32))
