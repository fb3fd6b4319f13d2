"""Reading images: one loading rule for training, evaluation and prediction."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from seg_torch.errors import InputError, reason

# What counts as an image in a folder. Pillow registers many more suffixes: of videos (.mpg), of
# arrays (.h5, .grib) and of documents (.eps, .pdf), none of which it can read by itself.
IMAGE_SUFFIXES = (
    *(".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)
# What they stand for. Pillow goes by the content, not by the suffix, and would have PostScript run
# by Ghostscript.
FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP"),
)
# Pillow takes memory for the pixels that the header claims, and fills what is missing from some
# formats with grey. A PNG has up to 8,200 pixels in a byte, where they are all black.
LARGE, MOST_PIXELS_PER_BYTE = 1 << 24, 10_000
PNG_SIGNATURE, BIT_DEPTH = b"\x89PNG\r\n\x1a\n", 24  # at the start, and where one byte is
# The names of what can turn a PNG: EXIF data, the same as ImageMagick writes it, and XMP.
MAY_TURN_PNG = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return a Pillow image of any mode as upright 8-bit RGB.

    EXIF orientation is applied; 16-bit and floating-point grey is scaled to 8 bits, not clipped
    (Pillow's own conversion clips); transparency is laid on white; of an animation the current
    frame counts.
    """
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.array(image, np.float32)
        values[~np.isfinite(values)] = 0  # as GeoTIFF marks pixels without a value
        # 16-bit files open as I;16 or, from PNG in some versions, as I: 65535 is white for both.
        # Floats are 0 to 1 by convention; larger values set the range themselves.
        white = 1.0 if image.mode == "F" else 65535.0
        white = max(white, float(values.max(initial=0)))
        np.clip(values, 0, None, out=values)
        values /= white
        values *= 255
        image = Image.fromarray(np.rint(values, out=values).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(background, image)
    return image if image.mode == "RGB" else image.convert("RGB")


@contextmanager
def reading(path: str | Path, kind: str) -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{path}: {error} If you trust it, raise the limit (max_pixels=N of predict and app)"
        ) from None
    except Exception as error:  # there is no end to what damaged files raise
        raise InputError(f"{path}: cannot be read as {kind}: {reason(error)}") from None


def check_claim(path: str | Path, size: int, count: int, unit: str) -> None:
    """Refuse a file of `size` bytes that claims to hold more pixels or values than can be in it."""
    if count > max(LARGE, MOST_PIXELS_PER_BYTE * size):
        raise InputError(
            f"{path}: a file of {size:,} bytes claims to hold {count:,} {unit}; it is damaged, or "
            "made to fill the memory"
        )


@contextmanager
def opened(
    path: str | Path, kind: str = "an image", content: bytes | None = None
) -> Iterator[Image.Image]:
    """Open an image file; whatever goes wrong while it is read becomes an InputError.

    Args:
        path: Of the file.
        kind: What it is to be, for the message.
        content: Of the file, where it lies in another one; `path` is then for the message.

    Raises:
        InputError: The file is missing, empty, cut off, no image of `FORMATS`, or larger than
            Pillow or the size of the file allows.
    """
    with reading(path, kind):
        size = os.path.getsize(path) if content is None else len(content)
        if size == 0:
            raise ValueError("the file is empty")
        try:
            with Image.open(path if content is None else BytesIO(content)) as image:
                if image.format not in FORMATS:
                    raise UnidentifiedImageError
                check_claim(path, size, image.width * image.height, "pixels")
                yield image
        except UnidentifiedImageError:
            known = f"it is in no format that Pillow knows, or none of {', '.join(FORMATS)}"
            raise ValueError(known) from None


def image_size(path: str | Path) -> tuple[int, int] | None:
    """Return (height, width) of an upright image from the header of its file.

    Returns:
        The size that `read_image` most likely gives, or `None` for a file without a readable
        header.
    """
    try:
        with Image.open(path) as image:
            # The method of the base class: that of PNG decodes the whole image to look for EXIF
            # data behind the pixels. TIFF files are turned by Pillow itself.
            orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
            turned = orientation in (5, 6, 7, 8) and image.format != "TIFF"
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception:  # as above; read_image will name the reason
        return None


def stored_size(path: str | Path) -> tuple[int, int] | None:
    """Return (height, width) of an image as it is stored, before EXIF data turn it."""
    with suppress(Exception), Image.open(path) as image:
        return image.height, image.width
    return None


def read_image(path: str | Path, content: bytes | None = None) -> np.ndarray:
    """Read an image file of any format that Pillow reads.

    Args:
        path: Of the file.
        content: Of the file, where it lies in another one; `path` is then for the message.

    Returns:
        The upright image, RGB, uint8 [H, W, 3].

    Raises:
        InputError: The file is missing, empty, cut off, not an image, or larger than Pillow allows.
    """
    with opened(path, content=content) as image:
        pixels = plain_png(image, path, content) if image.mode == "RGB" else None
        return _as_array(upright_rgb(image)) if pixels is None else pixels


def _as_array(image: Image.Image) -> np.ndarray:
    """Return an RGB image as an array; NumPy would hold a large one twice beside Pillow's own."""
    if image.width * image.height <= LARGE:
        return np.array(image)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, 32):
        strip = image.crop((0, top, image.width, min(top + 32, image.height)))
        pixels[top : top + 32] = np.asarray(strip)
    return pixels


def plain_png(
    image: Image.Image, path: str | Path, content: bytes | None = None
) -> np.ndarray | None:
    """Decode an upright opaque PNG of 8-bit RGB or grey with libspng.

    It takes 0.6 of Pillow's time for the same pixels. JPEG files stay with Pillow: other decoders
    gain a third, but read what is cut off or damaged in other ways.

    Args:
        image: The file as Pillow opened it, not yet decoded.
        path: Of the file.
        content: Of the file, where it lies in another one.

    Returns:
        uint8 [H, W, 3] or [H, W]; `None` for any other file, and without the extra "fast".
    """
    decode = _spng_decode()
    if decode is None or image.format != "PNG" or image.mode not in ("RGB", "L"):
        return None
    if "transparency" in image.info:
        return None
    content = Path(path).read_bytes() if content is None else content
    rest = _beside_pixels(content)
    if content[BIT_DEPTH] != 8 or any(name in rest for name in MAY_TURN_PNG):
        return None
    with suppress(Exception):  # Pillow will say what is wrong with the file
        return decode(content)
    return None


def _beside_pixels(png: bytes) -> bytes:
    """Return the chunks of a PNG that hold no pixels: to search those takes as long as a mask."""
    chunks, start = [], len(PNG_SIGNATURE)
    while start < len(png):
        end = start + 12 + int.from_bytes(png[start : start + 4], "big")
        if png[start + 4 : start + 8] != b"IDAT":
            chunks.append(png[start:end])
        start = end
    return b"".join(chunks)


@cache
def _spng_decode() -> Callable[[bytes], np.ndarray] | None:
    try:
        from imagecodecs import spng_decode
    except ImportError:  # the extra "fast" is not installed
        return None
    return spng_decode


@contextmanager
def pixel_limit(pixels: int | None) -> Iterator[None]:
    """Let images of up to so many pixels be read.

    Pillow refuses larger ones because a small file can claim to be an image that fills the memory.
    It also warns of those of half the size, which is of no use here.

    Args:
        pixels: The limit; `None` leaves Pillow's, 179 million.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if pixels is not None:
        Image.MAX_IMAGE_PIXELS = -(-pixels // 2)  # Pillow refuses more than twice that
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit
