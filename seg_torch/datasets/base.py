"""What all datasets share: files of others, read under one rule, paired and checked."""

from __future__ import annotations

import codecs
import hashlib
import inspect
import json
import logging
import os
import pickle
import re
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors

from seg_torch.datasets.masks import NOT_ALLOWED as NOT_ALLOWED
from seg_torch.datasets.masks import check_values
from seg_torch.datasets.masks import id_table as id_table
from seg_torch.datasets.masks import mapped_masks as mapped_masks
from seg_torch.datasets.masks import read_colour_mask as read_colour_mask
from seg_torch.datasets.masks import read_index_mask as read_index_mask
from seg_torch.datasets.masks import read_mapped_mask as read_mapped_mask
from seg_torch.datasets.masks import refuse_lossy as refuse_lossy
from seg_torch.errors import InputError, check_choice
from seg_torch.files import is_hidden, readable
from seg_torch.files import list_files as list_files
from seg_torch.hardware import available_cpus
from seg_torch.images.convert import turned
from seg_torch.images.format import RGB, ImageFormat, as_array, as_tensor
from seg_torch.images.missing import missing
from seg_torch.images.read import orientation
from seg_torch.labels import (
    IGNORE_INDEX,
    Labels,
    parse_classes,
)

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")


@cache
def say(message: str, about: Path | None = None) -> None:
    """Log a message about a folder once, not for each split."""
    log.info("%s", message)


class Pair(NamedTuple):
    """One sample on disk: its name (unique in the dataset), its image and its mask."""

    name: str
    image: Path
    mask: Path


class Pairs(Sequence[Pair]):
    """Pairs as one block of bytes, some 200 for each; a `Pair` is made when it is asked for.

    A list of them would take eight times the memory, and that of every worker process as well:
    to read a Python object is to write its reference count.

    Args:
        pairs: Of each the name, the path of the image and that of the mask.
    """

    def __init__(self, pairs: Iterable[tuple[str, str | Path, str | Path]]) -> None:
        self._content, self._ends = bytearray(), array("q", [0])
        for name, image, mask in pairs:
            self._content += os.fsencode(f"{name}\0{image}\0{mask}")
            self._ends.append(len(self._content))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> Pairs: ...
    def __getitem__(self, index: int | slice) -> Pair | Pairs:
        chosen = range(len(self))[index]
        if isinstance(chosen, range):
            return Pairs(self[i] for i in chosen)
        name, image, mask = self.strings(chosen)
        return Pair(name, Path(image), Path(mask))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Pairs):
            return NotImplemented
        return self._content == other._content and self._ends == other._ends

    def __add__(self, other: Iterable[Pair]) -> Pairs:
        return Pairs([*self, *other])

    def strings(self, index: int) -> list[str]:
        """Return the name and the paths of a pair, without the cost of a `Path`."""
        pair = self._content[self._ends[index] : self._ends[index + 1]]
        return os.fsdecode(bytes(pair)).split("\0")


# What stands for a split in a name, and what a folder of one may be called.
_WORD = r"(?<![a-z])(train|val|test)(?:ing|id|idation)?(?:[-_]?\d+)?(?![a-z])"
_FOLDER = rf"{_WORD}(?:[-_ ]?(?:images?|imgs?|set|data|split|labels?|annotations?|json))?$"


def split_of(path: str) -> str:
    """Return which split the words of a path stand for, "" where there are none.

    `train2017`, `training`, `valid`, `validation` and `instances_val2017.json` are understood. The
    last part of the path with such a word decides; one with words of two splits says nothing. A
    folder's name ends in the word, or in another one such as images: `test_drive/` is no split.

    Args:
        path: With `/`, which a folder ends in.
    """
    name, *folders = reversed(path.lower().split("/"))
    for part, pattern in [(name, _WORD), *((folder, _FOLDER) for folder in folders)]:
        splits = {*re.findall(_WORD, part)} if re.search(pattern, part) else ()
        if splits:
            return splits.pop() if len(splits) == 1 else ""
    return ""


def val_for_test(split: str, dataset: object, has_test: bool = False) -> str:
    """Return the split to read: val for test where a dataset has no labelled test images.

    Raises:
        InputError: The split is none of the three.
    """
    check_choice("split", split, SPLITS)
    if split == "test" and not has_test:
        log.info("%s: no labelled test images here, so the test split is val", dataset)
        return "val"
    return split


