"""Pillow images of any mode: turned upright, and as RGB of 8 bits."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from seg_torch.images.missing import GDAL_NODATA, is_nodata, joined, unlikely_alpha

# By EXIF orientation; 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright(image: Image.Image) -> Image.Image:
    """Return a Pillow image turned as its EXIF data say."""
    image.load()  # Pillow turns TIFF files by itself
    orientation = orientation_in(image.getexif)
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def orientation_in(exif: Callable[[], Image.Exif]) -> int:
    """Return the orientation in what reads EXIF data, 1 where they are missing or damaged."""
    with suppress(Exception):  # every viewer shows an image whose EXIF data are damaged
        return exif().get(ExifTags.Base.Orientation, 1)
    return 1


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return pixels [H, W, ...] that are stored with an EXIF orientation as they are seen."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return np.ascontiguousarray(pixels[rows, columns])


def upright_rgb(
    image: Image.Image, white: float | None = None
) -> tuple[Image.Image, np.ndarray | None]:
    """Convert a Pillow image of any mode to upright 8-bit RGB.

    EXIF orientation is applied; grey of more than 8 bits is scaled to 8, not clipped (Pillow's own
    conversion clips); transparency is laid on white, unless it is another band that the file calls
    so; of an animation the current frame counts.

    Args:
        image: The image.
        white: The value of white in grey of more than 8 bits; by default 65535, and 1 of floats.

    Returns:
        The image, and where it holds no data, bool [H, W]: GDAL's no-data value, no number, or
        wholly transparent; `None` where all are data.

    Raises:
        ValueError: Without `white`, values beyond it.
    """
    nodata = getattr(image, "tag_v2", {}).get(GDAL_NODATA)
    image = upright(image)
    hidden = None if nodata is None else is_nodata(colours(image), nodata)
    if is_deep(image):
        values, undefined = grey_values(image, nodata)
        hidden, image = joined(hidden, undefined), Image.fromarray(_to_bytes(values, white, image))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        if unlikely_alpha(image):
            return image.convert("RGB"), hidden
        image = image.convert("RGBA")
        hidden = joined(hidden, np.asarray(image.getchannel("A")) == 0)
        background = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(background, image)
    return image if image.mode == "RGB" else image.convert("RGB"), hidden


def is_deep(image: Image.Image) -> bool:
    """Whether an image is grey of more than 8 bits."""
    return image.mode.startswith("I;16") or image.mode in ("I", "F")


def colours(image: Image.Image) -> np.ndarray:
    """Return the pixels without transparency, as they are stored."""
    pixels = np.asarray(image)
    return pixels[..., :-1] if image.mode in ("RGBA", "LA", "PA") else pixels


def grey_values(image: Image.Image, nodata: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Return grey as float32, 0 where there are no data, and where that is."""
    values = np.array(image, np.float32)
    transparent = image.info.get("transparency")  # of a PNG file: a value
    hidden = joined(~np.isfinite(values), is_nodata(values, nodata))
    hidden = joined(hidden, values == transparent if isinstance(transparent, int) else None)
    values[hidden] = 0
    return values, hidden


def _to_bytes(values: np.ndarray, white: float | None, image: Image.Image) -> np.ndarray:
    """Return grey, float32, as uint8; all of what is brighter than `white` is white."""
    # 16-bit files open as I;16 or, from PNG in some versions, as I. Of floats from 0 to 1 the
    # brightest may be somewhat above.
    usual, most = (1.0, 2.0) if image.mode == "F" else (65535.0, 65535.0)
    largest = float(values.max(initial=0))
    if white is None and largest > most:
        raise ValueError(
            f"its values reach {largest:g}, and white is {usual:g}: say what it is, such as "
            f"data.white={likely_white(largest):g}, when training, or scale the values"
        )
    np.clip(values, 0, white or usual, out=values)
    values *= 255 / (white or usual)
    return np.rint(values, out=values).astype(np.uint8)


def likely_white(largest: float) -> float:
    """Return what white probably is where values reach `largest`: that of 8, 10, 12, 14 bits."""
    return next((float(2**bits - 1) for bits in (8, 10, 12, 14, 16) if largest < 2**bits), largest)
