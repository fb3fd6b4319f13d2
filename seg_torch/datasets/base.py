"""What all datasets share: pairs of files, read under one rule and checked on the way in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors

from seg_torch.errors import InputError
from seg_torch.images import read_image
from seg_torch.labels import IGNORE_INDEX, Labels, encode_segmap

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")


class Pair(NamedTuple):
    """One sample on disk: its name (unique in the dataset), its image and its mask."""

    name: str
    image: Path
    mask: Path


def check_split(split: str) -> None:
    """Raises InputError unless the split is one of the three."""
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")


def val_for_test(split: str, dataset: str) -> str:
    """The split to read where a dataset has no labelled test images: val in place of test."""
    check_split(split)
    if split == "test":
        log.info("%s: no labelled test images here, so the test split is val", dataset)
        return "val"
    return split


def find_root(root: str | Path, dataset: str, entries: Sequence[str], source: str) -> Path:
    """The folder of a dataset, once everything that has to be there is there.

    Args:
        root: the folder to look in; `~` is the home directory.
        dataset: its name, for the message.
        entries: paths below `root` that have to exist.
        source: how to get the dataset.

    Raises:
        InputError: the folder or an entry is missing.
    """
    folder = Path(root).expanduser()
    missing = [entry for entry in entries if not (folder / entry).exists()]
    if not missing:
        return folder
    if not folder.is_dir():
        found = "there is no such folder"
    else:
        names = sorted(path.name for path in folder.iterdir())
        more = ", ..." if len(names) > 8 else ""
        found = f"it holds {', '.join(names[:8])}{more}" if names else "the folder is empty"
    gap = f"; missing: {', '.join(missing)}" if len(missing) < len(entries) else ""
    raise InputError(
        f"{dataset} was not found in {folder.absolute()}: {found}.\n"
        f"Expected there: {', '.join(entries)}{gap}.\n"
        f"To get it: {source}. If it is somewhere else, say where: data.root=FOLDER"
    )


def read_list(path: Path) -> list[str]:
    """The lines of a text file, blank ones left out."""
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    return [line.strip() for line in lines if line.strip()]


def _by_name(folder: Path, suffix: str) -> dict[str, Path]:
    paths = sorted(folder.rglob(f"*{suffix}"))
    return {path.relative_to(folder).as_posix()[: -len(suffix)]: path for path in paths}


def pair_files(
    images: Path,
    masks: Path,
    image_suffix: str = ".jpg",
    mask_suffix: str = ".png",
    names: Sequence[str] | None = None,
) -> list[Pair]:
    """Pairs images and masks by name: the path below their folder without the suffix.

    Args:
        images, masks: the folders, searched with their subfolders.
        image_suffix, mask_suffix: how the file names end.
        names: which pairs, in this order; by default every mask, sorted by name.

    Raises:
        InputError: no pair at all, or a name without an image or mask.
    """
    image_files, mask_files = _by_name(images, image_suffix), _by_name(masks, mask_suffix)
    chosen = list(mask_files) if names is None else list(names)
    if not chosen:
        raise InputError(f"{masks}: no *{mask_suffix} here, so there is nothing to learn from")
    missing = [str(images / (name + image_suffix)) for name in chosen if name not in image_files]
    missing += [str(masks / (name + mask_suffix)) for name in chosen if name not in mask_files]
    if missing:
        raise InputError(
            f"{len(missing)} files are missing, the download or its unpacking is incomplete:\n  "
            + "\n  ".join(missing[:5] + ["..."] * (len(missing) > 5))
        )
    return [Pair(name, image_files[name], mask_files[name]) for name in chosen]


@contextmanager
def open_mask(path: str | Path) -> Iterator[Image.Image]:
    """Opens a mask; whatever goes wrong while it is read becomes an InputError."""
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, SyntaxError) as error:
        raise InputError(f"{path}: cannot be read as a mask: {error}") from None


def read_index_mask(path: str | Path) -> np.ndarray:
    """The ids in a grey or palette image, uint8 [H, W]: indices, never luminance.

    Raises:
        InputError: the file is missing, no image, or has several channels.
    """
    with open_mask(path) as image:
        if image.mode not in ("L", "P", "1", "I", "I;16", "I;16B"):
            raise InputError(
                f"{path}: a mask of class ids is grey or palette, this one is {image.mode}"
            )
        ids = np.array(image)
    if ids.dtype != np.uint8:
        if ids.size and not 0 <= ids.min() <= ids.max() <= 255:
            raise InputError(
                f"{path}: mask values {ids.min()} to {ids.max()}; class ids are 0 to 254, and 255 "
                "means not labelled"
            )
        ids = ids.astype(np.uint8)
    return ids


def read_colour_mask(path: str | Path, palette: np.ndarray) -> np.ndarray:
    """The ids of the colours in an image, uint8 [H, W].

    Args:
        path: an image of any mode; transparency is ignored.
        palette: the classes' colours, uint8 [C, 3].

    Raises:
        InputError: the file is missing, no image, or holds a colour that no class has.
    """
    with open_mask(path) as image:
        rgb = np.array(image.convert("RGB"))
    try:
        return encode_segmap(rgb, palette)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def read_mat(path: Path, key: str) -> np.ndarray:
    """One variable of a MATLAB file.

    Raises:
        InputError: the file is missing, cut off, or holds no such variable.
    """
    from scipy.io import loadmat  # half a second that only two of the datasets need

    try:
        return loadmat(path, variable_names=[key])[key]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except KeyError:
        raise InputError(f"{path}: holds no variable {key!r}") from None
    except Exception as error:  # scipy raises whatever its parser stumbles over
        raise InputError(f"{path}: cannot be read as a MATLAB file: {error}") from None


# In a look-up table: the file must not hold this value. No dataset with a table has 255 classes.
NOT_ALLOWED = 254


def id_table(ids: Mapping[int, int]) -> np.ndarray:
    """A look-up table uint8 [256] from the values in a file to class ids and 255."""
    table = np.full(256, NOT_ALLOWED, np.uint8)
    table[list(ids)] = list(ids.values())
    return table


def read_mapped_mask(path: Path, table: np.ndarray) -> np.ndarray:
    """An index mask with its values looked up in an `id_table`.

    Raises:
        InputError: as `read_index_mask`, or a value that the table does not allow.
    """
    values = read_index_mask(path)
    ids = table.take(values)
    if (ids == NOT_ALLOWED).any():
        allowed = np.flatnonzero(table != NOT_ALLOWED).tolist()
        raise InputError(
            f"{path}: mask values {np.unique(values).tolist()}; in this dataset's files they are "
            f"{allowed}"
        )
    return ids


class SegmentationDataset(Dataset):
    """Images with masks.

    Args:
        pairs: the files.
        labels: the classes.
        read_mask: mask path -> uint8 [H, W] of class ids and 255; by default the pixel values of a
            grey or palette image. A module-level function or a partial of one, so that worker
            processes can be started with it.

    Items are `(tv_tensors.Image uint8 [3, H, W], tv_tensors.Mask uint8 [H, W])`.
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
