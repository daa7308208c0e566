"""Torch's files without torch: what they hold is read right, and what they want run is not run."""

import argparse
import contextlib
import io
import os
import pickle
import struct
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dino_jax.errors import UserError
from dino_jax.weights import tensor_files

DATA = Path(__file__).parent / "data"


def official_checkpoint(torch):
    """A full checkpoint as the official code saves it, of a tiny model and without random numbers."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    net(torch.eye(3)).square().sum().backward()
    optimizer.step()
    for i, parameter in enumerate(net.parameters()):
        parameter.data = torch.arange(float(parameter.numel())).reshape(parameter.shape) + i
    return {
        "student": OrderedDict((f"module.{name}", value) for name, value in net.state_dict().items()),
        "teacher": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small", lr=0.1, output_dir=Path("."), crops=(0.4, 1.0), device=None),
        "dino_loss": OrderedDict(center=torch.full((1, 5), 0.5)),
        "fp16_scaler": {"scale": 65536.0, "_growth_tracker": 0},
    }


# The files were made by torch 2.13 (Linux, x86):
#   torch.save(official_checkpoint(torch), "checkpoint.pth")
#   torch.save(official_checkpoint(torch), "legacy.pth", _use_new_zipfile_serialization=False)
@pytest.mark.parametrize("name", ["checkpoint.pth", "legacy.pth"])
def test_a_full_official_checkpoint_gives_its_tensors(name):
    arrays = tensor_files.read(DATA / name)
    assert list(arrays)[:2] == ["student.module.0.weight", "student.module.0.bias"]
    assert {name.split(".")[0] for name in arrays} == {"student", "teacher", "optimizer", "dino_loss"}
    for model in ("teacher", "student.module"):
        weight = arrays[f"{model}.0.weight"]
        assert weight.dtype == np.float32
        np.testing.assert_array_equal(weight, np.arange(12).reshape(4, 3))
        np.testing.assert_array_equal(arrays[f"{model}.1.bias"], np.arange(4) + 3)
        count = arrays[f"{model}.1.num_batches_tracked"]
        assert (count.dtype, count.shape, count) == (np.int64, (), 1)
    np.testing.assert_array_equal(arrays["dino_loss.center"], np.full((1, 5), 0.5))
    assert arrays["optimizer.state.0.exp_avg"].shape == (4, 3)


def ops(value, protocol=2) -> bytes:
    """The instructions that make a value, to put among others."""
    file = io.BytesIO()
    pickler = pickle.Pickler(file, protocol)
    pickler.fast = True  # without a memo, whose numbers would clash
    pickler.dump(value)
    return file.getvalue()[2:-1]


def storage(kind="FloatStorage", key="0", count=12, view=b"") -> bytes:
    return b"(" + ops("storage") + f"ctorch\n{kind}\n".encode() + ops(key) + ops("cpu") + ops(count) + view + b"tQ"


def tensor(shape, strides, offset=0, data=None) -> bytes:
    arguments = (data or storage()) + ops(offset) + ops(shape) + ops(strides) + b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def named(**tensors: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(ops(name) + value for name, value in tensors.items()) + b"u."


def archive(path, program: bytes, compression=zipfile.ZIP_STORED, **entries: bytes):
    """A file as torch.save makes it, of the pickle `program`; data/0 holds 12 float32 unless entries say otherwise."""
    entries = {"data/0": np.arange(12, dtype=np.float32).tobytes(), "byteorder": b"little"} | entries
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in {"data.pkl": program, **entries}.items():
            file.writestr(f"archive/{name}", data)
    return path


def legacy(path, program: bytes, count=12):
    """A file as torch < 1.6 makes it."""
    start = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    data = struct.pack("<q", count) + np.arange(12, dtype=np.float32).tobytes()
    path.write_bytes(b"".join(pickle.dumps(p, 2) for p in start) + program + pickle.dumps(["0"], 2) + data)
    return path


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("DoubleStorage", np.float64),
        ("HalfStorage", np.float16),
        ("BFloat16Storage", ml_dtypes.bfloat16),
        ("LongStorage", np.int64),
        ("IntStorage", np.int32),
        ("ShortStorage", np.int16),
        ("CharStorage", np.int8),
        ("ByteStorage", np.uint8),
        ("BoolStorage", np.bool_),
    ],
)
def test_dtypes(tmp_path, kind, dtype):
    values = np.array([0, 1, 1, 0, 1]).astype(dtype)
    program = named(x=tensor((5,), (1,), data=storage(kind, count=5)))
    x = tensor_files.read(archive(tmp_path / "x.pth", program, **{"data/0": values.tobytes()}))["x"]
    assert x.dtype == dtype
    np.testing.assert_array_equal(x, values)


def test_views_share_their_storage(tmp_path):
    program = named(
        transposed=tensor((4, 3), (1, 4)),
        column=tensor((3,), (4,), offset=2),
        expanded=tensor((5, 2), (0, 1), offset=10),
        scalar=tensor((), (), offset=7),
        empty=tensor((0, 4), (4, 1)),
        last=tensor((1, 1), (99, 99), offset=11),
    )
    arrays = tensor_files.read(archive(tmp_path / "x.pth", program))
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(arrays["transposed"], base.T)
    np.testing.assert_array_equal(arrays["column"], base[:, 2])
    np.testing.assert_array_equal(arrays["expanded"], [[10, 11]] * 5)
    np.testing.assert_array_equal(arrays["scalar"], np.float32(7))
    np.testing.assert_array_equal(arrays["last"], [[11]])
    assert arrays["scalar"].shape == ()
    assert arrays["empty"].shape == (0, 4)
    assert np.shares_memory(arrays["transposed"], arrays["column"])
    assert not arrays["transposed"].flags.writeable


@pytest.mark.parametrize(
    "reach",
    [
        tensor((13,), (1,)),
        tensor((12,), (1,), offset=1),
        tensor((3, 4), (5, 1)),
        tensor((2,), (2**62,)),
        tensor((5, 2), (2**62, 1)),  # 4 x 2^62 elements are 0 modulo 2^64
        tensor((2**63,), (1,)),
        tensor((2**40, 2**40), (0, 0)),
        tensor((2,), (-1,), offset=1),
        tensor((-2,), (1,)),
        tensor((2,), (1,), offset=-1),
        tensor((2, 2), (1,)),
        tensor((1,) * 65, (1,) * 65),
        tensor((2.0,), (1,)),
        tensor(("2",), (1,)),
        tensor((1,), (1,), data=storage(key="1")),
        tensor((1,), (1,), data=storage(key="../../outside")),
        tensor((1,), (1,), data=storage("DoubleStorage"), offset=6),
        tensor((1,), (1,), data=storage(count=-1)),
        tensor((1,), (1,), data=storage(count=0)),
    ],
)
def test_what_lies_outside_of_a_storage_is_not_read(tmp_path, reach):
    (tmp_path / "outside").write_bytes(bytes(64))
    with pytest.raises(UserError, match="damaged|refused") as error:
        tensor_files.read(archive(tmp_path / "x.pth", named(x=reach)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("count", [13, -1, 2**62])
def test_a_legacy_file_with_wrong_counts_is_refused(tmp_path, count):
    program = named(x=tensor((12,), (1,), data=storage(view=b"N")))
    np.testing.assert_array_equal(tensor_files.read(legacy(tmp_path / "x.pth", program))["x"], np.arange(12))
    with pytest.raises(UserError, match="damaged"):
        tensor_files.read(legacy(tmp_path / "x.pth", program, count))


@pytest.mark.parametrize(
    "other",
    [
        *(
            None,
            True,
            3,
            2**70,
            0.5,
            "text",
            b"bytes",
            1j,
            (1, (2,)),
            [1, [2]],
            {1, 2},
            frozenset([1]),
            {(1, 2): 3, 10**5000: 4},
        ),
        *(np.float64(1.5), np.array([1, 2]), Path("/x"), Counter("ab"), deque([1]), defaultdict(dict, a={"b": 1})),
        argparse.Namespace(lr=0.1, betas=[0.9, 0.999], path=Path("x")),
    ],
    ids=lambda other: type(other).__name__,
)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_is_no_tensor_is_left_out(tmp_path, other, protocol):
    program = named(epoch=ops(other, protocol), x=tensor((12,), (1,)))
    arrays = tensor_files.read(archive(tmp_path / "x.pth", program))
    assert list(arrays) == ["x"]
    np.testing.assert_array_equal(arrays["x"], np.arange(12))


class Call:
    """Pickled, it is a call that unpickling makes."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def chain(module: str, name: str, argument: str) -> bytes:
    """Protocol 4: a dotted name is followed from attribute to attribute."""
    return b"\x80\x04" + ops(module) + ops(name) + b"\x93" + ops(argument) + b"\x85R."


