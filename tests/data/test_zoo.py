"""Every kind of file that a data set is known to hold, through the pipeline as training runs it."""

import builtins
import os
import subprocess
import sys

import numpy as np
import pytest
from zoo import BAD, LINKED_NOWHERE, NO_ACCESS, USED, put_in_folder

from dino_jax.data.decoding import to_canvas
from dino_jax.data.pipeline import train_batches
from dino_jax.data.pixels import Pixels
from dino_jax.data.sources import folder, open_source

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
SIDE, BATCH = 32, 8
REPLACED = [*BAD, NO_ACCESS, *LINKED_NOWHERE]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("zoo")
    put_in_folder(root)

    def opened(path, *args, **options):
        if os.path.basename(path) == NO_ACCESS:
            raise PermissionError(13, "Permission denied", path)
        return builtins.open(path, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        if os.access(root / NO_ACCESS, os.R_OK):  # who runs as root may read anything: simulate the refusal
            patch.setattr(folder, "open", opened, raising=False)
        yield open_source(f"folder:{root}")


def stream(source, process_index=0, process_count=1):
    """The batches of an epoch."""
    order = {"seed": 0, "process_index": process_index, "process_count": process_count}
    with train_batches(source, batch_size=BATCH, canvas_size=SIDE, pixels=Pixels(3), **order) as batches:
        return [next(batches) for _ in range(-(-len(source) // BATCH))]


@pytest.fixture(scope="module")
def batches(source):
    return stream(source)


@pytest.fixture(scope="module")
def shown(source, batches):
    """File name -> canvas and size of what was used; file name -> that of its substitute, of what was not."""
    used, replaced = {}, {}
    for batch in batches:
        for canvas, size, index, bad in zip(batch.canvas, batch.size, batch.index, batch.bad, strict=True):
            if bad >= 0:
                replaced[source.paths[bad]] = source.paths[index]
            else:
                used[source.paths[index]] = canvas, size
    return used, replaced


def test_each_file_is_listed_once(source):
    """A folder that links to its own parent ends; pipes, empty folders and folders named like images are no images."""
    assert source.paths == sorted([*USED, *REPLACED])
    assert source.num_classes == 0


def test_names_are_one_line_that_any_terminal_takes(source):
    names = [source.name(i) for i in range(len(source))]
    assert {"two\\nlines.png", "latin-\\udce9.png", "Gemüse 図 🦖.png"} < set(names)
    "".join(names).encode()
    assert not any("\n" in name for name in names)


@pytest.mark.parametrize("name", USED)
def test_what_can_be_used_is_what_it_shows(shown, name):
    _, pixels, tolerance = USED[name]
    pixels = np.asarray(pixels)
    if pixels.ndim == 2:
        pixels = np.dstack([pixels] * 3)
    canvas, size = shown[0][name]
    expected, shape = to_canvas(np.round(pixels).astype(np.uint8), SIDE, Pixels(3))
    assert tuple(size) == shape == pixels.shape[:2]
    assert np.abs(canvas.astype(int) - expected).mean() <= tolerance


@pytest.mark.parametrize("name", REPLACED)
def test_what_cannot_is_named_and_replaced(shown, name):
    used, replaced = shown
    assert name not in used
    assert replaced[name] in USED


def test_substitutes_are_the_same_for_everyone(source, batches):
    """Again, and shared out over 2 and 4 hosts."""
    for hosts in (1, 2, 4):
        shares = [stream(source, p, hosts) for p in range(hosts)]
        for step, whole in enumerate(batches):
            for share in shares:
                part = share[step]
                for ours, theirs in zip(part, whole, strict=True):
                    np.testing.assert_array_equal(ours, theirs[part.position])


MEMORY = """
import resource, sys
from dino_jax.data.decoding import DecodeError, decode
from dino_jax.data.pixels import Pixels
import zoo
decode(zoo.USED["plain.jpg"][0], Pixels(3))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode(zoo.BAD["bomb.png"][0], Pixels(3))
except DecodeError as error:
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, error)
"""


def test_a_bomb_costs_no_memory():
    """20 KB of sound PNG that unpack to 1.8 GB of colors: a process of its own measures its peak."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", MEMORY], env=environment, capture_output=True, text=True, timeout=120)
    megabytes, reason = done.stdout.split(maxsplit=1)
    assert "13000 x 13000" in reason
    assert float(megabytes) < 50
