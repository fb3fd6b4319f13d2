"""What the formats of annotation tools share: shapes that are drawn when a sample is asked for.

Each format reads its files once into `Annotated` images and names a function that draws one of its
shapes. Later shapes lie on top of earlier ones; a format with another rule sorts them.
"""

from __future__ import annotations

import json
import logging
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from seg_torch.datasets import base
from seg_torch.datasets.folder import split_names
from seg_torch.errors import InputError
from seg_torch.images.read import IMAGE_SUFFIXES, image_size
from seg_torch.labels import IGNORE_INDEX, Labels

log = logging.getLogger(__name__)

# How labelme calls what is no object, and pixels that no loss shall count.
BACKGROUND, IGNORED = "_background_", "__ignore__"
# Points so far outside, as a share of the image's sides, are cut off; points beyond belong to
# another image, or to another size of it.
MARGIN = 0.05


class Annotated(NamedTuple):
    """An image and what is drawn on it.

    Attributes:
        name: Unique in the dataset: the image's path below the root, without suffix.
        image: The path of its file.
        file: The path of the file that annotates it.
        shapes: Class name and shape of each, in the order of drawing, as JSON: a shape is what
            the format's function draws.
        split: "train", "val", "test", or "" where the format does not say.
        size: (width, height) by the annotation, (0, 0) where it does not say.
    """

    name: str
    image: str
    file: str
    shapes: bytes
    split: str = ""
    size: tuple[int, int] = (0, 0)


class Annotations(NamedTuple):
    """What the files of a dataset hold: all images, and the names of the classes in order."""

    samples: list[Annotated]
    names: list[str]


# Draws a shape of a class id on a mask: (mask, class id, shape).
Draw = Callable[[Image.Image, int, Any], None]


class AnnotatedDataset(base.SegmentationDataset):
    """Images whose masks are drawn from their annotations.

    The annotations are bytes in one tensor, which worker processes share: PyTorch moves it to
    shared memory where they are not forked.

    Args:
        samples: The images.
        labels: The classes.
        draw: Draws a shape; a module-level function.
        values: The mask value of each class name in the shapes.
        rest: The mask value of pixels outside of all shapes.
    """

    def __init__(
        self,
        samples: Sequence[Annotated],
        labels: Labels,
        draw: Draw,
        values: Mapping[str, int],
        rest: int,
    ) -> None:
        pairs = base.Pairs((sample.name, sample.image, sample.file) for sample in samples)
        # The function is part of what `check` remembers a result by.
        super().__init__(pairs, labels, draw)  # type: ignore[arg-type]
        self.draw, self.values, self.rest = draw, dict(values), rest
        ends = np.cumsum([0, *(len(sample.shapes) for sample in samples)])
        content = bytearray().join(sample.shapes for sample in samples)
        self._content = torch.frombuffer(content, dtype=torch.uint8)
        self._ends = torch.from_numpy(ends)
        self._sizes = torch.tensor([sample.size for sample in samples])

    def shapes(self, index: int) -> list[tuple[str, Any]]:
        """Return class name and shape of each annotation, in the order of drawing."""
        start, end = self._ends[index : index + 2].tolist()
        return json.loads(self._content[start:end].numpy().tobytes())

    def mask(self, index: int) -> np.ndarray:
        """Return the mask alone, uint8 [H, W].

        Raises:
            InputError: A shape cannot be drawn, or the image has another size than the annotation
                says; the message names file, image and shape.
        """
        pair = self.pairs[index]
        # A small file can claim any size: that of the image counts.
        height, width = image_size(pair.image) or self.image(index).shape[:2]
        stated = tuple(self._sizes[index].tolist())
        if stated not in ((0, 0), (width, height)):
            raise InputError(
                f"{pair.mask}: it was made for {pair.image} of {stated[0]} x {stated[1]} pixels, "
                f"the file has {width} x {height}"
            )
        mask = Image.new("L", (width, height), self.rest)
        for number, (name, shape) in enumerate(self.shapes(index), 1):
            with parsing(pair.mask, f"{pair.image.name}, shape {number} ({name}): "):
                self.draw(mask, self.values[name], shape)
        return np.array(mask)