ATTACKS = {
    "os.system": lambda marker: pickle.dumps(Call(os.system, f"touch {marker}"), protocol=2),
    "os.system, nested": lambda marker: pickle.dumps({"teacher": [Call(os.system, f"touch {marker}")]}, protocol=4),
    "eval": lambda marker: pickle.dumps(Call(eval, f"open({str(marker)!r}, 'w')"), protocol=2),
    "exec": lambda marker: pickle.dumps(Call(exec, f"open({str(marker)!r}, 'w')"), protocol=5),
    "open": lambda marker: pickle.dumps(Call(open, str(marker), "w"), protocol=2),
    "getattr": lambda marker: (
        b"\x80\x02cbuiltins\ngetattr\ncos\nsystem\n" + ops("__call__") + b"\x86R" + ops((f"touch {marker}",)) + b"R."
    ),
    "names of a known module": lambda marker: chain("argparse", "_os.system", f"touch {marker}"),
    "names of a known class": lambda marker: chain("argparse", "Namespace.__init__.__globals__", str(marker)),
    "extension": lambda marker: b"\x80\x02\x82\x01.",
    "instance": lambda marker: f"(S'touch {marker}'\nios\nsystem\n.".encode(),
    "object": lambda marker: f"(cos\nsystem\nS'touch {marker}'\no.".encode(),
    "call of a call's result": lambda marker: b"\x80\x02cargparse\nNamespace\n)R" + ops((f"touch {marker}",)) + b"R.",
    "call of a tensor": lambda marker: b"\x80\x02" + tensor((12,), (1,)) + b")R.",
    "data from elsewhere": lambda marker: b"\x80\x02" + ops(("file", str(marker))) + b"Q.",
    "data of no storage": lambda marker: b"\x80\x02(" + ops(("storage",)) + b"cargparse\nNamespace\ntQ.",
    "strange views": lambda marker: b"\x80\x02" + storage(view=ops(("1", 0, 9))) + b".",
    "TorchScript": lambda marker: b"\x80\x02c__torch__\nNet\n)\x81}b.",
}
RUN_BY_PICKLE = {
    "os.system",
    "os.system, nested",
    "eval",
    "exec",
    "open",
    "getattr",
    "names of a known module",
    "instance",
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("layout", [archive, legacy])
def test_no_code_of_a_file_is_run(tmp_path, attack, layout):
    marker = tmp_path / "marker"
    program = ATTACKS[attack](marker)
    if attack in RUN_BY_PICKLE:
        pickle.loads(program)
        marker.unlink()  # so it's a real attack
    with pytest.raises(UserError, match="is refused: its pickle") as error:
        tensor_files.read(layout(tmp_path / "x.pth", program))
    assert "\n" not in str(error.value)
    assert not marker.exists()


def test_the_refused_name_is_told(tmp_path):
    with pytest.raises(UserError, match=rf"x.pth is refused: its pickle wants '{os.system.__module__}.system'"):
        tensor_files.read(archive(tmp_path / "x.pth", pickle.dumps(Call(os.system, "true"), protocol=2)))


@pytest.mark.parametrize(
    "target", [b"cargparse\nNamespace\n)R", b"cargparse\nNamespace\n", b"ccollections\nOrderedDict\n)R"]
)
def test_attributes_set_by_a_file_touch_nothing(tmp_path, target):
    state = ops({"__class__": 1, "__setstate__": 2}) + ops({"__init__": 3, "marker": 4}) + b"\x86"
    tensor_files.read(archive(tmp_path / "x.pth", named(args=target + state + b"b", x=tensor((12,), (1,)))))
    assert not hasattr(argparse.Namespace, "marker")
    assert argparse.Namespace(a=1).a == 1


def test_dicts_without_end_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "MAX_ENTRIES", 5000)
    itself = b"\x80\x02}q\x63" + ops("a") + b"h\x63s."
    with pytest.raises(UserError, match="contains itself"):
        tensor_files.read(archive(tmp_path / "x.pth", itself))
    doubled: dict = {}
    for _ in range(60):
        doubled = {"a": doubled, "b": doubled}
    with pytest.raises(UserError, match="more than 5000 entries"):
        tensor_files.read(archive(tmp_path / "x.pth", pickle.dumps(doubled, 2)))


