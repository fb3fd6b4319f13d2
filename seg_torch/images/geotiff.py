"""TIFF files: their channels as they are stored, and masks that keep their place on earth."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, TiffImagePlugin

from seg_torch.errors import InputError, require
from seg_torch.images.convert import turned
from seg_torch.images.missing import GDAL_NODATA, KIND, MASK, is_nodata, joined, masked
from seg_torch.images.read import check_claim, reading
from seg_torch.labels import Labels

SUFFIXES = (".tif", ".tiff")
# ModelPixelScale, ModelTiepoint, ModelTransformation and the three of GeoKeys.
GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)
ORIENTATION = 274
PIXEL_SCALE, TIEPOINT, TRANSFORMATION, GEO_KEYS, _, GEO_TEXTS = GEO_TAGS
# Keys among the GeoKeys (OGC GeoTIFF 1.1), and where the number is no code.
MODEL_TYPE, RASTER_TYPE, GEOGRAPHIC, PROJECTED, USER_DEFINED = 1024, 1025, 2048, 3072, 32767
CITATIONS = (3073, 1026, 2049)


def read_tiff(path: Path) -> np.ndarray:
    """Return the channels of a TIFF file, upright, [H, W, C], whatever their order in the file.

    The array is masked where the file, or `NAME.tif.msk` beside it, says that there are no data.

    Raises:
        InputError: The file cannot be read, or claims to hold more than its size allows.
    """
    with _series(path) as series:
        height, width = _height_width(series)
        check_claim(path, os.path.getsize(path), int(np.prod(series.shape)), "values")
        if Image.MAX_IMAGE_PIXELS and height * width > 2 * Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"{height * width:,} pixels.")
        axes = [series.axes.index(axis) for axis in "YX"]
        image = np.moveaxis(series.asarray(), axes, (0, 1)).reshape(height, width, -1)
        tags = series.keyframe.tags
        hidden = is_nodata(image, tags.valueof(GDAL_NODATA))
        hidden = joined(hidden, _masked_by_file(path, series.keyframe.parent.pages, image.shape))
    orientation = tags.valueof(ORIENTATION, 1)
    if orientation != 1:
        image = turned(image, orientation)
        hidden = hidden if hidden is None else turned(hidden, orientation)
    return masked(image, hidden)


def _masked_by_file(path: Path, pages: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return where the mask in a file, or the one beside it, is 0, bool [H, W]."""
    for page in pages[1:]:
        if page.tags.valueof(KIND, 0) & MASK and page.shape == shape[:2]:
            return page.asarray() == 0
    beside = Path(f"{path}.msk")
    if beside.exists():
        with _series(beside) as series:
            return series.asarray().reshape(shape[:2]) == 0
    return None


def tiff_size(path: Path) -> tuple[int, int] | None:
    """Return (height, width) from the header of a TIFF file, `None` where it has none."""
    try:
        with _series(path) as series:
            height, width = _height_width(series)
            lies = series.keyframe.tags.valueof(ORIENTATION, 1) in (5, 6, 7, 8)
            return (width, height) if lies else (height, width)
    except InputError:
        return None


class Place(NamedTuple):
    """Where on earth the pixels of an image are.

    Attributes:
        matrix: a, b, c, d, e, f: the pixel whose corner is (x, y) is at (a x + b y + c,
            d x + e y + f).
        crs: The coordinate reference system, as a URN of the OGC or, of one without a number, as
            the file calls it; "" where it does not.
    """

    matrix: tuple[float, float, float, float, float, float]
    crs: str


def place(path: Path) -> Place | None:
    """Return where on earth the image in a TIFF file is; `None` where the file does not say.

    Raises:
        InputError: The file cannot be read.
    """
    with reading(path, "TIFF"), path.open("rb") as file:
        header = file.read(8)
        if header[2:3] == b"+" or header[3:4] == b"+":  # BigTIFF
            header += file.read(8)
        tags = TiffImagePlugin.ImageFileDirectory_v2(header)
        file.seek(tags.next)
        tags.load(file)
        keys = _geo_keys(tags)
        if tags.get(ORIENTATION, 1) != 1:
            return None  # its pixels are turned
        if PIXEL_SCALE in tags and len(tags.get(TIEPOINT, ())) == 6:
            (x_scale, y_scale), (x, y, _, east, north) = tags[PIXEL_SCALE][:2], tags[TIEPOINT][:5]
            matrix = (x_scale, 0.0, east - x * x_scale, 0.0, -y_scale, north + y * y_scale)
        elif len(tags.get(TRANSFORMATION, ())) == 16:
            m = tags[TRANSFORMATION]
            matrix = (m[0], m[1], m[3], m[4], m[5], m[7])
        else:
            return None
    if keys.get(RASTER_TYPE) == 2:  # the place is that of the centre of a pixel
        a, b, c, d, e, f = matrix
        matrix = (a, b, c - (a + b) / 2, d, e, f - (d + e) / 2)
    return Place(matrix, _crs(keys))


def _geo_keys(tags: Any) -> dict[int, Any]:
    """Return the keys of a GeoTIFF with their numbers and texts."""
    directory, texts = tags.get(GEO_KEYS, ()), str(tags.get(GEO_TEXTS, ""))
    entries = (directory[i : i + 4] for i in range(4, len(directory) - 3, 4))
    return {
        key: value if where == 0 else texts[value : value + count].rstrip("|\0")
        for key, where, count, value in entries
        if where in (0, GEO_TEXTS)
    }


def _crs(keys: dict[int, Any]) -> str:
    """Return the name of the coordinate reference system."""
    projected = keys.get(MODEL_TYPE) != 2
    code = keys.get(PROJECTED if projected else GEOGRAPHIC, USER_DEFINED)
    if code == 4326:  # of GPS: longitude comes first here
        return "urn:ogc:def:crs:OGC:1.3:CRS84"
    if 1024 <= code < USER_DEFINED:
        return f"urn:ogc:def:crs:EPSG::{code}"
    return str(next((keys[key] for key in CITATIONS if keys.get(key)), ""))


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
