import struct
import sys
import wave
from fractions import Fraction

import numpy as np
import pytest

from dino_jax.errors import UserError
from dino_jax.evals.common.video import read_video, write_video


@pytest.fixture
def av():
    return pytest.importorskip("av")


def moving_square(frames=6, height=48, width=64):
    """uint8 [T, H, W, 3]: a red square that goes right and down on blue."""
    video = np.zeros((frames, height, width, 3), np.uint8)
    video[...] = 30, 60, 200
    for t in range(frames):
        video[t, 8 + 2 * t : 24 + 2 * t, 4 + 4 * t : 20 + 4 * t] = 220, 40, 30
    return video


def write(path, frames, rate=Fraction(25)):
    with write_video(path, rate) as append:
        for frame in frames:
            append(frame)


@pytest.mark.parametrize("shape", [(48, 64), (47, 63)])
def test_frames_come_back_as_they_were_written(av, tmp_path, shape):
    frames = moving_square(height=shape[0], width=shape[1])
    write(tmp_path / "new" / "a.mp4", frames, Fraction(30000, 1001))
    video = read_video(tmp_path / "new" / "a.mp4")
    found = np.stack(list(video.frames))
    assert found.shape == (6, 48, 64, 3)  # odd sides are filled up
    assert video.rate == Fraction(30000, 1001)
    assert video.length == 6
    # Compression and colors stored for 2 x 2 pixels: close in the mean, far off only along edges.
    assert np.abs(found[:, : shape[0], : shape[1]].astype(int) - frames).mean() < 8


def test_pictures_of_a_turned_phone_are_upright(av, tmp_path):
    path = tmp_path / "phone.mp4"
    write(path, moving_square())
    stored = np.stack(list(read_video(path).frames))
    box = bytearray(path.read_bytes())
    # The track header's matrix, after its first 40 bytes: identity to a quarter turn clockwise.
    matrix = box.index(b"tkhd") + 4 + 40
    box[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30)
    path.write_bytes(box)
    assert np.array_equal(np.stack(list(read_video(path).frames)), np.rot90(stored, -1, (1, 2)))


def test_damage_further_on_leaves_the_frames_before(av, tmp_path, capsys):
    path = tmp_path / "a.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), np.uint8)
    write(path, noise)
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 2] = b"\xff" * (len(data) // 2 - len(data) // 3)
    path.write_bytes(data)
    found = len(list(read_video(path).frames))
    assert 5 < found < 40
    assert f"damaged after {found} frames" in capsys.readouterr().err


def test_what_is_no_video_is_named(av, tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mp4").touch()
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(1600))
    for name, message in (
        ("none.mp4", "no such file"),
        ("text.mp4", "can't be read as a video"),
        ("empty.mp4", "can't be read as a video"),
        ("sound.wav", "no pictures"),
    ):
        with pytest.raises(UserError, match=message):
            read_video(tmp_path / name)


def test_without_pyav_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"pip install 'dino_jax\[video\]'"):
        read_video(tmp_path / "a.mp4")
    with (
        pytest.raises(UserError, match=r"pip install 'dino_jax\[video\]'"),
        write_video(tmp_path / "a.mp4", Fraction(25)),
    ):
        pass