@pytest.mark.parametrize("make", [archive, legacy])
def test_strides_of_0_cannot_ask_for_all_memory(tmp_path, make):
    """10^8 x 192 copies of one value are 71 GiB; copies of a MiB or less are what torch's expand gives."""
    with pytest.raises(UserError, match="much larger than its data"):
        tensor_files.read(make(tmp_path / "x.pth", named(x=tensor((100_000_000, 192), (0, 0)))))
    assert tensor_files.read(make(tmp_path / "x.pth", named(x=tensor((1000, 192), (0, 0)))))["x"].size == 192_000


def test_a_flipped_bit_of_a_tensor_is_found_by_its_checksum(tmp_path):
    path = archive(tmp_path / "x.pth", named(x=tensor((12,), (1,))))
    data = path.read_bytes()
    at = data.index(np.arange(12, dtype=np.float32).tobytes())
    path.write_bytes(data[: at + 9] + bytes([data[at + 9] ^ 1]) + data[at + 10 :])
    with pytest.raises(UserError, match="checksum"):
        tensor_files.read(path)


def test_files_that_torch_wrote_without_checksums_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"x": torch.arange(12.0)}, tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    np.testing.assert_array_equal(tensor_files.read(tmp_path / "x.pth")["x"], np.arange(12))


def test_two_tensors_of_one_name_are_refused(tmp_path):
    x = tensor((12,), (1,))
    tree = b"\x80\x02}(" + ops("a.b") + x + ops("a") + b"}" + ops("b") + x + b"su."
    with pytest.raises(UserError, match=r"two tensors named 'a\.b'"):
        tensor_files.read(archive(tmp_path / "x.pth", tree))