def annotated(
    home: Path,
    annotations: Annotations,
    draw: Draw,
    split: str,
    background: str | None,
    val_fraction: float,
    seed: int,
    dataset: type[AnnotatedDataset] = AnnotatedDataset,
) -> AnnotatedDataset:
    """Return the samples of a split.

    Args:
        home: The dataset's folder.
        annotations: All of its images and classes.
        draw: Draws a shape.
        split: "train", "val" or "test".
        background: Name of the class of pixels outside of all shapes, the first one unless the
            annotations have a class of that name; `None`: these pixels are not labelled.
        val_fraction: Fraction of the images in val, where nothing else makes the split.
        seed: Seed of that random split.
        dataset: The class of the result.

    Raises:
        InputError: There are no images or no classes for `split`.
    """
    samples, names = annotations
    if not samples:
        raise InputError(f"{home}: no annotated images here")
    rest, values = IGNORE_INDEX, {IGNORED: IGNORE_INDEX}
    names = [name for name in names if name != IGNORED]
    if background is not None:
        own = [name for name in names if name in (background, BACKGROUND)]
        names = names if own else [background, *names]
        rest = names.index(own[0] if own else background)
        values |= {BACKGROUND: rest}
    try:
        labels = Labels(tuple(names))
    except InputError as error:
        raise InputError(f"{home}: {error}") from None
    values |= {name: value for value, name in enumerate(names)}
    return dataset(
        choose_split(home, samples, split, val_fraction, seed), labels, draw, values, rest
    )


def choose_split(
    home: Path, samples: Sequence[Annotated], split: str, val_fraction: float, seed: int
) -> list[Annotated]:
    """Return the samples of a split.

    Where the format says of samples that they are for training and of others that they are for
    validation, that counts. Else `train.txt` and `val.txt` make the split or, without them, a
    hash of each name; see `folder.split_names`. A test set is kept apart in both cases.
    """
    base.check_split(split)
    by_split: dict[str, list[Annotated]] = {}
    for sample in samples:
        by_split.setdefault(sample.split, []).append(sample)
    if split == "test" and "test" not in by_split and not (home / "test.txt").exists():
        split = base.val_for_test(split, str(home))
    if "" in by_split and len(by_split) > 1:
        log.info("%s: %d images are in no split of its own", home, len(by_split[""]))
    if (split == "test" and "test" in by_split) or {"train", "val"} <= by_split.keys():
        return by_split[split]
    rest = {sample.name: sample for sample in samples if sample.split != "test"}
    return [rest[name] for name in split_names(home, list(rest), split, val_fraction, seed)]


def split_of(path: str) -> str:
    """Return which split the words of a path stand for, "" where there are none.

    `train2017`, `training`, `valid`, `validation` and `instances_val2017.json` are understood.
    """
    words = r"(?<![a-z])(train|val|test)(?:ing|id|idation)?(?:[-_]?\d+)?(?![a-z])"
    found = re.findall(words, path.lower())
    return found[-1] if found else ""


def read_once(
    read: Callable[[Path, list[str]], Annotations], home: Path, files: Sequence[str]
) -> Annotations:
    """Return `read(home, files)`, remembered for the next split unless a file or image changes."""
    stats = ((file, (home / file).stat()) for file in files)
    stamps = tuple((file, s.st_size, s.st_mtime_ns) for file, s in stats)
    return _read(read, home, stamps, tuple(base.list_files(home, IMAGE_SUFFIXES)))


@lru_cache(maxsize=1)
def _read(
    read: Callable, home: Path, stamps: tuple[tuple[str, int, int], ...], _images: tuple[str, ...]
) -> Annotations:
    return read(home, [file for file, *_ in stamps])


def folder_of(
    root: str | Path, dataset: str, suffixes: tuple[str, ...], expected: str, source: str
) -> tuple[Path, list[str]]:
    """Return a dataset's folder and the files in it that end in one of the suffixes.

    Raises:
        InputError: There is no such file; see `base.find`.
    """
    home = Path(root).expanduser()
    files = base.list_files(home, suffixes)
    if not files:
        base.find(home, dataset, [expected], source)
    return home, files


