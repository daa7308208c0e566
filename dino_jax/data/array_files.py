"""Files whose pixels are arrays: .npy, .npz, TIFFs of many channels, color of 16 bits (Pillow has only 8), DICOM."""

import io
import zipfile
from math import prod
from typing import Any

import numpy as np

from dino_jax.data.pixels import Pixels
from dino_jax.errors import UserError, missing_extras

NPY, NPZ, PNG = b"\x93NUMPY", b"PK\x03\x04", b"\x89PNG\r\n\x1a\n"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PNG_DEPTH, PNG_COLOR = 24, 25  # places of these bytes in a PNG's header
COLOR_TYPES = (2, 6)  # RGB, RGB with alpha
ORIENTATION_TAG = 274  # tag of TIFF and EXIF
DICOM, DICOM_AT = b"DICM", 128  # and its place in the file
ONE_ARRAY = "image"  # name of the pixels in a .npz file that holds several arrays


class ArrayError(Exception):
    """The file cannot be read as an array of pixels."""


def read_array(content: bytes, pixels: Pixels, max_bytes: int) -> tuple[np.ndarray, int] | None:
    """Returns the pixels [H, W, C] and the orientation (EXIF, 1 to 8) of a file, or None if Pillow reads all it holds.

    - .npy, and .npz with one array or one named "image": [H, W], [H, W, C] or [C, H, W];
    - TIFF, unless 1 or 3 channels of 8 bits are wanted: the first series, its channels interleaved, planes or pages;
    - PNG in color of 16 bits, unless 8 are wanted;
    - DICOM: the first frame, see `_dicom`.

    Raises: ArrayError; UserError if a library that such files need is not installed.
    """
    plain = pixels.channels in (1, 3) and pixels.dtype == "uint8"
    orientation = 1
    if content.startswith(NPY):
        array = _npy(content, max_bytes)
    elif content.startswith(NPZ):
        array = _npz(content, max_bytes)
    elif content.startswith(TIFF) and not plain:
        array, orientation = _tiff(content, max_bytes)
    elif content.startswith(PNG) and content[PNG_DEPTH] == 16 and content[PNG_COLOR] in COLOR_TYPES and not plain:
        array = _png(content, max_bytes)
    elif content[DICOM_AT : DICOM_AT + len(DICOM)] == DICOM:
        array = _dicom(content, pixels, max_bytes)
    else:
        return None
    return _channels_last(array, pixels.channels), orientation


def _npy(content: bytes, max_bytes: int) -> np.ndarray:
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}.get(version[0])
    if read_header is None:
        raise ArrayError(f".npy files of version {version[0]} hold no pixels")
    shape, _, dtype = read_header(file)
    _check_size(prod(shape) * dtype.itemsize, max_bytes)
    return np.load(io.BytesIO(content), allow_pickle=False)


def _npz(content: bytes, max_bytes: int) -> np.ndarray:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {member.filename: member for member in archive.infolist()}
        name = next(iter(members)) if len(members) == 1 else f"{ONE_ARRAY}.npy"
        if name not in members:
            raise ArrayError(f"none of its {len(members)} arrays is named {ONE_ARRAY}: {', '.join(members)[:80]}")
        _check_size(members[name].file_size, max_bytes)  # compressed, it may be much smaller
        return _npy(archive.read(name), max_bytes)


def _tiff(content: bytes, max_bytes: int) -> tuple[np.ndarray, int]:
    with missing_extras():
        import tifffile
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        series = file.series[0]
        _check_size(prod(series.shape) * series.dtype.itemsize, max_bytes)
        try:
            array = series.asarray(maxworkers=1)
        except ValueError as error:
            if "imagecodecs" in str(error):
                raise UserError("imagecodecs is not installed: pip install 'dino_jax[bands]'") from error
            raise
        tag = series.keyframe.tags.get(ORIENTATION_TAG)
        return _yxc(array, series.axes), int(tag.value) if tag else 1


def _png(content: bytes, max_bytes: int) -> np.ndarray:
    with missing_extras():
        import imagecodecs
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    _check_size(width * height * 8, max_bytes)
    return imagecodecs.png_decode(content)[..., :3]


def _dicom(content: bytes, pixels: Pixels, max_bytes: int) -> np.ndarray:
    """Returns the first frame; colors as they are, gray as float32.

    Gray values are rescaled (to Hounsfield units in CT). With `pixels.range` they stay in these units. Otherwise the
    window in the file, or what its bits can hold, is black to white, 0 to 1. MONOCHROME1 is inverted.
    """
    with missing_extras():
        import pydicom
    tools: Any = pydicom.pixels
    file = pydicom.dcmread(io.BytesIO(content))
    _check_size(file.Rows * file.Columns * file.SamplesPerPixel * 8, max_bytes)
    try:
        array = tools.pixel_array(file, index=0)
    except (RuntimeError, NotImplementedError) as error:
        syntax = file.file_meta.TransferSyntaxUID.name
        raise ArrayError(f"{syntax} needs a decoder: pip install pylibjpeg pylibjpeg-libjpeg") from error
    if array.ndim == 3:
        return array
    values = tools.apply_modality_lut(array, file).astype(np.float32)
    low, high = pixels.range
    if low == high:
        if "WindowCenter" in file:
            values = tools.apply_windowing(values, file)
        slope, intercept = float(file.get("RescaleSlope", 1)), float(file.get("RescaleIntercept", 0))
        held = np.array([0, 2**file.BitsStored - 1]) - (2 ** (file.BitsStored - 1) if file.PixelRepresentation else 0)
        black, white = held * slope + intercept
        values = np.clip((values - black) / (white - black), 0, 1).astype(np.float32)
        low, high = 0.0, 1.0
    return low + high - values if file.PhotometricInterpretation == "MONOCHROME1" else values


def _yxc(array: np.ndarray, axes: str) -> np.ndarray:
    """Moves the one axis that is neither Y nor X, if it has more than one element, to the end."""
    kept = [(axis, size) for axis, size in zip(axes, array.shape, strict=True) if size > 1 or axis in "YX"]
    names = "".join(axis for axis, _ in kept)
    channels = names.replace("Y", "").replace("X", "")
    if len(channels) > 1 or names.replace(channels, "") != "YX":
        raise ArrayError(f"axes {axes} of {array.shape} are not those of one image with channels")
    image = array.reshape([size for _, size in kept])
    return np.moveaxis(image, names.index(channels), -1) if channels else image


def _channels_last(array: np.ndarray, channels: int) -> np.ndarray:
    """Returns [H, W, C] of [H, W], [H, W, C] or [C, H, W].

    The number of channels tells the last two apart; if it is not known, 0, the first axis is that of the channels if it
    is the shortest.
    """
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3:
        raise ArrayError(f"an array {list(array.shape)} is no image: [H, W], [H, W, C] or [C, H, W] is needed")
    first = array.shape[0] == channels if channels else array.shape[0] < min(array.shape[1:])
    if array.shape[2] != channels and first:
        array = np.moveaxis(array, 0, 2)
    return array


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise ArrayError(f"decoding its pixels takes {size >> 20:,} MiB, more than the limit of {max_bytes >> 20:,}")
