"""Damaged and edited files of weights: each loads, or is refused in one line. Never another exception."""

import copy
import json
import random
import shutil

import jax
import numpy as np
import pytest

from dino_jax import checkpoints
from dino_jax.errors import UserError
from dino_jax.models.registry import VARIANT
from dino_jax.weights import huggingface, load, official, tensor_files

CARD = {"arch": "vit_nano", "patch_size": 8, "in_channels": 3, "image_size": 40, "embed_dim": 64} | VARIANT
LIKE = official.backbone_like(CARD)
TEACHER = official.to_official(jax.tree.map(lambda x: np.full(x.shape, 0.5, np.float32), LIKE["params"]))
PREPROCESSING = {"resize": 60, "crop": 40, "mean": [0.1] * 3, "std": [0.3] * 3}
ODD = [None, True, 0, -1, 2**40, 0.5, float("nan"), "", "vit", [], [0], ["a"], {}, {"a": 1}]


def outcome(load_it):
    """ "works", or the one line of a UserError; any other exception is raised."""
    try:
        load_it()
    except UserError as error:
        line = str(error)
    else:
        line = "works"
    assert "\n" not in line
    return line


def mutated(data, rng):
    """A file with flipped bits, a cut, a repeated or a zeroed part."""
    data = bytearray(data)
    start = rng.randrange(len(data) if rng.random() < 0.3 else min(len(data), 4096))  # headers more often
    kind = rng.randrange(4)
    if kind == 0:
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(start, len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[start:]
    elif kind == 2:
        data[start:start] = data[start : start + rng.randrange(1, 64)]
    else:
        data[start : start + rng.randrange(1, 64)] = bytes(rng.randrange(1, 64))
    return bytes(data)


def edits(value):
    """Every variant of a JSON object with one key missing or one value replaced."""
    for key in value:
        without = copy.deepcopy(value)
        del without[key]
        yield without
        for odd in ODD:
            yield {**value, key: odd}
        if isinstance(value[key], dict):
            for inner in edits(value[key]):
                yield {**value, key: inner}


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_damaged_weight_files(tmp_path, name):
    if name.endswith(".pth"):
        pytest.importorskip("torch")
    tensor_files.write(tmp_path / name, TEACHER)
    whole, rng = (tmp_path / name).read_bytes(), random.Random(0)
    found = []
    for number in range(150):
        path = tmp_path / f"{number}{name}"
        path.write_bytes(mutated(whole, rng))
        found.append(outcome(lambda path=path: load.load_weights(path, training=False)))
        path.unlink()
    assert len(set(found)) > 10


def test_edited_cards(tmp_path, monkeypatch):
    card = {"architecture": CARD, "preprocessing": PREPROCESSING, "provenance": {"step": 3}}
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), LIKE)
    folder = checkpoints.write_export(tmp_path / "export", {"variables": zeros}, card)
    monkeypatch.setattr(checkpoints, "damage", lambda folder: None)  # an editor may also write the manifest
    # The arrays are the same each time, and reading them is not what is tested.
    monkeypatch.setattr(checkpoints, "restore_arrays", lambda folder, like: zeros)
    for edited in edits(card):
        (folder / "card.json").write_text(json.dumps(edited))
        outcome(lambda: load.load_weights(folder, training=False))
    for text in ("", "[]", "3", "\xff", "{" * 100_000, '{"architecture": '):
        (folder / "card.json").write_text(text, encoding="latin-1")
        assert "card.json is damaged" in outcome(lambda: load.load_weights(folder, training=False))


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_edited_hugging_face_settings(tmp_path, file, monkeypatch):
    monkeypatch.setattr(tensor_files, "read", lambda path: TEACHER)  # the same tensors each time
    whole = tmp_path / "whole"
    huggingface.write_folder(whole, TEACHER, {"architecture": CARD, "preprocessing": PREPROCESSING})
    folder = shutil.copytree(whole, tmp_path / "hf")
    for edited in edits(json.loads((whole / file).read_text())):
        (folder / file).write_text(json.dumps(edited))
        outcome(lambda: load.load_weights(folder, training=False))
    for text in ("", "[]", "\xff"):
        (folder / file).write_text(text, encoding="latin-1")
        assert f"{file} is damaged" in outcome(lambda: load.load_weights(folder, training=False))


def test_edited_metadata(tmp_path):
    odd = [json.dumps(one) for one in [*ODD, *edits(PREPROCESSING)]] + ["", "{", "\x00"]
    for name, text in [(name, text) for name in (load.PREPROCESSING, load.NUM_HEADS) for text in odd]:
        tensor_files.write(tmp_path / "x.safetensors", TEACHER, {name: text})
        outcome(lambda: load.load_weights(tmp_path / "x.safetensors", training=False))


@pytest.mark.parametrize(
    ("changes", "mean", "std"),
    [
        ({"image_mean": 0.5, "image_std": 0.25}, [0.5] * 3, [0.25] * 3),  # broadcast, as there
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51.0] * 3}, [0.5] * 3, [0.2] * 3),
        ({"rescale_factor": 2 / 255, "image_mean": [1.0] * 3, "image_std": [0.5] * 3}, [0.5] * 3, [0.25] * 3),
        ({"do_normalize": False}, [0.0], [1.0]),
    ],
)
def test_hugging_face_scaling_is_honored(tmp_path, changes, mean, std):
    folder = tmp_path / "hf"
    huggingface.write_folder(folder, TEACHER, {"architecture": CARD, "preprocessing": PREPROCESSING})
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | changes))
    found = load.load_weights(folder, training=False).card["preprocessing"]
    np.testing.assert_allclose(found["mean"], mean)
    np.testing.assert_allclose(found["std"], std)
