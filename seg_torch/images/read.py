"""Reading images: one loading rule for training, evaluation and prediction."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from seg_torch.errors import InputError, reason
from seg_torch.images.convert import colours, grey_values, orientation_in, upright_rgb
from seg_torch.images.missing import GDAL_NODATA, joined, masked, masked_by_file, unlikely_alpha

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
NOTES = (b"eXIf", b"iTXt", b"tEXt", b"zTXt", b"tIME", b"iCCP", b"pHYs")  # for other programs


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
            with _open(path, content) as image:
                if image.format not in FORMATS:
                    raise UnidentifiedImageError
                check_claim(path, size, image.width * image.height, "pixels")
                yield image
        except UnidentifiedImageError:
            known = f"it is in no format that Pillow knows, or none of {', '.join(FORMATS)}"
            raise ValueError(_tiff_advice(path, content, kind) or known) from None


def _tiff_advice(path: str | Path, content: bytes | None, kind: str) -> str | None:
    """Return what to do about a TIFF file that Pillow does not read, `None` for other files."""
    with suppress(Exception), open(path, "rb") if content is None else BytesIO(content) as file:
        header = file.read(8)
        big = header[:4] in (b"II+\0", b"MM\0+")
        tags = TiffImagePlugin.ImageFileDirectory_v2(header + file.read(8 if big else 0))
        file.seek(tags.next)
        tags.load(file)
        channels, bits = tags.get(277, 1), tags[258][0]
        values = {1: "uint", 2: "int", 3: "float"}[tags.get(339, (1,))[0]] + str(bits)
        found = f"it is a TIFF file of {channels} channels of {values}"
        if kind == "a mask":
            return f"{found}; save masks with one channel of uint8"
        settings = f"data.channels={channels} data.bits={bits if bits in (8, 16) else 16}"
        first = "" if values in ("uint8", "uint16") else "convert it to uint8 or uint16; then "
        return f"{found}; {first}{settings} read the channels as they are"
    return None


def _open(path: str | Path, content: bytes | None = None) -> Image.Image:
    """Open a file, or its content; a PNG whose notes are damaged without them."""
    try:
        image = Image.open(path if content is None else BytesIO(content))
        if image.format == "TIFF":
            # Else Pillow maps the file into memory, with height and width exchanged where it lies.
            image.filename = ""
        return image
    except UnidentifiedImageError:
        content = Path(path).read_bytes() if content is None else content
        sound = b"".join(chunk for chunk in _chunks(content) if not _is_damaged_note(chunk))
        if not content.startswith(PNG_SIGNATURE) or len(sound) + len(PNG_SIGNATURE) == len(content):
            raise
        return Image.open(BytesIO(PNG_SIGNATURE + sound))


def _is_damaged_note(chunk: bytes) -> bool:
    """Whether a chunk of a PNG file is one that changes no pixel, and its checksum is wrong."""
    return chunk[4:8] in NOTES and crc32(chunk[4:-4]).to_bytes(4, "big") != chunk[-4:]


def orientation(path: str | Path) -> int:
    """Return the EXIF orientation of a file by its header, 1 where it says nothing."""
    with suppress(Exception), _open(path) as image:
        # The method of the base class: that of PNG decodes the whole image to look for EXIF data
        # behind the pixels.
        return orientation_in(lambda: Image.Image.getexif(image))
    return 1


def image_size(path: str | Path) -> tuple[int, int] | None:
    """Return (height, width) of an upright image from the header of its file.

    Returns:
        The size that `read_image` most likely gives, or `None` for a file without a readable
        header.
    """
    try:
        with _open(path) as image:
            # As in `orientation`. TIFF files are turned by Pillow itself.
            orientation = orientation_in(lambda: Image.Image.getexif(image))
            lies = orientation in (5, 6, 7, 8) and image.format != "TIFF"
            return (image.width, image.height) if lies else (image.height, image.width)
    except Exception:  # as above; read_image will name the reason
        return None


def read_image(
    path: str | Path, content: bytes | None = None, white: float | None = None
) -> np.ndarray:
    """Read an image file of any format that Pillow reads.

    Args:
        path: Of the file.
        content: Of the file, where it lies in another one; `path` is then for the message.
        white: The value of white in grey of more than 8 bits, see `upright_rgb`.

    Returns:
        The upright image, RGB, uint8 [H, W, 3]; masked where the file says that there are no data.

    Raises:
        InputError: The file is missing, empty, cut off, not an image, or larger than Pillow allows;
            or its values are beyond white.
    """
    with opened(path, content=content) as image:
        pixels = plain_png(image, path, content) if image.mode == "RGB" else None
        if pixels is not None:
            return pixels
        by_file = masked_by_file(image, path if content is None else None)
        image, hidden = upright_rgb(image, white)
        return masked(_as_array(image), joined(hidden, by_file))


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
    return b"".join(chunk for chunk in _chunks(png) if chunk[4:8] != b"IDAT")


def _chunks(png: bytes) -> Iterator[bytes]:
    start = len(PNG_SIGNATURE)
    while start < len(png):
        end = start + 12 + int.from_bytes(png[start : start + 4], "big")
        yield png[start:end]
        start = end


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


class Doubts(NamedTuple):
    """What may be other than a file says, and is no reason to refuse it.

    Attributes:
        orientation: That of its EXIF data, by which it is turned.
        largest: Value of an image of more than 8 bits whose white is assumed to be 65535, else 0.
        band: Why a band that is left out is no transparency, "" where there is none.
    """

    orientation: int = 1
    largest: int = 0
    band: str = ""


def doubts(path: str | Path) -> Doubts:
    """Return the doubts about a file that `read_image` reads; most need its header alone."""
    with suppress(Exception), _open(path) as image:
        orientation = orientation_in(lambda: Image.Image.getexif(image))
        nodata = getattr(image, "tag_v2", {}).get(GDAL_NODATA)
        if image.mode.startswith("I;16") or image.mode == "I":
            return Doubts(orientation, int(grey_values(image, nodata)[0].max(initial=0)))
        stored = str(image.tile[0][3]) if image.tile else ""  # type: ignore[attr-defined]
        # Pillow keeps the upper half of colours of 16 bits.
        largest = 257 * int(colours(image).max(initial=0)) if ";16" in stored else 0
        band = unlikely_alpha(image)
        if "RGBX" in stored:
            band = "the file does not say what it is"
        return Doubts(orientation, largest, band)
    return Doubts()