def find(root: str | Path, dataset: str, entries: Sequence[str], source: str) -> list[Path]:
    """Return the paths of what a dataset needs, all of which exist.

    Args:
        root: The folder to look in; `~` is the home directory.
        dataset: Its name, for the message.
        entries: Paths below `root` that have to exist.
        source: How to get the dataset, for the message.

    Returns:
        The entries as paths below the folder, with `~` expanded.

    Raises:
        InputError: The folder or an entry is missing.
    """
    folder = Path(root).expanduser()
    missing = [entry for entry in entries if not (folder / entry).exists()]
    if not missing:
        return [folder / entry for entry in entries]
    if not folder.is_dir():
        content = "there is no such folder"
    else:
        names = first_names(folder)
        content = f"it holds {names}" if names else "the folder is empty"
    gap = f"; missing: {', '.join(missing)}" if len(missing) < len(entries) else ""
    raise InputError(
        f"{dataset} was not found in {folder.absolute()}: {content}.\n"
        f"Expected there: {', '.join(entries)}{gap}.\n"
        f"To get it: {source}. If it is somewhere else, say where: data.root=FOLDER"
    )


@contextmanager
def downloading(dataset: str, root: str | Path) -> Iterator[None]:
    """Turn what torchvision raises where a download fails into an InputError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise InputError(f"{dataset} could not be downloaded to {root}: {error}") from None


def first_names(folder: Path) -> str:
    """Return the names in a folder, at most eight of them, for a message."""
    with readable(folder):
        names = sorted(path.name for path in folder.iterdir() if not is_hidden(path.name))
    return ", ".join([*names[:8], *["..."][: len(names) > 8]])


def raise_problems(problems: Sequence[str], what: str, each: str = "") -> None:
    """Raise InputError with the number of problems and the first five, if there are any.

    Args:
        problems: Sentences, or names alone.
        what: Follows their number.
        each: Of names alone what is wrong with each, for those who see one without the others.
    """
    if problems:
        more = ["... (seg-torch inspect lists all of them)"][: len(problems) > 5]
        listing = "\n  ".join([*problems[:5], *more])
        sentences = [f"{problem}: {each}" if each else problem for problem in problems]
        raise InputError(f"{len(problems)} {what}:\n  {listing}", sentences)


@contextmanager
def parsing(file: str | Path, part: str = "") -> Iterator[None]:
    """Turn whatever goes wrong in reading a part of a file into an InputError that names both."""
    try:
        yield
    except KeyError as error:
        raise InputError(f"{file}: {part}{error} is missing") from None
    except Exception as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, AttributeError | IndexError | TypeError):  # which speak of the code
            reason = f"a value has another type or length than expected ({reason})"
        raise InputError(f"{file}: {part}{reason}", pixels=getattr(error, "pixels", {})) from None


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        InputError: It is no JSON, or not UTF-8.
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        what = f"no valid JSON: {error.msg} in line {error.lineno}, column {error.colno}"
    except UnicodeDecodeError as error:
        what = f"not UTF-8 (byte {error.start})"
    except RecursionError:
        what = "no annotations: lists within lists without end"
    raise InputError(f"{path}: {what}; is the download complete?")


def read_list(path: Path) -> list[str]:
    """Return the lines of a text file without the blank ones.

    Raises:
        InputError: The file is neither UTF-8 nor UTF-16 with a byte order mark.
    """
    content = path.read_bytes()
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        lines = content.decode("utf-16" if utf16 else "utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(
            f"{path}: line {line} is not UTF-8 (byte {content[error.start]:#04x}); "
            "save the file with the encoding UTF-8"
        ) from None
    if any("\0" in line for line in lines):
        raise InputError(f"{path}: holds zero bytes; save the file with the encoding UTF-8")
    return [line.strip() for line in lines if line.strip()]


def read_classes(path: Path) -> tuple[Labels, bool]:
    """Return the classes in a `classes.txt`, and whether it gives their colours.

    Raises:
        InputError: The file is not UTF-8, holds no classes, a colour above 255, colours for some
            of the classes only, or lines that are numbered from 1.
    """
    with parsing(path):
        lines = read_list(path)
    return labels_of(lines, path)


def labels_of(lines: Sequence[str], path: Path) -> tuple[Labels, bool]:
    """Return the classes in the lines of a `classes.txt`, as `read_classes` does."""
    with parsing(path):
        names, colours = parse_classes(lines)
    if not names:
        raise InputError(f"{path}: holds no class names; write one per line")
    if 0 < len(colours) < len(names):
        raise InputError(
            f"{path}: {len(colours)} of {len(names)} classes have a colour; give all of them one "
            "(name R G B) or none"
        )
    with parsing(path):
        if colours:
            return Labels(tuple(names), np.array(colours)), True
        return Labels(tuple(names)), False


def published_labels(dataset: str) -> Labels:
    """Return the classes of a dataset of this package, from its file in `classes`."""
    return read_classes(Path(__file__).parent / "classes" / f"{dataset}.txt")[0]


def _by_name(folder: Path, suffix: str) -> dict[str, str]:
    files = list_files(folder, (suffix.lower(),))
    return {file[: -len(suffix)]: file for file in files if file.endswith(suffix)}


def pair_files(
    images: Path,
    masks: Path,
    image_suffix: str = ".jpg",
    mask_suffix: str = ".png",
    names: Sequence[str] | None = None,
) -> Pairs:
    """Pair images and masks by name: the path below their folder without the suffix.

    Args:
        images: The folder of the images, searched with its subfolders.
        masks: The folder of the masks.
        image_suffix: How the names of image files end.
        mask_suffix: How the names of mask files end.
        names: Which pairs, in this order; by default every mask, sorted by name.

    Returns:
        The pairs.

    Raises:
        InputError: There is no pair at all, or a name without an image or mask.
    """
    image_files, mask_files = _by_name(images, image_suffix), _by_name(masks, mask_suffix)
    chosen = list(mask_files) if names is None else list(names)
    if not chosen:
        what = f"no *{mask_suffix} here" if names is None else "the list of this split is empty"
        raise InputError(f"{masks}: {what}, so there is nothing to learn from")
    missing = [str(images / (name + image_suffix)) for name in chosen if name not in image_files]
    missing += [str(masks / (name + mask_suffix)) for name in chosen if name not in mask_files]
    what = "files are missing, the download or its unpacking is incomplete"
    raise_problems(missing, what, "no such file")
    return Pairs(
        (name, f"{images}/{image_files[name]}", f"{masks}/{mask_files[name]}") for name in chosen
    )


class BaseDataset(Dataset):
    """What the package asks of a dataset; `as_dataset` makes one of anything that has samples.

    Items are `(tv_tensors.Image uint8 [C, H, W], tv_tensors.Mask uint8 [H, W])`; images of 16 bits
    are float32 of 0 to 255.

    Attributes:
        labels: The classes.
        format: How files become images.
        pairs: The files of each sample, `None` where samples are not read from files.
        white_is_a_class: What to do where 255 in the masks stands for a class: `{0}` is the name of
            the first class, `{1}` that of the second. "": it cannot be one.
    """

    white_is_a_class = "write 1 in place of 255"
    labels: Labels
    format: ImageFormat = RGB
    pairs: Pairs | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def base_dataset(self) -> BaseDataset:
        """The samples that these were made from, where they were; else these."""
        return self

    def name(self, index: int, kind: str = "mask") -> str:
        """Return what a sample is called: the file of its "mask" or "image", or its "name"."""
        if self.pairs is None:
            return f"{type(self).__name__}[{index}]"
        return str(getattr(self.pairs[index], kind))

    def has_same_samples(self, other: BaseDataset) -> bool:
        """Return whether these are the samples of another one, as of val that stands for test."""
        return self.pairs is not None and self.pairs == other.pairs

    def fingerprint(self) -> str | None:
        """Return what changes with the files and with how they are read; `None`: nothing does."""
        return None

    def read_as(self, format: ImageFormat) -> None:
        """Take over the white of a format, where images of all kinds are read as RGB."""
        if format.is_rgb and self.format.is_rgb:
            self.format = format

    def image_size(self, index: int) -> tuple[int, int] | None:
        """Return (height, width) of an image by its header; `None` where that takes reading it."""
        return None

    def image(self, index: int) -> np.ndarray:
        """Return the image alone, uint8 or uint16 [H, W, C]."""
        return as_array(self[index][0])

    def mask(self, index: int) -> np.ndarray:
        """Return the mask alone, uint8 [H, W]."""
        return self[index][1].numpy()


class OwnDataset(BaseDataset):
    """A dataset that somebody wrote, without a class of this package.

    Args:
        samples: Anything with `labels`, a length and items (image, mask). It may have `mask(i)`, a
            `format` and, as a wrapper does, the `dataset` that it was made from.
    """

    def __init__(self, samples: Any) -> None:
        self.samples, self.labels = samples, samples.labels
        format = getattr(samples, "format", None)
        self.format = format if isinstance(format, ImageFormat) else RGB

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]

    def read_as(self, format: ImageFormat) -> None:
        """Refuse a white, since these samples are read by somebody else's code."""
        if format.white is not None:
            raise InputError("data.white: this dataset reads its images by itself")

    @property
    def base_dataset(self) -> BaseDataset:
        """The files that a wrapper makes its samples from, for them to be checked."""
        inner = getattr(self.samples, "dataset", None)
        # A wrapper with fewer samples is a selection, such as one of its splits.
        if isinstance(inner, SegmentationDataset) and len(inner) <= len(self):
            return inner
        return self

    def name(self, index: int, kind: str = "mask") -> str:
        """Return the class of the samples and the number of one."""
        return f"{type(self.samples).__name__}[{index}]"

    def mask(self, index: int) -> np.ndarray:
        """Return the mask alone, uint8 [H, W]."""
        mask = getattr(self.samples, "mask", super().mask)
        return mask(index)


