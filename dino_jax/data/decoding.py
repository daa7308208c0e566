"""Decoding on the host: from a stored image to pixels, upright, in the wanted channels, dtype and size."""

import io
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from dino_jax.data.array_files import ORIENTATION_TAG, ArrayError, read_array
from dino_jax.data.pixels import WHITE, Pixels
from dino_jax.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # none that runs a program to decode, as EPS does

MAX_PIXELS = 100_000_000  # larger images are refused by their header: a few KB of PNG can unpack to gigabytes

MAX_MEMORY = 600 * 2**20  # bytes that decoding one image may take: 100 megapixels in color, 35 with transparency

# Stored value of white by dtype. Wider integers have none: their full range says nothing about the picture.
IMPLIED = {"uint16": 65_535.0, "float16": 1.0, "float32": 1.0, "float64": 1.0}
STATE_RANGE = "state the values of black and white (--config.data.range, preprocess(range=))"

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # weights of red, green and blue in gray, as in Pillow

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DecodeError(Exception):
    """An image cannot be decoded: it is damaged, truncated, too large or of an unknown format."""


def decode(image: bytes | np.ndarray, pixels: Pixels) -> np.ndarray:
    """Decodes a stored image to `pixels.dtype` [H, W, channels].

    Encoded images (bytes):
    - EXIF orientation is applied; the first frame of animations and multi-page files is used;
    - palette, CMYK, gray and 1-bit images are converted; transparency is composited on white;
    - images of more than MAX_PIXELS are refused by their header, before anything is unpacked;
    - files of arrays are read by `array_files`, with any number of channels; all others have 1 (gray) or 3 (RGB).

    Arrays [H, W] or [H, W, C] may have any C that equals `channels`; gray and RGB are converted into each other.

    Values: 8 bits are 0..255. Of deeper images, `pixels.range` is black to white, and what is outside is clipped.
    Without a range, white is 65,535 (16-bit integers) or 1 (floats); wider integers, and values outside, are refused.

    Raises: DecodeError; UserError if a library is not installed.
    """
    return _stack(_open(image, pixels)[0], pixels)


def to_canvas(image: bytes | np.ndarray, canvas_size: int, pixels: Pixels) -> tuple[np.ndarray, tuple[int, int]]:
    """Puts a stored image on a square, `pixels.dtype` [S, S, channels]; returns it and the original (height, width).

    The image is in the upper left corner, and zeros fill the rest. A side that is longer than S is squeezed to S
    (bicubic with antialiasing); a shorter one keeps its pixels, because every resize makes crops softer. A much larger
    JPEG is decoded at a half, a quarter or an eighth of its size, but not below S, which is several times faster.
    Raises like `decode`.
    """
    bands, size = _open(image, pixels, at_least=canvas_size)
    height, width = (min(side, canvas_size) for side in size)
    squeezed = _stack([_squeeze(band, width, height) for band in bands], pixels)
    if (height, width) == (canvas_size, canvas_size):
        return squeezed, size
    canvas = np.zeros((canvas_size, canvas_size, pixels.channels), pixels.dtype)
    canvas[:height, :width] = squeezed
    return canvas, size


def eval_image(image: bytes | np.ndarray, *, resize: int, crop: int, pixels: Pixels) -> np.ndarray:
    """Resizes the shorter side to `resize` (bicubic) and crops the center: `pixels.dtype` [crop, crop, channels].

    Rounds like torchvision's Resize and CenterCrop. Raises like `decode`, and UserError if crop > resize.
    """
    if crop > resize:
        raise UserError(f"eval.crop {crop} is larger than eval.resize {resize}: set eval.resize to at least {crop}")
    bands, (height, width) = _open(image, pixels)
    short = min(height, width)
    new_width, new_height = int(resize * width / short), int(resize * height / short)
    if new_width * new_height > MAX_PIXELS:
        raise DecodeError(f"{width} x {height} pixels are too elongated to resize")
    left, top = round((new_width - crop) / 2), round((new_height - crop) / 2)
    resized = [band.resize((new_width, new_height), Image.Resampling.BICUBIC) for band in bands]
    return _stack([band.crop((left, top, left + crop, top + crop)) for band in resized], pixels)


