"""Pixels of an image that hold no data, and what a file says about them.

An image without such pixels is an array; one with them is a masked array of NumPy, as rasterio has
it, whose mask is true there.
"""

import os
import re
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

GDAL_METADATA, GDAL_NODATA = 42112, 42113
# Of a page of a TIFF file: a smaller copy of another one, or the mask of one.
KIND, COPY, MASK = 254, 1, 4
# Masks within a TIFF file are of a kind that Pillow does not know: ones where there are data.
for order in (b"II", b"MM"):
    TiffImagePlugin.OPEN_INFO.setdefault((order, MASK, (1,), 1, (1,), ()), ("1", "1"))
    TiffImagePlugin.OPEN_INFO.setdefault((order, MASK, (1,), 1, (8,), ()), ("L", "L"))
# Values of a fourth band that is no transparency; what is transparent has few, or mostly 0 and 255.
MANY_VALUES = 16


def masked(pixels: np.ndarray, missing: np.ndarray | None) -> np.ndarray:
    """Return an image [H, W, C] as a masked array where `missing`, bool [H, W], is ever true."""
    if missing is None or not missing.any():
        return pixels
    return np.ma.MaskedArray(pixels, np.broadcast_to(missing[..., None], pixels.shape))


def missing(image: np.ndarray) -> np.ndarray | None:
    """Return where an image [H, W, C] has data in no channel, bool [H, W]; `None`: nowhere."""
    mask = np.ma.getmask(image)
    if mask is np.ma.nomask:
        return None
    found: np.ndarray = np.all(mask, axis=2)
    return found if found.any() else None


def joined(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    """Return where either is true."""
    if first is None or second is None:
        return second if first is None else first
    return first | second


def is_nodata(pixels: np.ndarray, text: Any) -> np.ndarray | None:
    """Return where pixels [H, W] or [H, W, C] have GDAL's no-data value in all channels.

    Args:
        pixels: As they are stored.
        text: Of the tag, `None` where there is none.
    """
    try:
        value = float(str(text).strip(" \0"))
    except ValueError:
        return None
    found: np.ndarray
    if np.isnan(value):
        found = np.isnan(pixels) if pixels.dtype.kind == "f" else np.zeros(pixels.shape, bool)
    else:
        with np.errstate(over="ignore"):
            found = pixels == (np.float32(value) if pixels.dtype == np.float32 else value)
    return found if found.ndim == 2 else np.all(found, axis=2)


def masked_by_file(image: Image.Image, path: Any = None) -> np.ndarray | None:
    """Return where the mask of a TIFF file says that there are no data, bool [H, W].

    Args:
        image: The file as Pillow opened it, not yet decoded.
        path: Of the file, beside which another one with the mask may lie: `scene.tif.msk`.
    """
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return None
    found, number, size = None, 1, image.size
    try:
        while found is None:
            image.seek(number)
            kind = image.tag_v2.get(KIND, 0)
            if kind & MASK and image.size == size:
                found = np.array(image) == 0
            elif not kind & (COPY | MASK):
                break  # an image of its own
            number += 1
    except EOFError:
        pass
    except SyntaxError:
        pass  # a page that Pillow does not know
    image.seek(0)
    if found is None and path is not None and os.path.exists(f"{path}.msk"):
        with Image.open(f"{path}.msk") as mask:
            found = np.array(mask) == 0
    return found


def unlikely_alpha(image: Image.Image) -> str:
    """Return why the last band of an image is no transparency; "" where it may be.

    GDAL marks the fourth band of a TIFF file as transparency unless it is told what it is.
    """
    if image.format != "TIFF" or image.mode not in ("RGBA", "LA"):
        return ""
    bands = len(image.getbands())
    metadata = str(image.tag_v2.get(GDAL_METADATA, ""))  # type: ignore[attr-defined]
    name = re.search(rf'sample="{bands - 1}" role="description">([^<]+)', metadata)
    if name and not re.search("alpha|mask|opa|transp", name[1], re.IGNORECASE):
        return f"its name is {name[1]!r}"
    pixels = np.asarray(image)
    coloured = pixels[..., :-1].any(axis=2)  # the border of a scene is black, whatever the band is
    counts = np.bincount(pixels[..., -1][coloured], minlength=256)
    if not counts[1:].any() and counts[0]:
        return "it is 0 everywhere"
    values, share = np.count_nonzero(counts), counts[1:255].sum() / max(1, counts.sum())
    if values > MANY_VALUES and share > 0.5:
        return f"it has {values} values, {100 * share:.0f} % of its pixels neither 0 nor 255"
    return ""
