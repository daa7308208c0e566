"""Decoding on the host: from a stored image to uint8 pixels, upright, in the wanted channels and size."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from dino_jax.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # none that runs a program to decode, as EPS does

MAX_PIXELS = 100_000_000  # larger images are refused by their header: a few KB of PNG can unpack to gigabytes

MAX_MEMORY = 600 * 2**20  # bytes that decoding one image may take: 100 megapixels in color, 35 with transparency

# Level of white by dtype. Wider integers have none: their full range says nothing about the picture.
WHITE = {"uint16": 65_535.0, "float16": 1.0, "float32": 1.0, "float64": 1.0}

ORIENTATION_TAG = 0x0112  # EXIF

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


def decode(image: bytes | np.ndarray, channels: int, white: float = 0.0) -> np.ndarray:
    """Decodes a stored image to uint8 [H, W, channels].

    Encoded images (bytes) have 1 (gray) or 3 (RGB) channels:
    - EXIF orientation is applied; the first frame of animations and multi-page files is used;
    - palette, CMYK, gray and 1-bit images are converted; transparency is composited on white;
    - pixels of more than 8 bits are mapped from 0..`white` to 0..255; `white` 0 stands for 65,535 (16-bit integers) or
      1 (floats), and wider integers are refused without it, as are values beyond the range;
    - images of more than MAX_PIXELS are refused by their header, before anything is unpacked.

    Arrays [H, W] or [H, W, C] may have any C that equals `channels`; gray and RGB are converted into each other.

    Raises: DecodeError; UserError if this kind of image cannot give `channels` channels.
    """
    return _stack(_open(image, channels, white)[0])


def to_canvas(
    image: bytes | np.ndarray, canvas_size: int, channels: int, white: float = 0.0
) -> tuple[np.ndarray, tuple[int, int]]:
    """Puts a stored image on a square, uint8 [S, S, channels]; returns it and the original (height, width).

    The image is in the upper left corner, and zeros fill the rest. A side that is longer than S is squeezed to S
    (bicubic with antialiasing); a shorter one keeps its pixels, because every resize makes crops softer. A much larger
    JPEG is decoded at a half, a quarter or an eighth of its size, but not below S, which is several times faster.
    Raises like `decode`.
    """
    bands, size = _open(image, channels, white, at_least=canvas_size)
    height, width = (min(side, canvas_size) for side in size)
    pixels = _stack([_squeeze(band, width, height) for band in bands])
    if (height, width) == (canvas_size, canvas_size):
        return pixels, size
    canvas = np.zeros((canvas_size, canvas_size, channels), np.uint8)
    canvas[:height, :width] = pixels
    return canvas, size


def eval_image(image: bytes | np.ndarray, *, resize: int, crop: int, channels: int, white: float = 0.0) -> np.ndarray:
    """Resizes the shorter side to `resize` pixels (bicubic) and crops the center: uint8 [crop, crop, channels].

    Rounds like torchvision's Resize and CenterCrop. Raises like `decode`, and UserError if crop > resize.
    """
    if crop > resize:
        raise UserError(f"eval.crop {crop} is larger than eval.resize {resize}: set eval.resize to at least {crop}")
    bands, (height, width) = _open(image, channels, white)
    short = min(height, width)
    new_width, new_height = int(resize * width / short), int(resize * height / short)
    if new_width * new_height > MAX_PIXELS:
        raise DecodeError(f"{width} x {height} pixels are too elongated to resize")
    left, top = round((new_width - crop) / 2), round((new_height - crop) / 2)
    resized = [band.resize((new_width, new_height), Image.Resampling.BICUBIC) for band in bands]
    return _stack([band.crop((left, top, left + crop, top + crop)) for band in resized])


def levels(image: bytes | np.ndarray, white: float = 0.0) -> tuple[float, float] | None:
    """Returns (brightest value, level of white) of an image of more than 8 bits that `decode` accepts; else None."""
    if isinstance(image, bytes):
        with Image.open(io.BytesIO(image), formats=FORMATS) as picture:
            if not _is_wide(picture):
                return None
            image = np.asarray(picture)
    if image.dtype in (np.uint8, bool):
        return None
    return float(image.max(initial=0)), white or WHITE[image.dtype.newbyteorder("=").name]


def _is_wide(picture: Image.Image) -> bool:
    """Whether the pixels have more than 8 bits."""
    return picture.mode == "F" or picture.mode.startswith("I")


def _open(
    image: bytes | np.ndarray, channels: int, white: float, at_least: int | None = None
) -> tuple[list[Image.Image], tuple[int, int]]:
    """Returns the decoded image as Pillow images, one for gray and RGB, else one per channel; and its (height, width).

    With `at_least`, a JPEG may be decoded at a smaller size, but no side is below this number of pixels.
    """
    if isinstance(image, np.ndarray):
        return _array_bands(image, channels, white), image.shape[:2]
    if channels not in (1, 3):
        raise UserError(f"model.in_channels={channels}: encoded images have 1 channel (gray) or 3 (RGB)")
    try:
        with Image.open(io.BytesIO(image), formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise DecodeError(f"{width} x {height} pixels are more than the limit of {MAX_PIXELS}")
            if (needed := _memory(picture, channels)) > MAX_MEMORY:
                raise DecodeError(f"decoding {width} x {height} pixels of {picture.mode} takes {needed >> 20:,} MiB")
            if at_least:
                picture.draft("L" if channels == 1 else None, (at_least, at_least))
            picture.load()
            orientation = _orientation(picture)
            upright = _convert(picture, channels, white)
    except DecodeError:
        raise
    except UnidentifiedImageError as error:
        raise DecodeError(f"not a whole image file of a known format ({', '.join(FORMATS)})") from error
    except Exception as error:  # damaged files can make Pillow raise anything
        raise DecodeError(f"{type(error).__name__}: {error}") from error
    if orientation in UPRIGHT:
        upright = upright.transpose(UPRIGHT[orientation])
    return [upright], ((width, height) if orientation >= 5 else (height, width))


def _memory(picture: Image.Image, channels: int) -> int:
    """Returns the most bytes that decoding takes at a time: Pillow's pixels, and what `_convert` makes of them."""
    own = {"1": 1, "L": 1, "P": 1}.get(picture.mode, 2 if picture.mode.startswith("I;") else 4)
    if _is_wide(picture):
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


