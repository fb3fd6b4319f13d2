"""What all datasets share: pairs of files, read under one rule and checked on the way in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors

from seg_torch.errors import InputError
from seg_torch.images import read_image
from seg_torch.labels import IGNORE_INDEX, Labels


SPLITS = ("train", "val", "test")


class Pair(NamedTuple):
    """One sample on disk: its name (unique in the dataset), its image and its mask."""

    name: str
    image: Path
    mask: Path


def read_index_mask(path: str | Path) -> np.ndarray:
    """The ids in a grey or palette image, uint8 [H, W]: indices, never luminance.

    Raises:
        InputError: the file is missing, no image, or has several channels.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "P", "1", "I", "I;16"):
                raise InputError(
                    f"{path}: a mask of class ids is grey or palette, this one is {image.mode}"
                )
            ids = np.array(image)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, SyntaxError) as error:
        raise InputError(f"{path}: cannot be read as a mask: {error}") from None
    if ids.dtype != np.uint8:
        if ids.size and ids.max() > 255:
            raise InputError(f"{path}: mask values up to {ids.max()}, class ids are at most 254")
        ids = ids.astype(np.uint8)
    return ids


class SegmentationDataset(Dataset):
    """Images with masks.

    Args:
        pairs: the files.
        labels: the classes.
        read_mask: mask path -> uint8 [H, W] of class ids and 255; by default the pixel values of a
            grey or palette image. A module-level function or a partial of one, so that worker
            processes can be started with it.

    Items are ``(tv_tensors.Image uint8 [3, H, W], tv_tensors.Mask uint8 [H, W])``.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        labels: Labels,
        read_mask: Callable[[Path], np.ndarray] = read_index_mask,
    ) -> None:
        self.pairs = list(pairs)
        self.labels = labels
        self.read_mask = read_mask

    def __len__(self) -> int:
        return len(self.pairs)

    def mask(self, index: int) -> np.ndarray:
        """The mask alone, uint8 [H, W], with every value checked.

        Raises:
            InputError: a value that is neither a class id nor 255, with the values found.
        """
        path = self.pairs[index].mask
        mask = self.read_mask(path)
        # Adding one in 8 bits takes 255 to 0, so a single maximum checks "a class id or 255".
        if mask.size and int((mask + np.uint8(1)).max()) > len(self.labels):
            found = np.unique(mask).tolist()
            raise InputError(
                f"{path}: mask values {found}; allowed are 0 to {len(self.labels) - 1} (the "
                f"{len(self.labels)} classes) and {IGNORE_INDEX} (not labelled)"
            )
        return mask

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        pair = self.pairs[index]
        image, mask = read_image(pair.image), self.mask(index)
        if image.shape[:2] != mask.shape:
            raise InputError(
                f"{pair.mask}: the mask has {mask.shape[1]} x {mask.shape[0]} pixels, its image "
                f"{pair.image} has {image.shape[1]} x {image.shape[0]}"
            )
        return (
            tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1).contiguous()),
            tv_tensors.Mask(torch.from_numpy(mask)),
        )


def check_split(split: str) -> None:
    """Raises InputError unless the split is one of the three."""
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