def test_compressed_archives_are_not_inflated(tmp_path):
    program = named(x=tensor((12,), (1,)))
    bomb = archive(tmp_path / "x.pth", program, zipfile.ZIP_DEFLATED, **{"data/0": bytes(10**7)})
    with pytest.raises(UserError, match="is compressed or encrypted"):
        tensor_files.read(bomb)


def test_other_archives_and_big_endian_files_are_named(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.zeros(3))
    with pytest.raises(UserError, match=r"not of torch.save: it holds 0 data.pkl"):
        tensor_files.read(tmp_path / "x.npz")
    with pytest.raises(UserError, match="big-endian"):
        tensor_files.read(archive(tmp_path / "x.pth", named(x=tensor((12,), (1,))), byteorder=b"big"))


@pytest.mark.parametrize("name", ["checkpoint.pth", "legacy.pth"])
def test_truncated_and_damaged_files_are_one_line(tmp_path, name):
    intact = (DATA / name).read_bytes()
    path = tmp_path / name
    for length in range(1, len(intact), 97):
        path.write_bytes(intact[:length])
        with pytest.raises(UserError, match="truncated or damaged|not a weights file|is a pickle"):
            tensor_files.read(path)
    rng = np.random.default_rng(0)
    for _ in range(200):
        data = bytearray(intact)
        for place in rng.integers(len(data), size=3):
            data[place] = rng.integers(256)
        path.write_bytes(data)
        with contextlib.suppress(UserError):  # anything else fails; a flipped weight can't be noticed
            tensor_files.read(path)


def tensors_of(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from tensors_of(value, f"{prefix}{key}.")
        elif hasattr(value, "stride"):
            yield f"{prefix}{key}", value.detach()


@pytest.mark.parametrize(
    "options",
    [{}, {"pickle_protocol": 4}, {"pickle_protocol": 5}, {"_use_new_zipfile_serialization": False}],
    ids=["zip", "protocol 4", "protocol 5", "legacy"],
)
def test_torchs_own_files_are_read_as_torch_reads_them(tmp_path, options):
    torch = pytest.importorskip("torch")
    base = torch.arange(24.0).reshape(4, 6)
    tied = torch.nn.Parameter(base.clone())
    tied.note = "attributes are saved with a parameter"
    dtypes = ["float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
    checkpoint = official_checkpoint(torch) | {
        "views": {
            **{"base": base, "t": base.T, "column": base[:, 2], "block": base[1:3, ::2], "one": base[3, 3]},
            **{
                "expanded": base[:, :1].expand(4, 9),
                "flipped": base.flip(0),
                "empty": base[:0],
                "none": torch.empty(0),
            },
        },
        "dtypes": {name: torch.arange(7).remainder(2).to(getattr(torch, name)) for name in dtypes},
        "parameters": {"tied": tied, "again": tied},
        "sizes": (base.shape, torch.device("cpu"), torch.float16),
        "numpy": [np.float32(3), np.arange(3)],
    }
    torch.save(checkpoint, tmp_path / "x.pth", **options)
    arrays = tensor_files.read(tmp_path / "x.pth")
    expected = dict(tensors_of(torch.load(tmp_path / "x.pth", weights_only=False)))
    assert list(arrays) == list(expected)
    for name, tensor in expected.items():
        assert str(tensor.dtype) == f"torch.{arrays[name].dtype}", name
        assert arrays[name].strides == tuple(n * tensor.element_size() for n in tensor.stride()) or not tensor.numel()
        bits = arrays[name].view(np.int16) if tensor.dtype == torch.bfloat16 else arrays[name]
        np.testing.assert_array_equal(bits, tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor)
