import json
import os
import shutil
import struct
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dino_jax.errors import UserError
from dino_jax.weights import tensor_files

DATA = Path(__file__).parent / "data"
DTYPES = [
    *(np.float64, np.float32, np.float16, ml_dtypes.bfloat16),
    *(np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_),
]
MATRIX = np.arange(24, dtype=np.float32).reshape(4, 6)
ARRAYS = {
    **{f"dtypes.{np.dtype(dtype).name}": np.arange(5).astype(dtype) for dtype in DTYPES},
    # Layouts in memory that are easily written wrong.
    "layouts.transposed": MATRIX.T,
    "layouts.sliced": MATRIX[1:, ::2],
    "layouts.reversed": MATRIX[::-1],
    "layouts.expanded": np.broadcast_to(MATRIX[:, :1], (4, 3)),
    "layouts.bfloat16.transposed": MATRIX.astype(ml_dtypes.bfloat16).T,
    "layouts.jax": jnp.arange(6.0).reshape(2, 3).T,
    "count": np.array(3),
    "empty": np.zeros((0, 4), np.uint8),
}


def nested(arrays):
    tree: dict = {}
    for name, array in arrays.items():
        *folders, leaf = name.split(".")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[leaf] = array
    return tree


def assert_same(arrays, expected):
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        assert (arrays[name].dtype, arrays[name].shape) == (array.dtype, array.shape), name
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)


@pytest.mark.parametrize("shape", [dict, nested], ids=["flat", "nested"])
def test_safetensors_are_read_as_they_were_written(tmp_path, shape):
    path = tmp_path / "weights.safetensors"
    tensor_files.write(path, shape(ARRAYS))
    assert_same(tensor_files.read(path), ARRAYS)
    assert os.listdir(tmp_path) == ["weights.safetensors"]
    tensor_files.write(path, tensor_files.read(path))  # over the very file that the arrays are mapped from
    assert_same(tensor_files.read(str(path)), ARRAYS)


def test_others_may_read_what_they_may_read_of_other_files(tmp_path):
    tensor_files.write(tmp_path / "weights.safetensors", {"x": MATRIX})
    (tmp_path / "other").touch()
    assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_torch_reads_what_is_written(tmp_path, suffix):
    torch = pytest.importorskip("torch")
    path = tmp_path / f"weights{suffix}"
    tensor_files.write(path, nested(ARRAYS))
    assert_same(tensor_files.read(path), ARRAYS)
    loaded = torch.load(path, weights_only=True)
    assert type(loaded["layouts"]["bfloat16"]) is dict
    np.testing.assert_array_equal(loaded["layouts"]["bfloat16"]["transposed"].float(), MATRIX.T)
    assert loaded["layouts"]["bfloat16"]["transposed"].dtype == torch.bfloat16
    np.testing.assert_array_equal(loaded["layouts"]["sliced"], MATRIX[1:, ::2])
    assert (loaded["count"].dtype, loaded["count"].shape, loaded["count"].item()) == (torch.int64, (), 3)


def test_safetensors_of_torch_and_for_torch(tmp_path):
    torch = pytest.importorskip("torch")
    import safetensors.torch

    safetensors.torch.save_file(
        {"x": torch.arange(6).bfloat16().reshape(2, 3), "n": torch.tensor(3)}, tmp_path / "torch.safetensors"
    )
    arrays = tensor_files.read(tmp_path / "torch.safetensors")
    assert_same(arrays, {"x": np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16), "n": np.array(3)})
    tensor_files.write(tmp_path / "ours.safetensors", ARRAYS)
    loaded = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    np.testing.assert_array_equal(loaded["layouts.transposed"], MATRIX.T)


def test_content_decides_and_not_the_name(tmp_path):
    tensor_files.write(tmp_path / "a.safetensors", ARRAYS)
    shutil.move(tmp_path / "a.safetensors", tmp_path / "a.pth")
    assert_same(tensor_files.read(tmp_path / "a.pth"), ARRAYS)
    for name in ("pytorch_model.bin", "checkpoint.pth.tar", "b.safetensors", "none"):
        shutil.copy(DATA / "checkpoint.pth", tmp_path / name)
        assert "teacher.0.weight" in tensor_files.read(tmp_path / name)


def test_data_is_read_only_where_it_is_used(tmp_path):
    """64 GiB that the disk does not hold (a hole in the file) nor any memory would."""
    numbers, path = 2**34, tmp_path / "large.safetensors"
    header = {
        "large": {"dtype": "F32", "shape": [numbers], "data_offsets": [0, 4 * numbers]},
        "small": {"dtype": "F32", "shape": [2], "data_offsets": [4 * numbers, 4 * numbers + 8]},
    }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.seek(4 * numbers, os.SEEK_CUR)
        file.write(np.array([1, 2], np.float32).tobytes())
    arrays = tensor_files.read(path)
    assert arrays["large"].shape == (numbers,)
    assert arrays["large"][-1] == 0
    np.testing.assert_array_equal(arrays["small"], [1, 2])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file: give weights as .safetensors"),
        (b"", "is empty"),
        (b"short", "is not a weights file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), r"is not a weights file \(it begins with b'.x89PNG.*expected weights as"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7\nsize 85\n", "git-lfs pointer.*git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html>Sign in</html>", "is a web page.*download the file itself"),
        (b'<?xml version="1.0"?><Error>AccessDenied</Error>', "is a web page"),
        (b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94.", "is a pickle, but not of torch.save"),
        (b"PK\x03\x04" + bytes(99), "is truncated or damaged, a zip archive without its end"),
        (struct.pack("<Q", 99) + b'{"x":', "is truncated or damaged"),
        (struct.pack("<Q", 2) + b"{}", "holds no named tensors"),
    ],
)
def test_what_is_no_weights_is_said_in_one_line(tmp_path, content, message):
    path = tmp_path / "weights.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        tensor_files.read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UserError, match="a folder, not a file"):
        tensor_files.read(tmp_path)


def test_truncated_safetensors_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    tensor_files.write(path, {"x": MATRIX})
    intact = path.read_bytes()
    for length in (9, 40, len(intact) - 1):
        path.write_bytes(intact[:length])
        with pytest.raises(UserError, match="truncated or damaged"):
            tensor_files.read(path)


def test_a_dtype_without_an_equal_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": np.zeros(4, ml_dtypes.float8_e4m3fn)}, path)
    with pytest.raises(UserError, match="holds 'x' as F8_E4M3: expected one of F64"):
        tensor_files.read(path)


def test_a_write_that_fails_leaves_the_last_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    tensor_files.write(path, {"x": MATRIX})
    with pytest.raises(UserError, match="can't write"):
        tensor_files.write(path, {"x": MATRIX, "name": np.array("vit")})
    assert os.listdir(tmp_path) == ["weights.safetensors"]
    assert_same(tensor_files.read(path), {"x": MATRIX})


def test_what_cannot_be_written_is_said(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"name it \.safetensors, or \.pth"):
        tensor_files.write(tmp_path / "weights.npz", {"x": MATRIX})
    with pytest.raises(UserError, match="is not a folder"):
        tensor_files.write(tmp_path / "absent" / "weights.safetensors", {"x": MATRIX})
    monkeypatch.setitem(sys.modules, "torch", None)  # import torch fails
    with pytest.raises(UserError, match=r"write \.safetensors, or pip install 'dino_jax\[torch\]'"):
        tensor_files.write(tmp_path / "weights.pth", {"x": MATRIX})
    assert os.listdir(tmp_path) == []
