import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from zoo import encoded, photo

from dino_jax.commands import prepare as command
from dino_jax.commands.prepare import describe, prepare, smaller
from dino_jax.data.decoding import to_canvas
from dino_jax.data.pipeline import train_batches
from dino_jax.data.pixels import Pixels
from dino_jax.data.sources import open_source
from dino_jax.errors import UserError

ROOT = Path(__file__).parents[2]
AS_THEY_ARE = {"canvas_size": 0, "pixels": Pixels(3), "shard_images": 5, "workers": 0}
NAMES = [f"shard-{k:05d}-of-00005.array_record" for k in range(5)]


@pytest.fixture
def folder(tmp_path):
    """24 images of two classes."""
    for i in range(24):
        path = tmp_path / "in" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photo(i)))
    return tmp_path / "in"


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def stream(source, p=0, hosts=1):
    settings = {"batch_size": 8, "canvas_size": 16, "pixels": Pixels(3), "seed": 0}
    with train_batches(source, **settings, process_index=p, process_count=hosts) as batches:
        return [next(batches) for _ in range(4)]


def test_training_from_the_files_is_training_from_the_source(folder, tmp_path):
    """The same global batches, also on 2 and 4 hosts."""
    done = prepare(f"folder:{folder}", tmp_path / "out", **AS_THEY_ARE)
    assert list(done) == NAMES
    prepared = open_source(f"array_record:{tmp_path}/out/*.array_record")
    assert (len(prepared), prepared.num_classes) == (24, 2)
    whole = stream(open_source(f"folder:{folder}"))
    for hosts in (1, 2, 4):
        for share in (stream(prepared, p, hosts) for p in range(hosts)):
            for ours, theirs in zip(share, whole, strict=True):
                for a, b in zip(ours, theirs, strict=True):
                    np.testing.assert_array_equal(a, b[ours.position])


def test_images_are_made_smaller_in_their_own_shape():
    large = np.asarray(Image.fromarray(photo()).resize((300, 200), Image.Resampling.BICUBIC))
    made = smaller(encoded(large), 40, Pixels(3))
    assert Image.open(io.BytesIO(made)).size == (60, 40)
    ours, theirs = (to_canvas(image, 40, Pixels(3))[0].astype(int) for image in (made, large))
    assert np.abs(ours - theirs).mean() < 2
    assert smaller(encoded(large), 200, Pixels(3)) == encoded(large)
    assert smaller(large, 256, Pixels(3)) is large
    with pytest.raises(UserError, match="--canvas_size=4 makes JPEGs"):
        smaller(np.zeros((8, 8, 5), np.uint8), 4, Pixels(5))


def test_what_cannot_be_decoded_is_left_out_and_named(folder, tmp_path):
    (folder / "a/00.png").write_bytes(b"text")
    (folder / "b/99.png").symlink_to("nowhere")
    done = prepare(f"folder:{folder}", tmp_path / "out", **AS_THEY_ARE | {"canvas_size": 32})
    prepared = open_source(f"array_record:{tmp_path}/out/*.array_record")
    assert len(prepared) == 23
    assert [prepared.label(i) for i in range(23)] == [0] * 11 + [1] * 12
    text = describe("out", done)
    assert "left out: a/00.png: not a whole image" in text
    assert "left out: b/99.png: No such file" in text
    assert "23 images in 5 files" in text
    assert "2 left out" in text
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["images"] == 25
    assert manifest["shards"][0]["left_out"].keys() == {"a/00.png"}


def test_a_run_that_was_cut_off_goes_on(folder, tmp_path, monkeypatch):
    out, spec = tmp_path / "out", f"folder:{folder}"
    prepare(spec, tmp_path / "whole", **AS_THEY_ARE)
    wrote, write = [], command.write_examples

    def full_at_the_fourth(examples, num_classes, path):
        if len(wrote) == 3:
            Path(path).write_bytes(b"half a file")
            raise OSError(28, "No space left on device")
        wrote.append(path)
        return write(examples, num_classes, path)

    monkeypatch.setattr(command, "write_examples", full_at_the_fourth)
    with pytest.raises(UserError, match=r"can't write .*/out/shard-0000[234].*No space left"):
        prepare(spec, out, **AS_THEY_ARE)
    monkeypatch.setattr(command, "write_examples", lambda *args: wrote.append(args[2]) or write(*args))
    wrote.clear()
    done = prepare(spec, out, **AS_THEY_ARE)
    assert sum(shard.images for shard in done.values()) == 24
    assert 0 < len(wrote) < 5
    assert set(files(out)) == {*NAMES, "manifest.json"}
    assert files(out) == files(tmp_path / "whole")

    (out / NAMES[1]).write_bytes(b"damaged")
    (out / NAMES[2]).unlink()
    wrote.clear()
    prepare(spec, out, **AS_THEY_ARE)
    assert len(wrote) == 2
    assert files(out) == files(tmp_path / "whole")


def test_a_folder_of_something_else_is_refused(folder, tmp_path):
    out, spec = tmp_path / "out", f"folder:{folder}"
    prepare(spec, out, **AS_THEY_ARE)
    with pytest.raises(UserError, match="another canvas_size .0, now 8"):
        prepare(spec, out, **AS_THEY_ARE | {"canvas_size": 8})
    (folder / "b/01.png").rename(folder / "b/renamed.png")
    with pytest.raises(UserError, match="another names"):
        prepare(spec, out, **AS_THEY_ARE)
    (out / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="can't read .*manifest.json"):
        prepare(spec, out, **AS_THEY_ARE)
    (out / "manifest.json").unlink()
    with pytest.raises(UserError, match="another origin"):
        prepare(spec, out, **AS_THEY_ARE)


@pytest.mark.slow
def test_command_in_parallel_writes_the_same(folder, tmp_path):
    prepare(f"folder:{folder}", tmp_path / "one", **AS_THEY_ARE)
    arguments = [f"folder:{folder}", str(tmp_path / "two"), "--workers=2", "--shard_images=5"]
    run = [sys.executable, "-m", "dino_jax", "prepare", *arguments]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "24 images in 5 files" in done.stdout
    assert f"--config.data.source='array_record:{tmp_path}/two/*.array_record'" in done.stdout
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_beam_that_is_not_installed_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"apache_beam is not installed: pip install 'dino_jax\[beam\]'"):
        prepare(f"folder:{folder}", tmp_path / "out", **AS_THEY_ARE, beam_options="--runner=DirectRunner")
