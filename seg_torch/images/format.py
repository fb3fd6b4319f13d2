"""How the files of a dataset become images: as RGB, or with the channels that they store."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from seg_torch.errors import InputError
from seg_torch.images import geotiff
from seg_torch.images.read import image_size, opened, read_image, upright_rgb

MOST_CHANNELS = 1024


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

    def to_dict(self) -> dict[str, Any] | None:
        """Return the arguments as plain data, or `None` for `RGB`, for `from_dict`."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    @staticmethod
    def from_dict(stored: dict[str, Any] | None) -> ImageFormat:
        """Return what `to_dict` was called on."""
        return RGB if stored is None else ImageFormat(**stored)

    def settings(self) -> dict[str, Any]:
        """Return the settings of a data module whose images are of this format."""
        stored = self.to_dict() or {"channels": None, "bits": 8, "files": [], "rgb": None}
        return {"band_files": stored.pop("files"), **stored}

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
            uint8 or uint16, as `bits` says, [H, W, C].

        Raises:
            InputError: A file cannot be read, or the image has another size, number of channels or
                type than it should.
        """
        parts: list[np.ndarray] = []
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
            parts.append(part)
        image = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)
        if image.shape[2] != self.channels:
            raise InputError(
                f"{path}: {image.shape[2]} channels, not {self.channels} as data.channels says"
            )
        return np.ascontiguousarray(image)

    def size(self, path: str | Path) -> tuple[int, int] | None:
        """Return (height, width) from the header of a file, `None` where it has none."""
        return geotiff.tiff_size(Path(path)) if _is_tiff(path) else image_size(path)

    def checked(self, image: Any) -> np.ndarray:
        """Return an image that is not in a file as `read` would.

        Args:
            image: An array [H, W, C], a tensor [C, H, W] as of `as_tensor`, or a Pillow image.

        Raises:
            InputError: It is of another type or shape than images of this format.
        """
        if isinstance(image, Tensor):
            image = as_array(image) if self.bits == 16 else image.permute(1, 2, 0).cpu().numpy()
        # PyTorch warns of arrays that are read-only.
        array = np.require(image, requirements=["C", "W"])
        dtype, channels = f"uint{self.bits}", self.channels
        if array.dtype != dtype or array.ndim != 3 or array.shape[2] != channels or not array.size:
            raise InputError(
                f"the image is {array.dtype} {array.shape}: expected {dtype} [H, W, {channels}] as "
                f"an array, [{channels}, H, W] as a tensor"
            )
        return array

    def shown(self, image: np.ndarray) -> np.ndarray:
        """Return what is shown of an image; 16 bits are stretched, from percentile 2 to 98.

        Args:
            image: uint8 or uint16 [H, W, C].

        Returns:
            uint8 [H, W, 3].
        """
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

    def to_dict(self) -> None:
        return None

    def read(self, path: str | Path) -> np.ndarray:
        return read_image(path)

    def size(self, path: str | Path) -> tuple[int, int] | None:
        return image_size(path)

    def checked(self, image: Any) -> np.ndarray:
        return super().checked(upright_rgb(image) if isinstance(image, Image.Image) else image)


# Not the same as ImageFormat(3), whose files must hold three channels, and are not turned.
RGB: ImageFormat = _AnyImage(channels=3)


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


def _is_tiff(path: str | Path) -> bool:
    return Path(path).suffix.lower() in geotiff.SUFFIXES


def _read_other(path: Path) -> np.ndarray:
    """Return the channels of an image that Pillow reads, [H, W, C]."""
    with opened(path) as image:
        if image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK", "I;16", "I;16B", "I"):
            raise InputError(f"{path}: the channels of a {image.mode} image are not read")
        array = np.array(image)
    if array.dtype not in (np.uint8, np.uint16):  # how some versions of Pillow read 16 bits
        array = array.astype(np.uint16)
    return array.reshape(*array.shape[:2], -1)
