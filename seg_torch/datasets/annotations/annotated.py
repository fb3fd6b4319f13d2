"""What the formats of annotation tools share: shapes that are drawn when a sample is asked for.

A format is a function that reads the files of an `AnnotatedFolder` once, and one that draws one of
its shapes. Later shapes lie on top of earlier ones; a format with another rule sorts them.
"""

import hashlib
import itertools
import json
import logging
import os
import posixpath
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import normalize

import numpy as np
import torch
from PIL import Image, ImageDraw

from seg_torch.datasets import base
from seg_torch.datasets.folder import split_names
from seg_torch.errors import InputError
from seg_torch.images.convert import turned
from seg_torch.images.read import IMAGE_SUFFIXES, image_size, orientation
from seg_torch.labels import IGNORE_INDEX, Labels

log = logging.getLogger(__name__)

# How labelme calls what is no object, and pixels that no loss shall count.
BACKGROUND, IGNORED = "_background_", "__ignore__"
# A change in one of these files is noticed.
TEXT_SUFFIXES = (".json", ".txt", ".yaml", ".yml")
# Points so far outside, as a share of the image's sides, are cut off; points beyond belong to
# another image, or to another size of it.
MARGIN = 0.05


class Annotated(NamedTuple):
    """An image and what is drawn on it.

    Attributes:
        name: Unique in its split: the image's path below the root, without suffix unless two images
            differ in nothing else.
        image: The path of its file.
        file: The path of the file that annotates it, or of its mask.
        shapes: Class name and shape of each, in the order of drawing, as JSON: a shape is what
            the format's function draws.
        split: "train", "val", "test", or "" where the format does not say.
        size: (width, height) by the annotation, (0, 0) where it does not say.
    """

    name: str
    image: str
    file: str
    shapes: bytes = b""
    split: str = ""
    size: tuple[int, int] = (0, 0)