def white_of(dtype: np.dtype, pixels: Pixels) -> float:
    """Returns the stored value that becomes white: that of `pixels.range`, else what the dtype implies, else 0."""
    return pixels.range[1] or IMPLIED.get(dtype.newbyteorder("=").name, 0.0)


def is_deep(picture: Image.Image) -> bool:
    """Whether the pixels have more than 8 bits."""
    return picture.mode == "F" or picture.mode.startswith("I")


def _open(
    image: bytes | np.ndarray, pixels: Pixels, at_least: int | None = None
) -> tuple[list[Image.Image], tuple[int, int]]:
    """Returns the decoded image, upright, as Pillow images, and its (height, width).

    One 8-bit image for gray or RGB if `pixels.dtype` is uint8, else one float image per channel, from 0 to 1.
    With `at_least`, a JPEG may be decoded at a smaller size, but no side is below this number of pixels.
    """
    if isinstance(image, np.ndarray):
        return _array_bands(image, pixels), image.shape[:2]
    try:
        if found := read_array(image, pixels, MAX_MEMORY):
            (array, orientation), (height, width) = found, found[0].shape[:2]
            bands = _array_bands(array, pixels)
        else:
            picture, orientation, (height, width) = _open_picture(image, pixels, at_least)
            bands = [picture] if pixels.dtype == "uint8" else _array_bands(np.asarray(picture), pixels)
    except (DecodeError, UserError):
        raise
    except ArrayError as error:
        raise DecodeError(str(error)) from error
    except UnidentifiedImageError as error:
        raise DecodeError(f"not a whole image file of a known format ({', '.join(FORMATS)})") from error
    except Exception as error:  # damaged files can make readers raise anything
        raise DecodeError(f"{type(error).__name__}: {error}") from error
    if orientation in UPRIGHT:
        bands = [band.transpose(UPRIGHT[orientation]) for band in bands]
    return bands, ((width, height) if orientation >= 5 else (height, width))


def _open_picture(image: bytes, pixels: Pixels, at_least: int | None) -> tuple[Any, int, tuple[int, int]]:
    """Returns what Pillow decodes, the orientation, and the stored (height, width).

    It is an 8-bit image in gray or RGB; for canvases of more than 8 bits, a deep image stays an array of its values.
    """
    with Image.open(io.BytesIO(image), formats=FORMATS) as picture:
        if pixels.channels not in (1, 3):
            raise DecodeError(
                f"a {picture.format} is read as 1 or 3 channels, but model.in_channels is {pixels.channels}"
            )
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise DecodeError(f"{width} x {height} pixels are more than the limit of {MAX_PIXELS}")
        if (needed := _memory(picture, pixels.channels)) > MAX_MEMORY:
            raise DecodeError(f"decoding {width} x {height} pixels of {picture.mode} takes {needed >> 20:,} MiB")
        if at_least:
            picture.draft("L" if pixels.channels == 1 else None, (at_least, at_least))
        picture.load()
        orientation = _orientation(picture)
        deep = is_deep(picture) and pixels.dtype != "uint8"
        return np.asarray(picture) if deep else _convert(picture, pixels), orientation, (height, width)


def _memory(picture: Image.Image, channels: int) -> int:
    """Returns the most bytes that decoding takes at a time: Pillow's pixels, and what `_convert` makes of them."""
    own = {"1": 1, "L": 1, "P": 1}.get(picture.mode, 2 if picture.mode.startswith("I;") else 4)
    if is_deep(picture):
        converted = 17  # in float64, rounded, and in 8 bits
    elif picture.has_transparency_data:
        converted = 16  # with alpha, the background, the composite, without alpha
    else:
        converted = 0 if picture.mode == ("L" if channels == 1 else "RGB") else channels + 1
    return picture.width * picture.height * (own + converted)


