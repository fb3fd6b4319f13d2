"""How the files of a dataset become images: as RGB, or with the channels that they store."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from seg_torch.errors import InputError
from seg_torch.images import geotiff
from seg_torch.images.convert import likely_white, upright, upright_rgb
from seg_torch.images.missing import GDAL_NODATA, masked, missing
from seg_torch.images.read import doubts, image_size, opened, read_image, reading

MOST_CHANNELS = 1024
# Of 16 bits: an image that reaches a quarter of white at most is of 8, 10, 12 or 14, most likely.
DARK = 1 << 14


@dataclass(frozen=True)
class ImageFormat:
    """Images whose channels are read as they are stored; `RGB` is how all others are read.

    Args:
        channels: Their number C.
        bits: Of each value, 8 or 16.
        files: What the names of the files end in that are one image, in the order of the channels,
            such as `_B04.tif` and `_B08.tif`; none where an image is one file.
        rgb: The channels that are shown as red, green and blue, counted from 0; by default the
            first three, or of fewer the first one as grey.
        white: Of values of 16 bits the largest that occurs, such as 4095 where they are of 12 bits;
            by default 65535. They are scaled by it, and what is above is white, too. In RGB it is
            that of grey of more than 8 bits, by default 65535, and 1 of floats.

    Raises:
        InputError: A number is out of its range.
    """

    channels: int
    bits: int = 8
    files: tuple[str, ...] = ()
    rgb: tuple[int, ...] = ()
    white: float | None = None

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
        if self.white is not None and not 0 < self.white < math.inf:
            raise InputError(f"data.white={self.white}: expected a number above 0, such as 4095")
        if self.white is not None and self.bits == 8 and not self.is_rgb:
            raise InputError(f"data.white={self.white}: it is of data.bits=16, and they are 8")
        if not all(isinstance(ending, str) and ending for ending in self.files):
            raise InputError(f"data.band_files={list(self.files)}: expected endings of file names")

    @property
    def is_rgb(self) -> bool:
        """Whether files of all kinds are converted to RGB of 8 bits."""
        return False

    def to_dict(self) -> dict[str, Any] | None:
        """Return the arguments as plain data, or `None` for `RGB`, for `from_dict`."""
        stored = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}
        if self.white is None:
            del stored["white"]
        return stored

    @staticmethod
    def from_dict(stored: dict[str, Any] | None) -> ImageFormat:
        """Return what `to_dict` was called on."""
        if stored is None:
            return RGB
        if stored["channels"] is None:
            return any_image(stored["white"])
        return ImageFormat(**stored)

    def settings(self) -> dict[str, Any]:
        """Return the settings of a data module whose images are of this format."""
        stored = asdict(self)
        files, rgb = list(stored.pop("files")), list(stored.pop("rgb"))
        of_rgb = {"channels": None, "rgb": None} if self.is_rgb else {}
        return {**stored, "band_files": files, "rgb": rgb, **of_rgb}

    def paths(self, path: str | Path) -> list[Path]:
        """Return the files of the image whose first file is `path`."""
        if not self.files:
            return [Path(path)]
        name = str(path)[: -len(self.files[0])]
        return [Path(name + ending) for ending in self.files]

    def read(self, path: str | Path) -> np.ndarray:
        """Read an image; nothing is converted or scaled, unless the format is `RGB`.

        Args:
            path: Of its first file. TIFF files may have any layout that tifffile reads.

        Returns:
            uint8 or uint16, as `bits` says, [H, W, C]; masked where there are no data: those of a
            file that is one of several, where none of them has any.

        Raises:
            InputError: A file cannot be read, or the image has another size, number of channels or
                type than it should.
        """
        parts: list[np.ndarray] = []
        hidden: list[np.ndarray | None] = []
        for file in self.paths(path):
            part = geotiff.read_tiff(file) if _is_tiff(file) else _read_other(file)
            if part.dtype != f"uint{self.bits}":
                hint = "convert it to unsigned integers of 8 or 16 bits"
                if part.dtype in (np.uint8, np.uint16):
                    hint = f"if all images do, set data.bits={8 * part.dtype.itemsize}"
                raise InputError(f"{file}: holds {part.dtype}, not uint{self.bits}; {hint}")
            if parts and part.shape[:2] != parts[0].shape[:2]:
                sizes = [f"{p.shape[1]} x {p.shape[0]}" for p in (part, parts[0])]
                raise InputError(f"{file}: {sizes[0]} pixels, {Path(path).name} has {sizes[1]}")
            parts.append(np.ma.getdata(part))
            hidden.append(missing(part))
        image = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)
        if image.shape[2] != self.channels:
            raise InputError(
                f"{path}: {image.shape[2]} channels, not {self.channels} as data.channels says"
            )
        known = [part for part in hidden if part is not None]
        everywhere = np.logical_and.reduce(known) if len(known) == len(hidden) else None
        return masked(self._scaled(np.ascontiguousarray(image)), everywhere)

    def _scaled(self, image: np.ndarray) -> np.ndarray:
        """Return an image of which `white` is the largest value as one of 16 bits."""
        if self.white is None:
            return image
        scaled = image * np.float32(65535 / self.white)
        return np.rint(scaled, out=scaled).clip(0, 65535).astype(np.uint16)

    def remarks(self, path: str | Path) -> dict[str, str]:
        """Return what is doubtful about a file that is read all the same, by its kind."""
        return {}

    def size(self, path: str | Path) -> tuple[int, int] | None:
        """Return (height, width) from the header of a file, `None` where it has none."""
        return geotiff.tiff_size(Path(path)) if _is_tiff(path) else image_size(path)

    def checked(self, image: Any) -> np.ndarray:
        """Return an image that is not in a file as `read` would.

        Args:
            image: An array [H, W, C] as it would be in a file, masked where there are no data; a
                tensor [C, H, W] as of `as_tensor`; or a Pillow image.

        Raises:
            InputError: It is of another type or shape than images of this format.
        """
        is_scaled = isinstance(image, Tensor)
        if isinstance(image, Tensor):
            image = as_array(image) if self.bits == 16 else image.permute(1, 2, 0).cpu().numpy()
        # PyTorch warns of arrays that are read-only.
        array = np.require(np.ma.getdata(image), requirements=["C", "W"])
        dtype, channels = f"uint{self.bits}", self.channels
        if array.dtype != dtype or array.ndim != 3 or array.shape[2] != channels or not array.size:
            raise InputError(
                f"the image is {array.dtype} {array.shape}: expected {dtype} [H, W, {channels}] as "
                f"an array, [{channels}, H, W] as a tensor"
            )
        return masked(array if is_scaled else self._scaled(array), missing(image))

    def shown(self, image: np.ndarray) -> np.ndarray:
        """Return what is shown of an image; 16 bits are stretched, from percentile 2 to 98.

        Args:
            image: uint8 or uint16 [H, W, C].

        Returns:
            uint8 [H, W, 3].
        """
        image = np.ma.getdata(image)
        # A dataset of the user's own may have grey images that do not say so.
        rgb = self.rgb if image.shape[2] >= self.channels else (0, 0, 0)
        if image.shape[2] != 3 or rgb != (0, 1, 2):
            image = image[..., list(rgb)]
        if image.dtype == np.uint8:
            return np.ascontiguousarray(image)
        low, high = np.percentile(image, (2, 98))
        scaled = (image - np.float32(low)) * np.float32(255 / max(high - low, 1))
        return np.rint(scaled).clip(0, 255).astype(np.uint8)


class _AnyImage(ImageFormat):
    """Images of all kinds, read upright and converted to RGB of 8 bits."""

    @property
    def is_rgb(self) -> bool:
        return True

    def to_dict(self) -> dict[str, Any] | None:
        return None if self.white is None else {"channels": None, "white": self.white}

    def read(self, path: str | Path) -> np.ndarray:
        colours = _colours_of_16_bits(path, self.white) if _is_tiff(path) else None
        return read_image(path, white=self.white) if colours is None else colours

    def remarks(self, path: str | Path) -> dict[str, str]:
        found, remarks = doubts(path), {}
        if self.white is None and 0 < found.largest < DARK:
            remarks["white"] = (
                f"its values reach {found.largest:,} of 65,535, so it is nearly black, unless the "
                f"network is trained with data.white={likely_white(found.largest):g}"
            )
        if found.band:
            remarks["band"] = (
                f"its last band is no transparency ({found.band}), and is left out, unless the "
                "network is trained with data.channels=4"
            )
        return remarks

    def size(self, path: str | Path) -> tuple[int, int] | None:
        return image_size(path)

    def checked(self, image: Any) -> np.ndarray:
        if isinstance(image, Image.Image):
            with reading("the image", "an image"):
                rgb, hidden = upright_rgb(image, self.white)
            return masked(np.array(rgb), hidden)
        return super().checked(image)

    def _scaled(self, image: np.ndarray) -> np.ndarray:
        return image  # it is of 8 bits


def any_image(white: float | None = None) -> ImageFormat:
    """Return the format of images of all kinds; see `ImageFormat` for `white`."""
    return _AnyImage(channels=3, white=white)


# Not the same as ImageFormat(3), whose files must hold three channels.
RGB = any_image()


def _colours_of_16_bits(path: str | Path, white: float | None) -> np.ndarray | None:
    """Return RGB of a TIFF file of which the upper 8 bits, as Pillow reads them, are not enough.

    That is where white is another value, and where one value stands for no data.
    """
    with opened(path) as image:
        deep = image.mode in ("RGB", "RGBA") and ";16" in str(image.tile[0][3])  # type: ignore
        if not deep or (white is None and GDAL_NODATA not in image.tag_v2):  # type: ignore
            return None
    pixels = geotiff.read_tiff(Path(path))[..., :3]
    values = np.ma.getdata(pixels) * np.float32(255 / (white or 65535))
    return masked(np.rint(values).clip(0, 255).astype(np.uint8), missing(pixels))


def as_tensor(image: np.ndarray) -> Tensor:
    """Return an image uint8 or uint16 [H, W, C] as [C, H, W], 16 bits as float32 of 0 to 255.

    So all images have one scale, and 16 bits keep their steps, of 1/257.
    """
    image = np.ma.getdata(image)
    if image.dtype == np.uint16:
        image = image / np.float32(257)
    # A view: cutting and resizing are faster with the channels of a pixel side by side.
    return torch.from_numpy(image).permute(2, 0, 1)


def as_array(image: Tensor) -> np.ndarray:
    """Return what `as_tensor` was given."""
    array = image.permute(1, 2, 0).cpu().numpy()
    return np.rint(array * 257).astype(np.uint16) if array.dtype == np.float32 else array


def _is_tiff(path: str | Path) -> bool:
    return Path(path).suffix.lower() in geotiff.SUFFIXES


def _read_other(path: Path) -> np.ndarray:
    """Return the channels of an image that Pillow reads, [H, W, C]."""
    with opened(path) as image:
        if image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK", "I;16", "I;16B", "I"):
            raise InputError(f"{path}: the channels of a {image.mode} image are not read")
        array = np.array(upright(image))
    if array.dtype not in (np.uint8, np.uint16):  # how some versions of Pillow read 16 bits
        array = array.astype(np.uint16)
    return array.reshape(*array.shape[:2], -1)
