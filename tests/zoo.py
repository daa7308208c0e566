"""A folder of images as they are found in the world, each with what the pipeline is meant to make of it.

`USED` maps a file's name to (its bytes, the pixels that it stands for, their tolerance in levels), `BAD` to (its bytes,
words of the reason), and `put_in_folder` adds what is not in a file's bytes: links, pipes, folders.
"""

import io
import os
import struct
import zlib

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 48, 64


def photo(seed=0):
    """A smooth color picture, uint8 [HEIGHT, WIDTH, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


def encoded(image, format="PNG", **options):
    """The bytes of a file of an array or a Pillow image."""
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def rotated(pixels):
    """A JPEG whose EXIF says that its first row is the right side of the picture."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(np.ascontiguousarray(np.rot90(pixels)), "JPEG", quality=95, exif=exif)


def on_white(pixels, alpha):
    return np.round(pixels * (alpha / 255) + 255 * (1 - alpha / 255)).astype(np.uint8)


def png(width, height, depth, color, rows):
    """A PNG of what Pillow does not write: `rows` compressed, each behind a byte 0."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def bomb(side=13_000):
    """side x side black pixels of one bit in 20 KB, sound in every way."""
    packer, row = zlib.compressobj(9), bytes(1 + side // 8)
    return png(side, side, 1, 0, b"".join(packer.compress(row) for _ in range(side)) + packer.flush())


def deep_colors(pixels):
    """RGB of 16 bits a channel."""
    rows = b"".join(b"\0" + (row.astype(">u2") * 257).astype(">u2").tobytes() for row in pixels)
    return png(pixels.shape[1], pixels.shape[0], 16, 2, zlib.compress(rows))


PHOTO = photo()
OTHER = Image.fromarray(photo(1))
GRAY = PHOTO[..., 0]
DEEP = np.linspace(0, 65535, GRAY.size, dtype=np.uint16).reshape(GRAY.shape)
FLOAT = np.linspace(0, 1, GRAY.size, dtype=np.float32).reshape(GRAY.shape)
STRIP = np.tile(photo()[:1], (1, 79, 1))[:, :5000]
ALPHA = np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))
PALETTE = Image.fromarray(PHOTO).quantize(16)
PALETTE_ALPHA = bytes(range(0, 256, 16))
JPEG = encoded(PHOTO, "JPEG", quality=95)
FRAMES = {"save_all": True, "append_images": [OTHER]}

USED = {
    "plain.jpg": (JPEG, PHOTO, 3),
    "progressive.jpg": (encoded(PHOTO, "JPEG", quality=95, progressive=True), PHOTO, 3),
    "gray.jpg": (encoded(GRAY, "JPEG", quality=95), GRAY, 3),
    "cmyk.jpg": (encoded(Image.fromarray(PHOTO).convert("CMYK"), "JPEG", quality=95), PHOTO, 3),
    "cmyk.tif": (encoded(Image.fromarray(PHOTO).convert("CMYK"), "TIFF"), PHOTO, 1),
    "palette.png": (encoded(PALETTE), np.asarray(PALETTE.convert("RGB")), 0),
    "palette_transparency.png": (
        encoded(PALETTE, transparency=PALETTE_ALPHA),
        on_white(np.asarray(PALETTE.convert("RGB")), np.take(list(PALETTE_ALPHA), np.asarray(PALETTE))[..., None]),
        1,
    ),
    "transparent.png": (encoded(np.dstack([PHOTO, ALPHA])), on_white(PHOTO, ALPHA[..., None]), 1),
    "gray_transparent.png": (
        encoded(Image.fromarray(np.dstack([GRAY, ALPHA]), "LA")),
        on_white(GRAY, ALPHA),
        1,
    ),
    "16_bit.png": (encoded(DEEP), np.round(DEEP / 257), 0),
    "16_bit.tif": (encoded(DEEP, "TIFF"), np.round(DEEP / 257), 0),
    "float.tif": (encoded(FLOAT, "TIFF"), FLOAT * 255, 1),
    "16_bit_colors.png": (deep_colors(PHOTO), PHOTO, 1),
    "1_bit.png": (encoded(GRAY > 100), (GRAY > 100) * 255, 0),
    "1_bit.tif": (encoded(Image.fromarray(GRAY > 100), "TIFF", compression="group4"), (GRAY > 100) * 255, 0),
    "rotated.jpg": (rotated(PHOTO), PHOTO, 3),
    "animated.gif": (encoded(PALETTE.convert("RGB"), "GIF", **FRAMES), np.asarray(PALETTE.convert("RGB")), 0),
    "animated.webp": (encoded(PHOTO, "WEBP", lossless=True, **FRAMES), PHOTO, 0),
    "pages.tif": (encoded(PHOTO, "TIFF", **FRAMES), PHOTO, 0),
    "phone.jpg": (encoded(PHOTO, "MPO", quality=95, **FRAMES), PHOTO, 3),
    "strip.png": (encoded(STRIP), STRIP, 0),
    "tower.png": (encoded(np.ascontiguousarray(STRIP.swapaxes(0, 1))), STRIP.swapaxes(0, 1), 0),
    "pixel.png": (encoded(PHOTO[:1, :1]), PHOTO[:1, :1], 0),
    "png_inside.jpg": (encoded(PHOTO), PHOTO, 0),
    "LOUD.JPG": (JPEG, PHOTO, 3),
    "trailing_bytes.jpg": (JPEG + b"and more", PHOTO, 3),
    "scrambled.jpg": (JPEG[:-300] + bytes(40) + JPEG[-260:], PHOTO, 255),  # nothing in the format tells
    "damaged_exif.jpg": (encoded(PHOTO, "JPEG", quality=95, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff?"), PHOTO, 3),
    "Gemüse 図 🦖.png": (encoded(PHOTO), PHOTO, 0),
    "two\nlines.png": (encoded(PHOTO), PHOTO, 0),
    os.fsdecode(b"latin-\xe9.png"): (encoded(PHOTO), PHOTO, 0),
    "twin_a.png": (encoded(photo(2)), photo(2), 0),
    "twin_b.png": (encoded(photo(2)), photo(2), 0),
}
BAD = {
    "truncated.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "end_missing.jpg": (JPEG[:-20], "truncated"),
    "truncated.png": (encoded(PHOTO)[:-200], "truncated"),
    "truncated.gif": (encoded(PALETTE, "GIF")[:200], "truncated"),
    "truncated.webp": (encoded(PHOTO, "WEBP")[:200], "decoder"),
    "truncated.tif": (encoded(PHOTO, "TIFF")[:-200], "truncated"),
    "damaged.png": (encoded(PHOTO)[:300] + bytes(3) + encoded(PHOTO)[303:], "stream"),
    "zero_bytes.jpg": (b"", "not a whole image file"),
    "text.jpg": (b"<html>404 Not Found</html>", "not a whole image file"),
    "header_only.gif": (b"GIF89a" + struct.pack("<HHBBB", 64, 48, 0, 0, 0) + b";", "not a whole image file"),
    "32_bit.tif": (encoded(DEEP.astype(np.int32) * 1000, "TIFF"), "int32 pixels have no range"),
    "bomb.png": (bomb(), "13000 x 13000 pixels are more than"),
}
NO_ACCESS = "no_access.png"  # a sound image that may not be read
LINKED_NOWHERE = ("dangling.png", "circle.png")


def put_in_folder(root):
    """Fills a folder, and returns the names of what is to be used and of what is to be replaced."""
    for name, (data, *_) in (USED | BAD).items():
        (root / name).write_bytes(data)
    (root / NO_ACCESS).write_bytes(encoded(PHOTO))
    (root / NO_ACCESS).chmod(0)
    (root / "dangling.png").symlink_to("gone.png")
    (root / "circle.png").symlink_to("circle.png")
    (root / "around").symlink_to(root)
    (root / "empty").mkdir()
    (root / "folder.jpg").mkdir()
    os.mkfifo(root / "pipe.png")
    (root / "to_pipe.png").symlink_to("pipe.png")
    (root / ".hidden.png").write_bytes(b"left by an editor")
    return sorted(USED), sorted([*BAD, NO_ACCESS, *LINKED_NOWHERE])
