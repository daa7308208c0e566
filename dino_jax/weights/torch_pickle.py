"""Reads files of torch.save without torch and without executing code from them.

A pickle is a program, and unpickling it calls the functions that it names. This module has a small interpreter for the
instructions that torch.save writes. It builds dicts, lists, numbers and descriptions of tensors. Names of classes and
functions are looked up in tables and never imported. Nothing from the file is called, hashed, compared or printed,
except the strings and integers that are dict keys.
"""

import io
import math
import mmap
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

STORAGES = {
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
    "torch.UntypedStorage": np.dtype(np.uint8),
    "torch.storage.UntypedStorage": np.dtype(np.uint8),
}
TENSORS = {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"}
PARAMETERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
DICTS = {"collections.OrderedDict", "collections.defaultdict"}
# Other objects in checkpoints (settings, counters, paths): accepted, but omitted from the result.
BUILTINS = ("dict", "list", "set", "frozenset", "int", "float", "complex", "bytearray")
OTHERS = {
    *("argparse.Namespace", "collections.Counter", "collections.deque", "_codecs.encode"),
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in BUILTINS),
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    *(f"torch.{name}" for name in ("Size", "device", "float64", "float32", "float16", "bfloat16", "int64", "int32")),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer", "numpy.dtype", "numpy.ndarray"),
}

LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "STRING", "SHORT_BINSTRING", "BINSTRING"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")  # in the first pickle of a file written by torch < 1.6
MAX_DIMS = 64  # NumPy's limit
SMALL = 1 << 20  # bytes up to which a tensor may be larger than its data, as one made by torch's expand is


class Unreadable(Exception):
    """A file cannot be read. The message is a predicate that follows the file's name."""


@dataclass
class Storage:
    """The data of one or more tensors, as a view of the mapped file."""

    dtype: np.dtype
    data: memoryview = memoryview(b"")
    crc: int = 0  # CRC-32 of all its bytes; 0 if unknown, as in a file that torch wrote without


@dataclass(frozen=True)
class Tensor:
    """A view of a storage. Offset, shape and strides (in elements) come from the file; `array` validates them."""

    storage: Storage
    offset: Any
    shape: Any
    strides: Any

    def array(self) -> np.ndarray:
        """Returns a read-only view of the mapped file.

        Raises Unreadable if the tensor extends beyond its storage, repeats it beyond all use, or its bits are damaged.
        """
        shape, strides, dtype = self.shape, self.strides, self.storage.dtype
        counts = (self.offset, *shape, *strides)
        if len(shape) != len(strides) or len(shape) > MAX_DIMS or not all(type(n) is int and n >= 0 for n in counts):
            raise Unreadable("is damaged: a tensor in it has an impossible shape")
        # Computed with Python integers, because NumPy's own check of strides can overflow.
        last = self.offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if 0 not in shape and (last + 1) * dtype.itemsize > len(self.storage.data):
            raise Unreadable("is damaged: a tensor in it extends beyond its data")
        if math.prod(shape) * dtype.itemsize > max(len(self.storage.data), SMALL):  # by strides of 0
            raise Unreadable("is refused: a tensor in it is much larger than its data")
        if self.storage.crc and zlib.crc32(self.storage.data) != self.storage.crc:
            raise Unreadable("is damaged: the bytes of a tensor in it do not match their checksum: copy it again")
        try:
            if 0 in shape:
                return np.empty(shape, dtype)
            in_bytes = [stride * dtype.itemsize for stride in strides]
            return np.ndarray(shape, dtype, self.storage.data, self.offset * dtype.itemsize, in_bytes)
        except (ValueError, OverflowError) as error:
            raise Unreadable(f"is damaged: a tensor in it has an impossible shape ({error})") from error


@dataclass(frozen=True)
class Global:
    """A class or function that a pickle names and that is in one of the tables."""

    name: str


class Other:
    """Placeholder for an object that is not a tensor."""


EMPTY: dict[str, type] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": Other}


def is_torch_file(data: bytes) -> bool:
    """Returns whether a file that begins with `data` (32 bytes or more) is a zip archive or a torch < 1.6 file."""
    return data.startswith(ZIP_MAGIC) or LEGACY_MAGIC in data[:32]


def read(file: BinaryIO, mapped: mmap.mmap) -> Any:
    """Returns the object passed to torch.save: dicts, lists and tuples, with a `Tensor` for each tensor or parameter.

    Other objects are dropped, except plain numbers and strings. The data of tensors stays in `mapped`, which maps the
    whole file. Headers between the data are read from `file`, because reading them through the mapping would fetch the
    pages around them. Supports both of torch's formats: the zip archive (torch >= 1.6) and the older stream.

    Raises Unreadable if the file is damaged or names a class or function outside of the tables above.
    """
    try:
        return _read_zip(file, mapped) if mapped[:4] == ZIP_MAGIC else _read_legacy(file, mapped)
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise Unreadable("is truncated or damaged, a zip archive without its end: download or copy it again") from error
    except (ValueError, TypeError, LookupError, OverflowError, struct.error) as error:
        raise Unreadable(f"is truncated or damaged ({type(error).__name__}): download or copy it again") from error


