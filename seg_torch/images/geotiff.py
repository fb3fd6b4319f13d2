"""TIFF files: their channels as they are stored, and masks that keep their place on earth."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from seg_torch.errors import InputError, require
from seg_torch.images.read import check_claim, reading
from seg_torch.labels import Labels

SUFFIXES = (".tif", ".tiff")
# ModelPixelScale, ModelTiepoint, ModelTransformation and the three of GeoKeys.
GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)
GDAL_NODATA = 42113


def read_tiff(path: Path) -> np.ndarray:
    """Return the channels of a TIFF file, [H, W, C], whatever their order in the file.

    Raises:
        InputError: The file cannot be read, or claims to hold more than its size allows.
    """
    with _series(path) as series:
        height, width = _height_width(series)
        check_claim(path, os.path.getsize(path), int(np.prod(series.shape)), "values")
        if Image.MAX_IMAGE_PIXELS and height * width > 2 * Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"{height * width:,} pixels.")
        axes = [series.axes.index(axis) for axis in "YX"]
        image = np.moveaxis(series.asarray(), axes, (0, 1))
    return image.reshape(height, width, -1)


def tiff_size(path: Path) -> tuple[int, int] | None:
    """Return (height, width) from the header of a TIFF file, `None` where it has none."""
    try:
        with _series(path) as series:
            return _height_width(series)
    except InputError:
        return None


def write_geotiff(mask: np.ndarray, labels: Labels, source: str | Path, path: str) -> None:
    """Write a mask as TIFF, in the place on earth of the image that it was made from.

    Args:
        mask: Class ids, uint8 [H, W]; 255 is marked as "no data".
        labels: For the colours.
        source: The image; the mask takes over its georeference, if it is a GeoTIFF.
        path: The file to write.

    Raises:
        InputError: tifffile is missing.
    """
    tifffile = _tifffile(source)
    tags: list[tuple] = [(GDAL_NODATA, "s", 0, "255", True)]
    if Path(source).suffix.lower() in SUFFIXES:
        with tifffile.TiffFile(source) as file:
            stored = file.pages[0].tags.values()
            tags += [
                (t.code, t.dtype, t.count, t.value, True) for t in stored if t.code in GEO_TAGS
            ]
    colours = np.zeros((256, 3), np.uint16)
    colours[: len(labels)] = labels.palette
    tifffile.imwrite(
        path,
        mask,
        photometric="palette",
        colormap=(257 * colours).T,
        compression="zlib",
        metadata=None,
        extratags=tags,
    )


def _tifffile(path: str | Path) -> Any:
    require(f"{path}: a TIFF file", "tiff", "tifffile")
    import tifffile

    return tifffile


@contextmanager
def _series(path: str | Path) -> Iterator[Any]:
    """Open the first series of a TIFF file; whatever goes wrong becomes an InputError."""
    with reading(path, "TIFF"), _tifffile(path).TiffFile(path) as file:
        yield file.series[0]


def _height_width(series: Any) -> tuple[int, int]:
    rows, columns = (series.shape[series.axes.index(axis)] for axis in "YX")
    return rows, columns