def _convert(picture: Image.Image, channels: int, white: float = 0.0) -> Image.Image:
    """Converts to 8-bit gray or RGB. Pillow's own convert would clip 16-bit and float images to white."""
    if _is_wide(picture):
        picture = Image.fromarray(_to_uint8(np.asarray(picture), white))
    elif picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    mode = "L" if channels == 1 else "RGB"
    return picture if picture.mode == mode else picture.convert(mode)


def _array_bands(image: np.ndarray, channels: int, white: float) -> list[Image.Image]:
    """Converts an array [H, W] or [H, W, C] to Pillow images."""
    pixels = np.ascontiguousarray(_to_uint8(image if image.ndim == 3 else image[..., None], white))
    depth = pixels.shape[-1]
    if depth in (1, 3) and channels in (1, 3):
        return [_convert(Image.fromarray(pixels[..., 0] if depth == 1 else pixels), channels)]
    if depth != channels:
        raise UserError(f"model.in_channels={channels}, but the images have {depth} channels")
    return [Image.fromarray(pixels[..., c]) for c in range(depth)]


def _to_uint8(values: np.ndarray, white: float) -> np.ndarray:
    """Maps 0..white to 0..255. The range follows from the dtype and `white` only, so it is the same for all images."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    high = white or WHITE.get(values.dtype.newbyteorder("=").name, 0.0)
    if not high:
        raise DecodeError(
            f"{values.dtype} pixels have no range of their own: state their level of white (--config.data.white, "
            "preprocess(white=))"
        )
    least, most = values.min(initial=0), values.max(initial=0)
    if not (least >= 0 and most <= high):  # also true for NaN
        raise DecodeError(
            f"{values.dtype} pixels from {least:g} to {most:g} do not fit 0..{high:g}: state their level of "
            "white (--config.data.white, preprocess(white=))"
        )
    return np.round(values * (255 / high)).astype(np.uint8)


def _squeeze(band: Image.Image, width: int, height: int) -> Image.Image:
    if band.size == (width, height):
        return band
    return band.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)


def _stack(bands: list[Image.Image]) -> np.ndarray:
    """Stacks Pillow images of one size to uint8 [H, W, C]."""
    return np.concatenate([np.atleast_3d(np.asarray(band)) for band in bands], axis=-1)