def _orientation(picture: Image.Image) -> int:
    """Returns the EXIF orientation, 1..8; 1 if there is none or the EXIF is damaged (the pixels may still be good)."""
    try:
        orientation = picture.getexif().get(ORIENTATION_TAG, 1)
    except Exception:
        return 1
    return orientation if orientation in UPRIGHT else 1


def _convert(picture: Image.Image, pixels: Pixels) -> Image.Image:
    """Converts to 8-bit gray or RGB. Pillow's own convert would clip 16-bit and float images to white."""
    if is_deep(picture):
        picture = Image.fromarray(_to_uint8(np.asarray(picture), pixels))
    elif picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    mode = "L" if pixels.channels == 1 else "RGB"
    return picture if picture.mode == mode else picture.convert(mode)


def _array_bands(image: np.ndarray, pixels: Pixels) -> list[Image.Image]:
    """Converts an array [H, W] or [H, W, C] to Pillow images."""
    values = image if image.ndim == 3 else image[..., None]
    depth = values.shape[-1]
    if depth != pixels.channels and not (depth in (1, 3) and pixels.channels in (1, 3)):
        raise DecodeError(f"it has {depth} channels, but model.in_channels is {pixels.channels}")
    if pixels.dtype == "uint8":
        levels = np.ascontiguousarray(_to_uint8(values, pixels))
        if depth in (1, 3):
            return [_convert(Image.fromarray(levels[..., 0] if depth == 1 else levels), pixels)]
        return [Image.fromarray(levels[..., c]) for c in range(depth)]
    unit = _scaled(values, pixels, 1.0).astype(np.float32)
    if depth != pixels.channels:
        unit = unit @ LUMA[:, None] if depth == 3 else np.repeat(unit, 3, axis=2)
    return [Image.fromarray(np.ascontiguousarray(unit[..., c])) for c in range(pixels.channels)]


def _to_uint8(values: np.ndarray, pixels: Pixels) -> np.ndarray:
    """Scales stored values to 0..255."""
    if values.dtype == np.uint8:
        return values
    return np.round(_scaled(values, pixels, 255.0)).astype(np.uint8)


def _scaled(values: np.ndarray, pixels: Pixels, white: float) -> np.ndarray:
    """Scales stored values to 0..`white`. The range follows from dtype and `pixels`, so it is the same for all images.

    Raises DecodeError if the range is unknown, or an implied range does not hold all values.
    """
    if values.dtype in (np.uint8, bool):
        return values * np.float32(white / (255 if values.dtype == np.uint8 else 1))
    low, high = pixels.range
    stated = high > low
    if not stated:
        low, high = 0.0, white_of(values.dtype, pixels)
    if not high > low:
        raise DecodeError(f"{values.dtype} pixels have no range of their own: {STATE_RANGE}")
    least, most = (float(bound(values)) if values.size else low for bound in (np.min, np.max))
    if stated and np.isfinite(least) and np.isfinite(most):
        values = np.clip(values, low, high)
    elif not (least >= low and most <= high):  # also true for NaN
        way_out = "mask what is not finite" if stated else STATE_RANGE
        raise DecodeError(f"{values.dtype} pixels from {least:g} to {most:g} do not fit {low:g}..{high:g}: {way_out}")
    return (values - low if low else values) * (white / (high - low))


def _squeeze(band: Image.Image, width: int, height: int) -> Image.Image:
    if band.size == (width, height):
        return band
    return band.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)


def _stack(bands: list[Image.Image], pixels: Pixels) -> np.ndarray:
    """Stacks Pillow images of one size to `pixels.dtype` [H, W, C]."""
    stacked = np.concatenate([np.atleast_3d(np.asarray(band)) for band in bands], axis=-1)
    if pixels.dtype == "uint8":
        return stacked
    scaled = np.clip(stacked, 0, 1) * np.float32(WHITE[pixels.dtype])  # a bicubic resize overshoots
    return scaled if pixels.dtype == "float32" else np.round(scaled).astype(pixels.dtype)