class AnnotatedFolder:
    """The files of a dataset, and what the reader of their format found in them.

    Args:
        home: The dataset's folder.
        files: The files of annotations in it, relative to it.
        images: The images in it, relative to it.

    Attributes:
        samples: All annotated images by path and split.
        problems: What is wrong with the annotations.
        left_out: What is not read, by the reason.
    """

    def __init__(self, home: Path, files: Sequence[str], images: Sequence[str]) -> None:
        self.home, self.files = home, files
        self.samples: dict[tuple[str, str], Annotated] = {}
        self.problems: list[str] = []
        self.left_out: dict[str, list[str]] = {}
        self.images: dict[str, list[str]] = {}  # by the last part of their path
        for image in images:
            self.images.setdefault(same_name(posixpath.basename(image)), []).append(image)

    def leave_out(self, reason: str, name: object) -> None:
        """Note that something is not read, for one message about all of these."""
        self.left_out.setdefault(reason, []).append(str(name))

    def contents(self, recognise: Callable[[Any], bool], what: str) -> Iterator[tuple[str, Any]]:
        """Yield name and content of each JSON file whose content is recognised.

        Raises:
            InputError: There is none; `what` says of what.
        """
        recognised = False
        for file in self.files:
            content = None
            with self.collected():
                content = base.read_json(self.home / file)
                if not recognise(content):
                    self.leave_out(f"JSON files that hold no {what}", file)
            if recognise(content):
                recognised = True
                yield file, content
        if not recognised and not self.problems:
            raise InputError(f"{self.home}: {', '.join(self.files[:5])} hold no {what}")

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Add an InputError to the problems, and go on after the block."""
        try:
            yield
        except InputError as error:
            self.problems.append(str(error))

    @contextmanager
    def part(self, file: str, part: str = "") -> Iterator[None]:
        """Add what goes wrong in a part of a file to the problems, and go on after the block."""
        with self.collected(), base.parsing(self.home / file, part):
            yield

    def find_image(self, name: str, beside: str) -> str:
        r"""Return the path below the folder of an image.

        Args:
            name: As in the annotation, a path with `/` or `\`, from whatever folder.
            beside: The annotation's file, relative to `home`: of several images of that name, the
                one in its folder counts, or the one in a folder of its split.

        Raises:
            InputError: There is no such image, or there are several.
        """
        if not isinstance(name, str):
            raise InputError(f"{name!r} is no name of an image")
        wanted = posixpath.normpath(name.replace("\\", "/"))
        named = self.images.get(same_name(posixpath.basename(wanted)), [])
        in_folder = posixpath.normpath(posixpath.join(posixpath.dirname(beside), wanted))
        if in_folder in named:
            return in_folder
        # A path from another machine ends in the same folders.
        common = [_common_parts(image, wanted) for image in named]
        named = [image for image, parts in zip(named, common, strict=True) if parts == max(common)]
        split = base.split_of(beside)
        of_split = [i for i in named if base.split_of(f"{posixpath.dirname(i)}/") == split]
        candidates = of_split or named
        if len(candidates) == 1:
            return candidates[0]
        what = f"may be any of {', '.join(candidates[:3])}" if candidates else "no such image"
        raise InputError(f"{name}: {what} in {self.home}")

    def add(
        self,
        name: str,
        image: str,
        file: str,
        shapes: Sequence[tuple[str, Any]],
        split: str,
        size: tuple[int, int] = (0, 0),
    ) -> None:
        """Add an annotated image.

        Args:
            name: A path below `home` whose suffix does not count.
            image: The path of the image, below `home` or absolute.
            file: In the same way that of the annotations.
            shapes: Class name and shape of each, as plain data.
            split: As in `Annotated`, like `size`.
            size: (width, height).

        Raises:
            InputError: The image has other annotations in the same split.
        """
        if not all(0 <= side < 2**31 for side in size):
            raise InputError(f"its size is said to be {size[0]} x {size[1]}")
        content = json.dumps(shapes, separators=(",", ":")).encode()
        paths = os.path.join(self.home, image), os.path.join(self.home, file)
        sample = Annotated(name_of(name), *paths, content, split, size)
        first = self.samples.setdefault((paths[0], split), sample)
        if first[2:4] != sample[2:4]:
            raise InputError(f"{image} is annotated in {first.file}, too; keep one of the two")


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

    white_is_a_class = ""

    def __init__(
        self,
        samples: list[Annotated],
        labels: Labels,
        draw: Draw,
        values: dict[str, int],
        rest: int,
    ) -> None:
        # The function is part of what `check` remembers a result by, like what it draws.
        super().__init__((s[:3] for s in samples), labels, draw)  # type: ignore[arg-type]
        self.draw, self.values, self.rest = draw, values, rest
        content = bytearray().join(sample.shapes for sample in samples)
        self._content = torch.frombuffer(content, dtype=torch.uint8)
        self._ends = torch.tensor([0, *(len(sample.shapes) for sample in samples)]).cumsum(0)
        self._sizes = torch.tensor([sample.size for sample in samples])

    def fingerprint(self) -> str | None:
        """Return what changes with the files, with how they are read and with all shapes."""
        files = super().fingerprint()
        if files is None:
            return None
        digest = hashlib.sha256(f"{files} {self.values} {self.rest}".encode())
        for part in (self._content, self._ends, self._sizes):
            digest.update(part.numpy().tobytes())
        return digest.hexdigest()

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
        stated, turn = tuple(self._sizes[index].tolist()), 1
        if stated == (height, width) != (width, height):  # of the photo as it is stored
            turn = orientation(pair.image)
        if turn in (5, 6, 7, 8):
            width, height = stated
        elif stated not in ((0, 0), (width, height)):
            raise InputError(
                f"{pair.mask}: it was made for {pair.image} of {stated[0]} x {stated[1]} pixels, "
                f"the file has {width} x {height}"
            )
        mask = Image.new("L", (width, height), self.rest)
        for number, (name, shape) in enumerate(self.shapes(index), 1):
            with base.parsing(pair.mask, f"{pair.image.name}, shape {number} ({name}): "):
                self.draw(mask, self.values[name], shape)
        return turned(np.array(mask), turn)


def files_in(
    root: str | Path, suffixes: tuple[str, ...], title: str, expected: str, source: str
) -> tuple[Path, list[str]]:
    """Return a dataset's folder and the files in it that end in one of the suffixes.

    Raises:
        InputError: There is no such file; see `base.find`.
    """
    home = Path(root).expanduser()
    files = base.list_files(home, suffixes)
    if not files:
        base.find(home, title, [expected], source)
    return home, files


def dataset(
    home: Path,
    files: Sequence[str],
    read: Callable[[AnnotatedFolder], list[str]],
    draw: Draw,
    split: str,
    background: str | None,
    val_fraction: float,
    seed: int,
    kind: type[AnnotatedDataset] = AnnotatedDataset,
    lists: Path | None = None,
) -> AnnotatedDataset:
    """Return the samples of a split.

    Args:
        home: The dataset's folder.
        files: The files of annotations in it, relative to it.
        read: Adds their images to the folder, and returns the names of the classes in order.
        draw: Draws a shape.
        split: "train", "val" or "test".
        background: Name of the class of pixels outside of all shapes, the first one unless the
            annotations have a class of that name; `None`: these pixels are not labelled.
        val_fraction: Fraction of the images in val, where nothing else makes the split.
        seed: Seed of that random split.
        kind: The class of the result.
        lists: The folder of `train.txt` and `val.txt`, if it is another one.

    Raises:
        InputError: There are no images or no classes for `split`, or annotations are malformed.
    """
    stats = ((file, (home / file).stat()) for file in base.list_files(home, TEXT_SUFFIXES))
    stamps = tuple((file, s.st_size, s.st_mtime_ns) for file, s in stats)
    images = tuple(base.list_files(home, IMAGE_SUFFIXES))
    samples, names = _read_once(read, home, tuple(files), images, stamps)
    prefix = os.path.join(home, "")
    if not all(sample.file.startswith(prefix) for sample in samples):
        # The stamps are none of files elsewhere, to which YOLO's data.yaml may point.
        samples, names = _read_once.__wrapped__(read, home, tuple(files), images, stamps)
    rest, values = IGNORE_INDEX, {IGNORED: IGNORE_INDEX}
    names = [name for name in names if name != IGNORED]
    if background is not None:
        called = [name for name in names if name in (background, BACKGROUND)]
        names = names if called else [background, *names]
        rest = names.index(called[0] if called else background)
        values |= {BACKGROUND: rest}
    with base.parsing(home):
        labels = Labels(tuple(names))
    values |= {name: value for value, name in enumerate(names)}
    chosen = choose_split(lists or home, samples, split, val_fraction, seed)
    return kind(chosen, labels, draw, values, rest)


@lru_cache(maxsize=1)  # of one split for the next ones, unless a file or an image changes
def _read_once(
    read: Callable[[AnnotatedFolder], list[str]],
    home: Path,
    files: Sequence[str],
    images: Sequence[str],
    _stamps: tuple[tuple[str, int, int], ...],
) -> tuple[list[Annotated], list[str]]:
    """Return all images, and the names of the classes in order."""
    folder = AnnotatedFolder(home, files, images)
    names = read(folder)
    for image, split in folder.samples:
        if split == "" and any((image, other) in folder.samples for other in base.SPLITS):
            folder.problems.append(f"{image}: one of two annotations is in no split; keep one")
    base.raise_problems(folder.problems, f"problems in the annotations of {home}")
    if not folder.samples:
        raise InputError(f"{home}: no annotated images here")
    samples = [*folder.samples.values()]
    prefix = os.path.join(home, "")
    used = {path.removeprefix(prefix) for sample in samples for path in sample[1:3]}
    for image in set(images) - used:
        folder.leave_out("images without annotation", image)
    for reason, left_out in folder.left_out.items():
        several = ", ".join([*sorted(left_out)[:3], *["..."][: len(left_out) > 3]])
        log.info("%s: left out: %d %s (%s)", home, len(left_out), reason, several)
    count = Counter((sample.name, sample.split) for sample in samples)
    ambiguous = {name for (name, _), number in count.items() if number > 1}
    return [_with_suffix(s) if s.name in ambiguous else s for s in samples], names


def _with_suffix(sample: Annotated) -> Annotated:
    """Return the sample of an image whose name another one has but for the suffix."""
    return sample._replace(name=sample.name + posixpath.splitext(sample.image)[1])


def choose_split(
    home: Path, samples: Sequence[Annotated], split: str, val_fraction: float, seed: int
) -> list[Annotated]:
    """Return the samples of a split.

    Where the format says of samples that they are for training and of others that they are for
    validation, that counts. Else `train.txt` and `val.txt` make the split or, without them, a
    hash of each name; see `folder.split_names`. A test set is kept apart in both cases.

    Raises:
        InputError: The split is unknown, or has no samples.
    """
    by_split: dict[str, list[Annotated]] = {}
    for sample in samples:
        by_split.setdefault(sample.split, []).append(sample)
    if "" in by_split and len(by_split) > 1:
        names = ", ".join(sample.name for sample in by_split[""][:3])
        log.info("%s: %d images are in no split: %s", home, len(by_split[""]), names)
        if "train" not in by_split:
            by_split["train"] = by_split.pop("")
    if (split == "test" and "test" in by_split) or {"train", "val"} <= by_split.keys():
        return by_split[base.val_for_test(split, home, "test" in by_split)]
    rest = {sample.name: sample for sample in samples if sample.split != "test"}
    if not rest:
        raise InputError(f"{home}: only test images here, and none to train on")
    return [rest[name] for name in split_names(home, list(rest), split, val_fraction, seed)]


def _common_parts(first: str, second: str) -> int:
    """Return in how many of their last parts two paths agree."""
    parts = zip(reversed(first.split("/")), reversed(second.split("/")), strict=False)
    return len([*itertools.takewhile(lambda pair: pair[0] == pair[1], parts)])


def refuse_empty(path: str | Path, split: str, images: Collection[object]) -> None:
    """Raise InputError if what stands for train or val has no images: chance would fill it."""
    if split in ("train", "val") and not images:
        raise InputError(f"{path}: no images for {split} here; fill it, or remove it")


def same_name(name: str) -> str:
    """Return what names of one file have in common: Windows and macOS write it in other ways."""
    return normalize("NFC", name).casefold()


def name_of(image: str) -> str:
    """Return what a sample is called: the path of its image without suffix."""
    return posixpath.splitext(image)[0]


def pairs(points: Any) -> np.ndarray:
    """Return points (x, y), float64 [N, 2], of pairs or of x0, y0, x1, y1 ...

    Raises:
        InputError: They are something else.
    """
    try:
        array = np.array(points, np.float64)
    except (TypeError, ValueError):
        array = np.array(np.nan)
    if array.ndim == 1 and array.size % 2 == 0:
        array = array.reshape(-1, 2)
    if array.ndim != 2 or array.shape[1] != 2:
        text = textwrap.shorten(str(points), 80, placeholder=" ...")
        raise InputError(f"its points are not pairs of x and y: {text}")
    return array


def polygon_area(points: np.ndarray) -> float:
    """Return the area of a polygon of points [N, 2], by the shoelace formula."""
    x, y = points.T
    return float(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2)


def checked_points(mask: Image.Image, points: Any, at_least: int) -> list[tuple[float, float]]:
    """Return points (x, y) in pixels as Pillow takes them.

    Raises:
        InputError: There are too few, or one is far outside of the image.
    """
    array = pairs(points)
    if len(array) < at_least:
        raise InputError(f"{len(array)} points, but it takes at least {at_least}")
    margin = MARGIN * np.array(mask.size) + 1
    inside = ((array >= -margin) & (array <= mask.size + margin)).all(axis=1)
    if not inside.all():
        x, y = array[~inside][0]
        size = f"{mask.width} x {mask.height} pixels"
        raise InputError(f"the point ({x:g}, {y:g}) is outside of the image of {size}")
    return [(x, y) for x, y in array.tolist()]


def draw_polygon(mask: Image.Image, value: int, points: Any) -> None:
    """Fill a polygon of points (x, y) in pixels, as labelme does: with its outline."""
    ImageDraw.Draw(mask).polygon(checked_points(mask, points, 3), fill=value, outline=value)


def draw_pixels(mask: Image.Image, value: int, pixels: np.ndarray, x: int = 0, y: int = 0) -> None:
    """Draw where an array [h, w] is not 0, with its upper left corner at (x, y)."""
    mask.paste(value, (x, y), Image.fromarray((pixels != 0).astype(np.uint8) * 255))