def _read_zip(file: BinaryIO, mapped: mmap.mmap) -> Any:
    """Reads a zip archive: ARCHIVE/data.pkl, with the bytes of each storage in ARCHIVE/data/KEY."""
    entries = {info.filename: info for info in zipfile.ZipFile(file).infolist()}
    pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise Unreadable(f"is a zip archive, but not of torch.save: it holds {len(pickles)} data.pkl instead of one")
    folder = pickles[0].removesuffix("data.pkl")

    def entry(name: str) -> memoryview:
        """Returns a view of an entry's bytes. zipfile would copy them, and would inflate a zip bomb."""
        info = entries[name]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise Unreadable("is compressed or encrypted, which torch.save never does: get the original file")
        file.seek(info.header_offset)
        signature, name_length, extra_length = struct.unpack("<4s22x2H", file.read(30))
        start = info.header_offset + 30 + name_length + extra_length
        if signature != ZIP_MAGIC or start + info.file_size > len(mapped):
            raise Unreadable("is truncated or damaged: download or copy it again")
        return memoryview(mapped)[start : start + info.file_size]

    def load(storage: Storage, key: str, size: int) -> Storage:
        name = f"{folder}data/{key}"
        data = entry(name)
        if size * storage.dtype.itemsize < len(data):  # a checksum of all of them says nothing about a part
            return Storage(storage.dtype, data[: size * storage.dtype.itemsize])
        return Storage(storage.dtype, data, entries[name].CRC)

    if f"{folder}byteorder" in entries and bytes(entry(f"{folder}byteorder")) != b"little":
        raise Unreadable("was saved on a big-endian machine: save it again on another")
    return _unpickle(io.BytesIO(entry(pickles[0])), load)


def _read_legacy(file: BinaryIO, mapped: mmap.mmap) -> Any:
    """Reads five pickles (magic, version, machine, object, storage keys), then count and bytes of each storage."""
    storages: dict[str, Storage] = {}

    def load(storage: Storage, key: str, size: int) -> Storage:
        return storages.setdefault(key, storage)

    _, version, machine, tree, keys = (_unpickle(mapped, load) for _ in range(5))
    if version != 1001 or not machine["little_endian"]:
        raise Unreadable("was saved on a big-endian machine, or by a torch before 0.4: save it again with a newer one")
    position = mapped.tell()
    for key in keys:
        file.seek(position)
        start = position + 8
        position = start + struct.unpack("<q", file.read(8))[0] * storages[key].dtype.itemsize
        if not start <= position <= len(mapped):
            raise Unreadable("is truncated or damaged: download or copy it again")
        storages[key].data = memoryview(mapped)[start:position]
    return tree


def _unpickle(file: mmap.mmap | BinaryIO, load: Callable[[Storage, str, int], Storage]) -> Any:
    """Interprets one pickle of a stream; load(empty storage, key, elements) returns the storages it refers to."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop_to_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    argument: Any
    for opcode, argument, _ in pickletools.genops(file):  # type: ignore[arg-type]
        match opcode.name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case name if name in LITERALS:
                stack.append(argument)
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case name if name in EMPTY:
                stack.append(EMPTY[name]())
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                size = int(name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "APPEND":
                _append(stack[-2], [stack.pop()])
            case "APPENDS":
                items = pop_to_mark()
                _append(stack[-1], items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set_items(stack[-1], [key], [value])
            case "SETITEMS":
                items = pop_to_mark()
                _set_items(stack[-1], items[::2], items[1::2])
            case "ADDITEMS":
                pop_to_mark()
            case "FROZENSET":
                pop_to_mark()
                stack.append(Other())
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_global(module, name))
            case "BINPERSID":
                stack.append(_storage(stack.pop(), load))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_rebuild(function, arguments))
            case "BUILD":  # attributes: an OrderedDict's _metadata, a Namespace's settings
                stack.pop()
            case name:
                raise Unreadable(f"is refused: its pickle uses {name}, which torch.save does not")
    return stack.pop()


def _append(target: Any, items: Sequence[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Other):
        raise TypeError


def _set_items(target: Any, keys: Sequence[Any], values: Sequence[Any]) -> None:
    if isinstance(target, dict):
        target.update((key, value) for key, value in zip(keys, values, strict=True) if _is_name(key))
    elif not isinstance(target, Other):
        raise TypeError


def _is_name(key: Any) -> bool:
    """Returns whether a dict key can be part of a tensor's name: a string, or an integer (as in optimizer states)."""
    return isinstance(key, str) or (isinstance(key, int) and abs(key) < 2**63)


def _global(module: Any, name: Any) -> Global:
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError
    full = f"{module}.{name}"
    if any(full in table for table in (STORAGES, TENSORS, PARAMETERS, DICTS, OTHERS)):
        return Global(full)
    raise Unreadable(
        f"is refused: its pickle wants {full[:100]!a}, which could run code; give a file that only holds a state_dict "
        "(if you trust this file, load it with torch and save its state_dict)"
    )


def _storage(reference: Any, load: Callable[[Storage, str, int], Storage]) -> Storage:
    match reference:
        case ("storage", Global(name), str(key), _, int(size), *view) if (
            name in STORAGES and size >= 0 and not any(view)
        ):
            return load(Storage(STORAGES[name]), key, size)
    raise Unreadable("is refused: its pickle refers to data in a way that torch.save does not")


def _rebuild(function: Any, arguments: Any) -> Any:
    """Returns an equivalent of what a call to torch or the standard library would return, without making the call."""
    match function, arguments:
        case Global(name), (Storage() as storage, offset, tuple(shape), tuple(strides), *_) if name in TENSORS:
            return Tensor(storage, offset, shape, strides)
        case Global(name), (Tensor() as tensor, *_) if name in PARAMETERS:
            return tensor
        case Global("collections.OrderedDict"), ():
            return {}
        case Global("collections.defaultdict"), () | (_,):
            return {}
        case Global(name), tuple() if name in OTHERS:
            return Other()
    raise Unreadable("is refused: its pickle makes a call that torch.save does not")
