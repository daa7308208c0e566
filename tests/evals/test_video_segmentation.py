import json
from fractions import Fraction

import jax
import numpy as np
import pytest
from PIL import Image

from dino_jax.errors import UserError
from dino_jax.evals import video_segmentation
from dino_jax.evals.common.davis_metrics import score_objects
from dino_jax.evals.common.label_maps import read_labels, write_labels
from dino_jax.evals.common.video import read_video, write_video
from dino_jax.models import build_backbone
from dino_jax.weights.backbone import Backbone

HEIGHT, WIDTH, FRAMES = 44, 62, 5  # 40 x 56 pixels for the backbone


def make_backbone(channels=3):
    model = build_backbone("vit_nano", patch_size=4, image_size=16)
    variables = model.init(jax.random.key(0), np.zeros((1, 16, 16, channels), np.float32))
    card = {
        "architecture": {"arch": "vit_nano", "in_channels": channels},
        "preprocessing": {"mean": [0.5] * channels, "std": [0.25] * channels, "resize": 16, "crop": 16},
    }
    return Backbone(model, variables, card)


@pytest.fixture(scope="module")
def backbone():
    return make_backbone()


def settings(**values):
    config = video_segmentation.default_config()
    config.update({"size": 40, "multiple": 4, "radius": 3, **values})
    return config


def scene(t):
    """A frame and its labels: two objects of their own colors that move apart over a background."""
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[4:16, 20 - 2 * t : 32 - 2 * t] = 1
    labels[22:36, 24 + 2 * t : 40 + 2 * t] = 2
    return np.array([(40, 60, 90), (230, 30, 20), (250, 240, 60)], np.uint8)[labels], labels


def make_davis(root, videos=("bear", "camel"), frames=FRAMES):
    for name in videos:
        images, masks = root / "JPEGImages" / "480p" / name, root / "Annotations" / "480p" / name
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        for t in range(frames):
            image, labels = scene(t)
            Image.fromarray(image).save(images / f"{t:05d}.jpg", quality=95)
            write_labels(masks / f"{t:05d}.png", labels)
    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("\n".join(videos) + "\n")
    return root


@pytest.fixture(scope="module")
def segmented(backbone, tmp_path_factory):
    """DAVIS's folder, the results, and the folder they were written to."""
    folder = tmp_path_factory.mktemp("davis")
    root = make_davis(folder / "DAVIS")
    return root, video_segmentation.run(backbone, settings(data=str(root)), folder / "out"), folder / "out"


def test_frames_are_resized_as_the_reference_does():
    assert video_segmentation.network_size(480, 854, 480, 64) == (480, 832)
    assert video_segmentation.network_size(854, 480, 480, 64) == (832, 480)
    assert video_segmentation.network_size(1080, 1920, 480, 64) == (480, 832)
    assert video_segmentation.network_size(480, 910, 480, 64) == (480, 896)


@pytest.mark.slow
def test_masks_follow_the_objects(segmented):
    root, results, out = segmented
    assert results["images"] == 2 * FRAMES
    for name in ("bear", "camel"):
        folder = out / "masks" / name
        assert [path.name for path in sorted(folder.iterdir())] == [f"{t:05d}.png" for t in range(FRAMES)]
        assert np.array_equal(read_labels(folder / "00000.png", ""), scene(0)[1])
        assert read_labels(folder / "00003.png", "").shape == (HEIGHT, WIDTH)
    assert not list((out / "masks").glob("*.partial"))
    # Patches of 4 pixels and boundaries within 1 pixel: near, not exact. Standing still would score J 50.
    assert results["figures"]["J_mean"] > 75


def test_figures_are_the_benchmarks_of_the_written_masks(segmented):
    root, results, out = segmented
    inner = [f"{t:05d}.png" for t in range(1, FRAMES - 1)]  # neither the first frame nor the last
    ours = [read_labels(out / "masks" / "bear" / name, "") for name in inner]
    theirs = [read_labels(root / "Annotations" / "480p" / "bear" / name, "") for name in inner]
    J, F = (100 * scores for scores in score_objects(ours, theirs, 2))
    figures = results["figures"]
    assert figures["J_mean"] == pytest.approx(J.mean())  # both videos are the same
    assert figures["F_mean"] == pytest.approx(F.mean())
    assert figures["J&F_mean"] == pytest.approx((J.mean() + F.mean()) / 2)
    assert figures["J_recall"] == pytest.approx(100 * (J > 50).mean())
    assert results["videos"]["camel"]["F"] == pytest.approx(F.mean())
    assert results["objects"]["bear_2"]["J"] == pytest.approx(J[1].mean())
    json.dumps(results)


def test_videos_count_by_their_objects():
    """As in the benchmark: a video with two objects counts twice."""
    scores = {"a": (np.array([[1.0] * 4, [1.0] * 4]), np.array([[0.8] * 4, [0.8] * 4])), "b": (np.zeros((1, 4)),) * 2}
    figures = video_segmentation.benchmark_figures(scores)
    assert figures["J_mean"] == pytest.approx(200 / 3)
    assert figures["J&F_mean"] == pytest.approx(60)


