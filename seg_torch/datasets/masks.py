"""Masks: class ids from the values or the colours in their files, and what may be in them."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from seg_torch.errors import InputError
from seg_torch.images.convert import upright
from seg_torch.images.read import opened, plain_png
from seg_torch.labels import (
    IGNORE_INDEX,
    Labels,
    encode_segmap,
    likeliest_mistake,
    most_frequent,
)

# Image formats that change what is drawn.
LOSSY = ("JPEG", "MPO")


def read_index_mask(path: str | Path, content: bytes | None = None) -> np.ndarray:
    """Return the ids in a grey or palette image: indices, never luminance.

    Transparency is ignored. Of floating-point numbers, NaN is not labelled.

    Args:
        path: The file.
        content: Of the file, where it lies in another one; `path` is then for the message.

    Returns:
        uint8 [H, W].

    Raises:
        InputError: The file is missing, no image, lossy, has several channels, fractions or values
            above 255.
    """
    with opened(path, "a mask", content) as image:
        refuse_lossy(image, path)
        if image.mode not in ("L", "LA", "P", "PA", "1", "I", "I;16", "I;16B", "F"):
            raise InputError(f"{path}: a mask of class ids is grey or palette, not {image.mode}")
        decoded = plain_png(image, path, content)
        ids = np.array(upright(image)) if decoded is None else decoded
    ids = ids if ids.ndim == 2 else ids[..., 0]
    if ids.dtype.kind == "f":
        ids = np.where(np.isnan(ids), IGNORE_INDEX, ids)
        fractions = int((ids != np.rint(ids)).sum())
        if fractions:
            raise InputError(
                f"{path}: {fractions:,} pixels are no whole numbers, so they are no class ids"
            )
    if ids.dtype != np.uint8:
        if ids.size and not 0 <= ids.min() <= ids.max() <= 255:
            raise InputError(
                f"{path}: mask values {ids.min()} to {ids.max()}; class ids are 0 to 254, and 255 "
                "means not labelled",
                pixels=most_frequent(ids[(ids < 0) | (ids > 255)]),
            )
        ids = ids.astype(np.uint8)
    return ids


def refuse_lossy(image: Image.Image, path: str | Path) -> None:
    """Raise InputError for a mask in a file whose format changes what is drawn."""
    compression = str(image.info.get("compression", ""))  # of TIFF
    if image.format in LOSSY or compression in ("jpeg", "webp"):
        raise InputError(
            f"{path}: the mask is saved as JPEG, and JPEG is lossy: its values are not those that "
            "were drawn. Export the masks anew as PNG; converting these files is not enough"
        )


def read_colour_mask(path: str | Path, palette: np.ndarray) -> np.ndarray:
    """Return the ids of the colours in an image.

    Args:
        path: An image of any mode; transparency is ignored.
        palette: Colours of the classes, uint8 [C, 3].

    Returns:
        uint8 [H, W].

    Raises:
        InputError: The file is missing, no image, lossy, or holds a colour that no class has.
    """
    with opened(path, "a mask") as image:
        refuse_lossy(image, path)
        rgb = np.array(upright(image).convert("RGB"))
    try:
        return encode_segmap(rgb, palette)
    except InputError as error:
        raise InputError(f"{path}: {error}", pixels=error.pixels) from None


# In a look-up table: the file must not hold this value. No dataset with a table has 255 classes.
NOT_ALLOWED = 254


def mapped_masks(ids: Mapping[int, int]) -> Callable[[Path], np.ndarray]:
    """Return a function that reads index masks whose values stand for class ids and 255."""
    return partial(read_mapped_mask, table=id_table(ids))


def id_table(ids: Mapping[int, int]) -> np.ndarray:
    """Return a look-up table uint8 [256] from the values in a file to class ids and 255."""
    table = np.full(256, NOT_ALLOWED, np.uint8)
    table[list(ids)] = list(ids.values())
    return table


def look_up(mask: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return a mask uint8 [H, W] with its values looked up in a table uint8 [256]."""
    # Half the time of NumPy's look-up.
    looked_up = bytearray(mask).translate(table.tobytes())
    return np.frombuffer(looked_up, np.uint8).reshape(mask.shape)


def read_mapped_mask(
    path: str | Path, table: np.ndarray, content: bytes | None = None
) -> np.ndarray:
    """Return an index mask with its values looked up in an `id_table`, uint8 [H, W].

    Raises:
        InputError: The file is one that `read_index_mask` refuses, or holds a value that the table
            does not allow.
    """
    values = read_index_mask(path, content)
    ids = look_up(values, table)
    wrong = ids == NOT_ALLOWED
    if wrong.any():
        raise _wrong_values(path, values, wrong, np.flatnonzero(table != NOT_ALLOWED).tolist())
    return ids


def _wrong_values(
    name: object, mask: np.ndarray, wrong: np.ndarray, allowed: object, hint: str = ""
) -> InputError:
    found = np.unique(mask).tolist()
    listed = f"{found}" if len(found) <= 10 else f"{found[:10]} and {len(found) - 10} others"
    pixels = most_frequent(mask[wrong])
    return InputError(f"{name}: mask values {listed}; allowed are {allowed}{hint}", pixels=pixels)


def check_values(mask: np.ndarray, labels: Labels, name: object) -> None:
    """Raise InputError unless a mask uint8 [H, W] holds nothing but class ids and 255."""
    # Adding one in 8 bits takes 255 to 0, so a single maximum checks "a class id or 255".
    if mask.size and int((mask + np.uint8(1)).max()) > len(labels):
        wrong = (mask >= len(labels)) & (mask != IGNORE_INDEX)
        classes = f"0 to {len(labels) - 1} (the {len(labels)} classes)"
        allowed = f"{classes} and {IGNORE_INDEX} (not labelled)"
        raise _wrong_values(name, mask, wrong, allowed, likeliest_mistake(mask, len(labels)))
