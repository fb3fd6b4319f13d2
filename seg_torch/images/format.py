"""Images of other channels than RGB: the bands of TIFF files, or several files an image."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from seg_torch.errors import InputError
from seg_torch.images.read import LARGE, MOST_PIXELS_PER_BYTE, image_size, opened
from seg_torch.labels import Labels

MOST_CHANNELS = 1024
TIFF = (".tif", ".tiff")
# ModelPixelScale, ModelTiepoint, ModelTransformation and the three of GeoKeys.
GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)
GDAL_NODATA = 42113


@dataclass(frozen=True)
class ImageFormat:
    """How the channels of images are stored, and which of them are shown.

    Args:
        channels: Their number C.
        bits: Of each value, 8 or 16.
        files: What the names of the files end in that are one image, in the order of the channels,
            such as `_B04.tif` and `_B08.tif`; none where an image is one file.
        rgb: The channels that are shown as red, green and blue, counted from 0; by default the
            first three, or of fewer the first one as grey.

    Raises:
        InputError: A number is out of its range.
    """

    channels: int
    bits: int = 8
    files: tuple[str, ...] = ()
    rgb: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        shown = self.rgb or ((0, 1, 2) if self.channels >= 3 else (0, 0, 0))
        object.__setattr__(self, "rgb", tuple(shown))
        object.__setattr__(self, "files", tuple(self.files))
        if type(self.channels) is not int or not 1 <= self.channels <= MOST_CHANNELS:
            raise InputError(f"data.channels={self.channels}: expected 1 to {MOST_CHANNELS}")
        if self.bits not in (8, 16):
            raise InputError(f"data.bits={self.bits}: expected 8 or 16")
        if len(self.rgb) != 3 or not all(i in range(self.channels) for i in self.rgb):
            last = self.channels - 1
            raise InputError(f"data.rgb={list(self.rgb)}: expected three channels of 0 to {last}")
        if not all(isinstance(ending, str) and ending for ending in self.files):
            raise InputError(f"data.band_files={list(self.files)}: expected endings of file names")

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments as plain data."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    def paths(self, path: str | Path) -> list[Path]:
        """Return the files of the image whose first file is `path`."""
        if not self.files:
            return [Path(path)]
        name = str(path)[: -len(self.files[0])]
        return [Path(name + ending) for ending in self.files]

    def read(self, path: str | Path) -> np.ndarray:
        """Read an image; nothing is converted or scaled.

        Args:
            path: Of its first file. TIFF files may have any layout that tifffile reads.

        Returns:
            uint8 or uint16, as `bits` says, [H, W, C].

        Raises:
            InputError: A file cannot be read, or the image has another size, number of channels or
                type than it should.
        """
        parts: list[np.ndarray] = []
        for file in self.paths(path):
            part = _read_tiff(file) if file.suffix.lower() in TIFF else _read_other(file)
            if part.dtype != f"uint{self.bits}":
                hint = "convert it to unsigned integers of 8 or 16 bits"
                if part.dtype in (np.uint8, np.uint16):
                    hint = f"if all images do, set data.bits={8 * part.dtype.itemsize}"
                raise InputError(f"{file}: holds {part.dtype}, not uint{self.bits}; {hint}")
            if parts and part.shape[:2] != parts[0].shape[:2]:
                sizes = [f"{p.shape[1]} x {p.shape[0]}" for p in (part, parts[0])]
                raise InputError(f"{file}: {sizes[0]} pixels, {Path(path).name} has {sizes[1]}")
            parts.append(part)
        image = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)
        if image.shape[2] != self.channels:
            raise InputError(
                f"{path}: {image.shape[2]} channels, not {self.channels} as data.channels says"
            )
        return np.ascontiguousarray(image)

    def size(self, path: str | Path) -> tuple[int, int] | None:
        """Return (height, width) from the header of a file, `None` where it has none."""
        if Path(path).suffix.lower() not in TIFF:
            return image_size(path)
        try:
            with _tiff(path) as series:
                return _height_width(series)
        except InputError:
            return None


def shown(image: np.ndarray, bands: ImageFormat | None) -> np.ndarray:
    """Return what is shown of an image.

    Args:
        image: uint8 or uint16 [H, W, C].
        bands: Choose the channels; 16 bits are stretched, from the 2nd to the 98th percentile.
            `None`: the first three channels, or the first.

    Returns:
        uint8 [H, W, 3].
    """
    rgb = (bands or ImageFormat(image.shape[2], 8 * image.dtype.itemsize)).rgb
    if image.shape[2] != 3 or rgb != (0, 1, 2):
        image = image[..., list(rgb)]
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image)
    low, high = np.percentile(image, (2, 98))
    scaled = (image - np.float32(low)) * np.float32(255 / max(high - low, 1))
    return np.rint(scaled).clip(0, 255).astype(np.uint8)


def as_tensor(image: np.ndarray) -> Tensor:
    """Return an image uint8 or uint16 [H, W, C] as [C, H, W], 16 bits as float32 of 0 to 255.

    So all images have one scale, and 16 bits keep their steps, of 1/257.
    """
    if image.dtype == np.uint16:
        image = image / np.float32(257)
    # A view: cutting and resizing are faster with the channels of a pixel side by side.
    return torch.from_numpy(image).permute(2, 0, 1)


def as_array(image: Tensor) -> np.ndarray:
    """Return what `as_tensor` was given."""
    array = image.permute(1, 2, 0).cpu().numpy()
    return np.rint(array * 257).astype(np.uint16) if array.dtype == np.float32 else array


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
    if Path(source).suffix.lower() in TIFF:
        with tifffile.TiffFile(source) as file:
            found = file.pages[0].tags.values()
            tags += [(t.code, t.dtype, t.count, t.value, True) for t in found if t.code in GEO_TAGS]
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
    try:
        import tifffile
    except ImportError:
        raise InputError(f"{path}: TIFF files need tifffile: pip install tifffile") from None
    return tifffile


@contextmanager
def _tiff(path: str | Path) -> Iterator[Any]:
    """Open the first series of a TIFF file; whatever goes wrong becomes an InputError."""
    tifffile = _tifffile(path)
    try:
        with tifffile.TiffFile(path) as file:
            yield file.series[0]
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # there is no end to what damaged files raise
        reason = str(error) or type(error).__name__
        raise InputError(f"{path}: cannot be read as TIFF: {reason}") from None


def _height_width(series: Any) -> tuple[int, int]:
    rows, columns = (series.shape[series.axes.index(axis)] for axis in "YX")
    return rows, columns


def _read_tiff(path: Path) -> np.ndarray:
    """Return the bands of a TIFF file, [H, W, C], whatever their order in the file."""
    with _tiff(path) as series:
        height, width = _height_width(series)
        values, size = int(np.prod(series.shape)), os.path.getsize(path)
        if values > max(LARGE, MOST_PIXELS_PER_BYTE * size):
            raise InputError(f"{path}: a file of {size:,} bytes claims to hold {values:,} values")
        if Image.MAX_IMAGE_PIXELS and height * width > 2 * Image.MAX_IMAGE_PIXELS:
            raise InputError(
                f"{path}: {height * width:,} pixels. If you trust the file, raise the limit "
                "(max_pixels=N of predict and app)"
            )
        places = [series.axes.index(axis) for axis in "YX"]
        image = np.moveaxis(series.asarray(), places, (0, 1))
    return image.reshape(height, width, -1)


def _read_other(path: Path) -> np.ndarray:
    """Return the channels of an image that Pillow reads, [H, W, C]."""
    with opened(path) as image:
        if image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK", "I;16", "I;16B", "I"):
            raise InputError(f"{path}: the channels of a {image.mode} image are not read")
        array = np.array(image)
    if array.dtype not in (np.uint8, np.uint16):  # how some versions of Pillow read 16 bits
        array = array.astype(np.uint16)
    return array.reshape(*array.shape[:2], -1)