@contextmanager
def parsing(file: str | Path, place: str = "") -> Iterator[None]:
    """Turn whatever goes wrong in reading a part of a file into an InputError that names both."""
    try:
        yield
    except KeyError as error:
        raise InputError(f"{file}: {place}{error} is missing") from None
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise InputError(f"{file}: {place}{reason}", pixels=getattr(error, "pixels", {})) from None


@contextmanager
def collected(problems: list[str]) -> Iterator[None]:
    """Add an InputError to the problems, and go on after the block."""
    try:
        yield
    except InputError as error:
        problems.append(str(error))


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


class ImageFiles:
    """The images below a folder, found by the names that annotations call them by.

    Args:
        home: The folder.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.by_name: dict[str, list[str]] = {}
        for file in base.list_files(home, IMAGE_SUFFIXES):
            self.by_name.setdefault(posixpath.basename(file), []).append(file)

    def find(self, name: str, beside: str) -> str:
        r"""Return the path below the folder of an image.

        Args:
            name: As in the annotation, a path with `/` or `\`, from whatever folder.
            beside: The annotation's file, relative to `home`: of several images of that name, the
                one in its folder counts, or the one in a folder of its split.

        Raises:
            InputError: There is no such image, or there are several.
        """
        wanted = posixpath.normpath(name.replace("\\", "/"))
        files = self.by_name.get(posixpath.basename(wanted), [])
        own = posixpath.normpath(posixpath.join(posixpath.dirname(beside), wanted))
        if own in files:
            return own
        same_end = [file for file in files if f"/{file}".endswith(f"/{wanted}")] or files
        of_split = [f for f in same_end if split_of(posixpath.dirname(f)) == split_of(beside)]
        found = of_split or same_end
        if len(found) == 1:
            return found[0]
        what = f"may be any of {', '.join(found[:3])}" if found else "no such image"
        raise InputError(f"{name}: {what} in {self.home}")


def name_of(image: str) -> str:
    """Return what a sample is called: the path of its image without suffix."""
    return posixpath.splitext(image)[0]


def encoded(shapes: Sequence[tuple[str, Any]]) -> bytes:
    """Return class names and shapes as an `Annotated` holds them."""
    return json.dumps(shapes, separators=(",", ":")).encode()


# Drawing


def checked_points(mask: Image.Image, points: Any, at_least: int) -> list[tuple[float, float]]:
    """Return points (x, y) in pixels as Pillow takes them.

    Raises:
        InputError: There are too few, or one is far outside of the image.
    """
    array = np.array(points, np.float64)
    if array.ndim == 1 and array.size % 2 == 0:  # x0, y0, x1, y1 ...
        array = array.reshape(-1, 2)
    if array.ndim != 2 or array.shape[1] != 2:
        raise InputError("its points are not pairs of x and y")
    if len(array) < at_least:
        raise InputError(f"{len(array)} points, but it takes at least {at_least}")
    margin = MARGIN * np.array(mask.size) + 1
    inside = ((array >= -margin) & (array <= mask.size + margin)).all(axis=1)
    if not inside.all():
        x, y = array[~inside][0]
        raise InputError(
            f"the point ({x:g}, {y:g}) is outside of the image of {mask.width} x {mask.height} "
            "pixels"
        )
    return [(x, y) for x, y in array.tolist()]


def draw_polygon(mask: Image.Image, value: int, points: Any) -> None:
    """Fill a polygon of points (x, y) in pixels, as labelme does: with its outline."""
    ImageDraw.Draw(mask).polygon(checked_points(mask, points, 3), fill=value, outline=value)


def draw_pixels(mask: Image.Image, value: int, pixels: np.ndarray, x: int = 0, y: int = 0) -> None:
    """Draw where an array [h, w] is not 0, with its upper left corner at (x, y)."""
    mask.paste(value, (x, y), Image.fromarray((pixels != 0).astype(np.uint8) * 255))