def image_files(dataset: BaseDataset) -> Iterator[str]:
    """Yield the path of the image of each sample, if they are read from files."""
    if dataset.pairs is not None:
        for index in range(len(dataset.pairs)):
            yield dataset.pairs.strings(index)[1]


def as_dataset(samples: Any) -> BaseDataset:
    """Return any dataset as what the package asks for."""
    return samples if isinstance(samples, BaseDataset) else OwnDataset(samples)


class SegmentationDataset(BaseDataset):
    """Images with masks, in files.

    Args:
        pairs: The files, best as `Pairs`: of each sample the name, the image and the mask.
        labels: The classes.
        read_mask: Mask path -> uint8 [H, W] of class ids and 255; by default the pixel values of a
            grey or palette image. A module-level function or a partial of one, so that worker
            processes can be started with it.
        format: How files become images.
    """

    pairs: Pairs
    white_is_a_class = "say so in classes.txt:\n{0} 0 0 0\n{1} 255 255 255"

    def __init__(
        self,
        pairs: Iterable[tuple[str, str | Path, str | Path]],
        labels: Labels,
        read_mask: Callable[[Path], np.ndarray] = read_index_mask,
        format: ImageFormat = RGB,
    ) -> None:
        self.pairs = pairs if isinstance(pairs, Pairs) else Pairs(pairs)
        self.labels = labels
        self.read_mask = read_mask
        self.format = format

    def __len__(self) -> int:
        return len(self.pairs)

    def files(self) -> Iterator[str]:
        """Yield the paths of all files."""
        for index in range(len(self)):
            _, image, mask = self.pairs.strings(index)
            yield from map(str, self.format.paths(image)) if self.format.files else [image]
            yield mask

    def fingerprint(self) -> str | None:
        """Return what changes with the files and with how they are read.

        Returns:
            SHA-256 of the names, sizes and times of all files, the classes, the function that
            reads masks, and the package's own readers: what an older version of these found does
            not count. `None` where a file is missing, or the function cannot be looked at.
        """
        try:
            digest, here = hashlib.sha256(), os.getcwd()
            for file in self.files():
                path, stat = os.path.join(here, file), os.stat(file)
                digest.update(os.fsencode(f"{path}\0{stat.st_size} {stat.st_mtime_ns}\0"))
            reader: Any = self.read_mask
            source = inspect.getsource(getattr(reader, "func", reader))
            options = pickle.dumps((getattr(reader, "args", ()), getattr(reader, "keywords", {})))
            own = readers_source()
        except Exception:  # of any function that somebody wrote
            return None
        digest.update(repr((self.labels.to_dict(), self.format, source, options, own)).encode())
        return digest.hexdigest()

    def image_size(self, index: int) -> tuple[int, int] | None:
        """Return (height, width) of an image by its header, `None` where it has none."""
        return self.format.size(self.pairs.strings(index)[1])

    def image(self, index: int) -> np.ndarray:
        """Return the image alone, as it is in its file, uint8 or uint16 [H, W, C].

        Raises:
            InputError: The file cannot be read.
        """
        return self.format.read(self.pairs[index].image)

    def mask(self, index: int) -> np.ndarray:
        """Return the mask alone, uint8 [H, W], with every value checked.

        Raises:
            InputError: The file cannot be read, or a value is neither a class id nor 255.
        """
        mask = self.read_mask(self.pairs[index].mask)
        check_values(mask, self.labels, self.pairs[index].mask)
        return mask

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        pair = self.pairs[index]
        image, mask = self.image(index), self.mask(index)
        mask = as_seen(mask, image, pair.image, pair.mask)
        check_sizes(image, mask, pair.image, pair.mask)
        return as_sample(image, mask)