def test_finished_videos_are_not_computed_again(backbone, tmp_path, capsys):
    root, out = make_davis(tmp_path / "DAVIS"), tmp_path / "out"
    first = video_segmentation.run(backbone, settings(data=str(root)), out)
    (out / "masks" / "camel").rename(out / "masks" / "camel.partial")  # as if it had been cut off there
    (out / "masks" / "camel.partial" / "00004.png").unlink()
    second = video_segmentation.run(backbone, settings(data=str(root)), out)
    assert second["images"] == FRAMES
    assert second["figures"] == first["figures"]
    assert capsys.readouterr().out.count("bear  ") == 2  # in the table all the same
    with pytest.raises(UserError, match="other settings: set --out"):
        video_segmentation.run(backbone, settings(data=str(root), topk=3), out)


def test_test_sets_get_masks_without_figures(backbone, tmp_path):
    root = make_davis(tmp_path / "DAVIS", ("bear",), frames=3)
    for name in ("00001.png", "00002.png"):
        (root / "Annotations" / "480p" / "bear" / name).unlink()
    results = video_segmentation.run(backbone, settings(data=str(root)), tmp_path / "out")
    assert len(list((tmp_path / "out" / "masks" / "bear").iterdir())) == 3
    assert results["figures"] == {}


def test_a_video_of_ones_own(backbone, tmp_path):
    pytest.importorskip("av")
    with write_video(tmp_path / "clip.mp4", Fraction(25)) as append:
        for t in range(FRAMES):
            append(scene(t)[0])
    Image.fromarray(scene(0)[0] * (scene(0)[1][..., None] > 0)).save(tmp_path / "mask.png")
    config = settings(video=str(tmp_path / "clip.mp4"), mask=str(tmp_path / "mask.png"))
    results = video_segmentation.run(backbone, config, tmp_path / "out")
    assert results["images"] == FRAMES
    masks = sorted((tmp_path / "out" / "masks" / "clip").iterdir())
    assert np.array_equal(read_labels(masks[0], ""), scene(0)[1])
    last, truth = read_labels(masks[-1], ""), scene(FRAMES - 1)[1]
    assert (last == truth).mean() > 0.9 > (scene(0)[1] == truth).mean()
    shown = read_video(tmp_path / "out" / "clip_masks.mp4")
    assert shown.length == FRAMES
    assert next(shown.frames).shape == (HEIGHT, WIDTH, 3)
    Image.new("L", (30, 30), 255).save(tmp_path / "small.png")
    with pytest.raises(UserError, match="62 x 44 pixels, the first mask 30 x 30"):
        video_segmentation.run(backbone, settings(video=config.video, mask=str(tmp_path / "small.png")), tmp_path / "b")
    with pytest.raises(UserError, match="config.mask is empty"):
        video_segmentation.run(backbone, settings(video=config.video), tmp_path / "b")


def test_gray_backbones_see_gray_frames(tmp_path):
    labels = scene(0)[1]
    frames = [scene(t)[0].mean(-1, keepdims=True).astype(np.uint8) for t in range(2)]
    found = list(video_segmentation.segment(make_backbone(channels=1), frames, labels, settings()))
    assert (found[1] == scene(1)[1]).mean() > 0.9


def test_mistakes_in_the_layout_are_named(backbone, tmp_path):
    def fails(message, change, **values):
        root = make_davis(tmp_path / str(len(list(tmp_path.iterdir()))), ("bear",), frames=3)
        change(root)
        with pytest.raises(UserError, match=message) as error:
            video_segmentation.run(backbone, settings(data=str(root), **values), tmp_path / "out")
        assert "\n" not in str(error.value)

    images, masks = "JPEGImages/480p", "Annotations/480p"
    fails("Annotations/480p is missing", lambda root: (root / masks).rename(root / "masks"))
    fails("ImageSets/2017/test.txt is missing", lambda root: None, split="test")
    fails("val.txt is empty", lambda root: (root / "ImageSets/2017/val.txt").write_text("\n"))
    fails("cow is in val.txt, but no frames", lambda root: (root / "ImageSets/2017/val.txt").write_text("bear\ncow\n"))
    fails("0 annotations: see .*00000.png", lambda root: [path.unlink() for path in (root / masks / "bear").iterdir()])
    fails("2 annotations: see .*00001.png", lambda root: (root / masks / "bear" / "00001.png").unlink())
    fails("00001.jpg can't be read", lambda root: (root / images / "bear" / "00001.jpg").write_bytes(b"no picture"))
    empty, small = np.zeros((HEIGHT, WIDTH), np.uint8), np.ones((HEIGHT, HEIGHT), np.uint8)
    fails("no object in .*00000.png", lambda root: write_labels(root / masks / "bear" / "00000.png", empty))
    fails(
        "frame 0 has 62 x 44 pixels, the first mask 44 x 44",
        lambda root: write_labels(root / masks / "bear" / "00000.png", small),
    )


def test_mistakes_in_the_settings_are_named(backbone, tmp_path):
    for values, message in (
        ({}, "set either --config.data"),
        ({"data": "a", "video": "b"}, "set either --config.data"),
        ({"data": "a", "size": 42}, "set --config.size"),
        ({"data": "a", "multiple": 6}, "set --config.multiple"),
        ({"data": "a", "multiple": 80}, "set --config.multiple lower"),
        ({"data": "a", "radius": 0}, "set --config.radius"),
        ({"data": "a", "temperature": 0.0}, "set --config.temperature"),
    ):
        with pytest.raises(UserError, match=message):
            video_segmentation.run(backbone, settings(**values), tmp_path)
    convnet = Backbone(build_backbone("resnet18"), {}, {"architecture": {"arch": "resnet18"}})
    with pytest.raises(UserError, match="vision transformer"):
        video_segmentation.run(convnet, settings(data="a"), tmp_path)
