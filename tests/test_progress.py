from dino_jax.progress import progress


def test_what_is_known_is_told(capsys):
    assert list(progress(iter("abc"), 3, "clip.mp4", "frames", every=0)) == list("abc")
    lines = capsys.readouterr().err.splitlines()
    assert lines[1].startswith("clip.mp4: 2 of 3 frames")
    assert "s left" in lines[1]
    list(progress(iter("ab"), 0, "clip.mp4", every=0))
    assert "left" not in capsys.readouterr().err


def test_items_count_for_what_is_in_them(capsys):
    assert list(progress(iter(["abcd", "ab"]), 6, "train", size=len, every=0)) == ["abcd", "ab"]
    assert "train: 4 of 6 images" in capsys.readouterr().err