def as_seen(mask: np.ndarray, image: np.ndarray, image_file: Path, file: Path) -> np.ndarray:
    """Return a mask that was drawn on the pixels of a photo as they are stored as it is seen.

    That shows in its size, where the photo lies on its side and the mask says nothing of that.
    """
    lies = mask.shape != image.shape[:2] and mask.shape == image.shape[1::-1]
    if lies and (turn := orientation(image_file)) in (5, 6, 7, 8) and orientation(file) == 1:
        return turned(mask, turn)
    return mask


def without_missing(mask: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Return a mask in which pixels are not labelled where their image, masked, has no data."""
    hidden = missing(image)
    return mask if hidden is None else np.where(hidden, np.uint8(IGNORE_INDEX), mask)


@cache
def readers_source() -> str:
    """Return a digest of the code of this package that reads images, masks and annotations."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    folders = [package / "datasets", package / "images"]
    files = [package / "labels.py", *(path for f in folders for path in sorted(f.rglob("*.py")))]
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def as_sample(image: np.ndarray, mask: np.ndarray) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """Return an image uint8 or uint16 [H, W, C] and its mask uint8 [H, W] as a sample."""
    mask = without_missing(mask, image)
    return tv_tensors.Image(as_tensor(image)), tv_tensors.Mask(torch.from_numpy(mask))


def check_sizes(image: np.ndarray, mask: np.ndarray, image_name: object, name: object) -> None:
    """Raise InputError unless the mask [H, W] has the height and width of its image [H, W, C]."""
    if image.shape[:2] != mask.shape:
        exif = " as its EXIF data turn it" if orientation(str(image_name)) > 4 else ""
        raise InputError(
            f"{name}: the mask has {mask.shape[1]} x {mask.shape[0]} pixels, its image "
            f"{image_name} has {image.shape[1]} x {image.shape[0]}{exif}"
        )


def checked_sample(dataset: BaseDataset, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """Return a sample with its types, sizes and mask values checked.

    Args:
        dataset: Any; nothing is taken for granted of its items.
        index: Which sample.

    Returns:
        (image uint8 [C, H, W], or float32 of 0 to 255 where the dataset's format has 16 bits;
        mask uint8 [H, W] of class ids and 255).

    Raises:
        InputError: The item is anything else.
    """
    name, sample = dataset.name(index), dataset[index]
    dtype = torch.float32 if dataset.format.bits == 16 else torch.uint8
    image, mask = sample if isinstance(sample, tuple) and len(sample) == 2 else (sample, None)
    if not (
        isinstance(image, tv_tensors.Image)
        and isinstance(mask, tv_tensors.Mask)
        and image.dtype == dtype
        and mask.dtype == torch.uint8
        and image.ndim == 3
        and image.shape[1:] == mask.shape
    ):
        parts = [
            f"{type(part).__name__} {getattr(part, 'dtype', '')} {[*getattr(part, 'shape', [])]}"
            for part in (image, mask)
        ]
        raise InputError(
            f"{name}: found {' and '.join(parts)}; a sample is a tv_tensors.Image of "
            f"{dtype} [C, H, W] and a tv_tensors.Mask of torch.uint8 [H, W], of one size"
        )
    check_values(mask.numpy(), dataset.labels, name)
    return image, mask


def in_threads(function: Callable[[int], Any], items: Sequence[int]) -> Generator[Any, None, None]:
    """Yield `function(item)` in order, from threads: decoding images releases Python's lock."""
    with ThreadPoolExecutor(available_cpus()) as pool:
        yield from pool.map(function, items)
