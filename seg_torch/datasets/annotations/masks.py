"""Exports as images and masks: of Roboflow, of CVAT and of labelme's script labelme2voc.py."""

import csv
import logging
import posixpath
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from unicodedata import normalize

import numpy as np

from seg_torch.datasets import base
from seg_torch.datasets.annotations import annotated
from seg_torch.datasets.folder import read_palette_mask
from seg_torch.errors import InputError
from seg_torch.files import is_hidden
from seg_torch.images.read import IMAGE_SUFFIXES, image_size
from seg_torch.labels import IGNORE_INDEX, VOC_PALETTE, Labels

log = logging.getLogger(__name__)

MASK, LISTS = "_mask.png", "ImageSets/Segmentation"


def roboflow(
    root: str | Path, split: str, val_fraction: float = 0.2, seed: int = 0
) -> base.SegmentationDataset:
    """Return a dataset that Roboflow exported as "Semantic Segmentation Masks".

    `root` holds the folders `train`, `valid` and `test`, or some of them, each with images,
    a mask `NAME_mask.png` of each and `_classes.csv`: the pixel value of each class, and its name.
    The classes are in the order of these values; 255 is not labelled, unless it is a class.

    Args:
        root: The dataset's folder.
        split: "train", "val" or "test".
        val_fraction: Fraction of the images in val, where there is no `valid`.
        seed: Seed of that random split.

    Returns:
        The samples of the split.

    Raises:
        InputError: The split is unknown, there is no `_classes.csv`, two of them differ, or an
            image is missing.
    """
    source = "export Semantic Segmentation Masks from Roboflow and unpack it there"
    listing = "_classes.csv"
    home, files = annotated.files_in(root, (listing,), "A Roboflow export", listing, source)
    classes = read_csv(home / files[0])
    for file in files[1:]:
        if read_csv(home / file) != classes:
            raise InputError(f"{home / file}: other classes than in {home / files[0]}")
    masks = [file.removesuffix(MASK) for file in base.list_files(home, (MASK,))]
    for place in map(posixpath.dirname, files):
        there = [name for name in masks if name.startswith(f"{place}/")]
        annotated.refuse_empty(home / place, base.split_of(place), there)
    others = [f for f in base.list_files(home, IMAGE_SUFFIXES) if not f.lower().endswith(MASK)]
    images, with_mask = _by_name(home, others), {normalize("NFC", name): name for name in masks}
    missing = [f"{home}/{mask}{MASK}" for name, mask in with_mask.items() if name not in images]
    what = "no image of its name beside it"
    base.raise_problems(missing, f"masks have {what}", what)
    missing = [image for name, image in images.items() if name not in with_mask]
    what = f"no mask NAME{MASK} beside "
    base.raise_problems(missing, f"images have {what}them", f"{what}it")
    samples = [
        annotated.Annotated(
            mask,
            images[name],
            f"{home}/{mask}{MASK}",
            split=base.split_of(f"{posixpath.dirname(name)}/"),
        )
        for name, mask in with_mask.items()
    ]
    chosen = annotated.choose_split(home, samples, split, val_fraction, seed)
    ids = {IGNORE_INDEX: IGNORE_INDEX} | {value: i for i, value in enumerate(classes)}
    with base.parsing(home / files[0]):
        labels = Labels(tuple(classes.values()))
    pairs = (sample[:3] for sample in chosen)
    dataset = base.SegmentationDataset(pairs, labels, base.mapped_masks(ids))
    dataset.white_is_a_class = f"say so in each {listing}:\n0, {{0}}\n255, {{1}}"
    return dataset


def read_csv(path: Path) -> dict[int, str]:
    """Return the class names in a `_classes.csv` by pixel value, in order.

    Raises:
        InputError: A line is not "value, name".
    """
    with base.parsing(path):
        first, *rows = csv.reader(base.read_list(path))
        if first[0].strip() != "Pixel Value":
            raise InputError(f"its first line is {first}, not Pixel Value, Class")
        classes = dict(sorted((int(value), name.strip()) for value, name in rows))
        if not classes or min(classes) < 0 or max(classes) > 255:
            raise InputError(f"pixel values {[*classes]}; masks hold 0 to 255")
        return classes


def cvat(
    root: str | Path, split: str, val_fraction: float = 0.2, seed: int = 0
) -> base.SegmentationDataset:
    """Return a dataset that CVAT exported as "Segmentation mask 1.1", with "Save images".

    `root` holds `labelmap.txt`, `JPEGImages`, `SegmentationClass` and
    `ImageSets/Segmentation/*.txt`. The masks have the colours of `labelmap.txt`, whose lines are
    the classes (`name:R,G,B:parts:actions`), `background` among them. CVAT writes no mask of a
    frame without objects; a listed image without one is background. Lists named train, val (or
    valid) and test, as the subsets of CVAT's tasks, make the split; else it is made as in `folder`.

    Args:
        root: The dataset's folder.
        split: "train", "val" or "test".
        val_fraction: Fraction of the images in val, where no lists are given.
        seed: Seed of that random split.

    Returns:
        The samples of the split.

    Raises:
        InputError: The split is unknown, something is missing in `root`, a line of `labelmap.txt`
            is malformed, or a listed image or mask does not exist.
    """
    source = 'export "Segmentation mask 1.1" with "Save images" from CVAT and unpack it there'
    entries = ["labelmap.txt", "JPEGImages", "SegmentationClass"]
    labelmap, images, masks = base.find(root, "A CVAT export", entries, source)
    labels = read_labelmap(labelmap)
    read_mask = partial(base.read_colour_mask, palette=labels.palette)
    empty = "background" in labels.names
    pairs = _pairs(images, masks, split, val_fraction, seed, empty)
    return CvatDataset(pairs, labels, read_mask)


class CvatDataset(base.SegmentationDataset):
    """Images with masks of colours; one without objects stands in for its mask."""

    white_is_a_class = ""

    def mask(self, index: int) -> np.ndarray:
        """Return the mask alone, uint8 [H, W], with every value checked."""
        pair = self.pairs[index]
        if pair.mask != pair.image:
            return super().mask(index)
        size = image_size(pair.image) or self.image(index).shape[:2]
        return np.full(size, self.labels.names.index("background"), np.uint8)


def labelme_voc(
    root: str | Path, split: str, val_fraction: float = 0.2, seed: int = 0
) -> base.SegmentationDataset:
    """Return a dataset that labelme's script labelme2voc.py made.

    `root` holds `class_names.txt`, one class per line in the order of the ids, `JPEGImages`, and
    `SegmentationClassPNG` or `SegmentationClass` with palette PNG files; 255 is not labelled.
    `ImageSets/Segmentation/{train,val,test}.txt`, where they exist, make the split; else it is
    made as in `folder`.

    Args:
        root: The dataset's folder.
        split: "train", "val" or "test".
        val_fraction: Fraction of the images in val, where no lists are given.
        seed: Seed of that random split.

    Returns:
        The samples of the split.

    Raises:
        InputError: The split is unknown, something is missing in `root`, or an image or mask does
            not exist.
    """
    source = "convert labelme's annotations with its script labelme2voc.py"
    # Older versions of the script wrote arrays (.npy) to SegmentationClass.
    png = Path(root).expanduser() / "SegmentationClassPNG"
    folder = "SegmentationClassPNG" if png.is_dir() else "SegmentationClass"
    entries = ["class_names.txt", "JPEGImages", folder]
    classes, images, masks = base.find(root, "An export of labelme2voc.py", entries, source)
    names = [name for name in base.read_list(classes) if name != annotated.IGNORED]
    names = ["background" if name == annotated.BACKGROUND else name for name in names]
    with base.parsing(classes):
        labels = Labels(tuple(names))
    pairs = _pairs(images, masks, split, val_fraction, seed)
    read_mask = partial(read_palette_mask, palette=labels.palette)  # the script's colours are VOC's
    return base.SegmentationDataset(pairs, labels, read_mask)


def read_labelmap(path: Path) -> Labels:
    """Return the classes and colours of CVAT's `labelmap.txt`.

    Raises:
        InputError: A line is not `name:R,G,B:parts:actions`, two classes have one colour, or only
            some have one.
    """
    names, colours = [], []
    for line in base.read_list(path):
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"(.+?):(?:(\d{1,3}),(\d{1,3}),(\d{1,3}))?:[^:]*:[^:]*", line)
        if match is None:
            raise InputError(f"{path}: the line {line!r} is not name:R,G,B:parts:actions")
        names.append(match[1])
        if match[2]:
            colours.append([int(value) for value in match.groups()[1:]])
    if 0 < len(colours) < len(names):
        raise InputError(f"{path}: {len(colours)} of {len(names)} classes have a colour")
    twice = sorted({tuple(colour) for colour in colours if colours.count(colour) > 1})
    if twice:
        raise InputError(f"{path}: two classes have the colour {twice[0]}, give each its own")
    with base.parsing(path):
        # Datumaro leaves the colours out where they are those of VOC.
        palette = np.array(colours) if colours else VOC_PALETTE[: len(names)]
        return Labels(tuple(names), palette)


def _by_name(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """Return the paths of files below a folder by their names without suffix.

    Raises:
        InputError: Two have the same name.
    """
    paths: dict[str, str] = {}
    problems = []
    for file in files:
        name = normalize("NFC", annotated.name_of(file))
        if paths.setdefault(name, f"{folder}/{file}") != f"{folder}/{file}":
            problems.append(f"{paths[name]}: ambiguous, there is also {posixpath.basename(file)}")
    base.raise_problems(problems, "images have the name of another one")
    return paths


def _pairs(
    images: Path, masks: Path, split: str, val_fraction: float, seed: int, empty: bool = False
) -> list[tuple[str, str, str]]:
    """Return name, image and mask of the samples of a split.

    Args:
        images: The folder of the images.
        masks: The folder of the masks.
        split: As in `cvat`, like `val_fraction` and `seed`.
        val_fraction: Of the images.
        seed: Of the random split.
        empty: Whether a listed image without a mask stands in for it.
    """
    home = images.parent
    image_files = _by_name(images, base.list_files(images, IMAGE_SUFFIXES))
    mask_files = _by_name(masks, base.list_files(masks, (".png",)))
    splits = _listed_splits(home, mask_files, image_files)
    if empty:
        mask_files = {
            name: image_files[name] for name in splits if name in image_files
        } | mask_files
    missing = [f"{masks / name}.png" for name in splits if name not in mask_files]
    missing += [f"{images / name}.jpg" for name in splits if name not in image_files]
    what = "files are missing; an image and its mask have one name"
    base.raise_problems(missing, what, "no such file")
    samples = [
        annotated.Annotated(name, image_files[name], mask_files[name], split=of_split)
        for name, of_split in sorted(splits.items())
    ]
    if not samples:
        raise InputError(f"{masks}: no masks here")
    chosen = annotated.choose_split(home, samples, split, val_fraction, seed)
    return [sample[:3] for sample in chosen]


def _listed_splits(home: Path, masks: Iterable[str], images: Iterable[str]) -> dict[str, str]:
    """Return the split of each listed name, "" where no list says; without lists, of each mask.

    Raises:
        InputError: A name is in the lists of two splits.
    """
    paths = [path for path in sorted((home / LISTS).glob("*.txt")) if not is_hidden(path.name)]
    # One without the split of its name, such as default.txt, leaves it to `choose_split`.
    lists = {path.name: base.split_of(path.stem) for path in paths}
    splits: dict[str, str] = dict.fromkeys(masks, "") if not paths else {}
    unknown: set[str] = set()
    twice = []
    for path in paths:
        names = [normalize("NFC", line) for line in base.read_list(path)]
        annotated.refuse_empty(path, lists[path.name], names)
        if "train" in lists.values() and not lists[path.name]:
            unknown.update(names)  # such as those of VOC's trainval.txt
            continue
        for name in names:
            splits[name] = splits.get(name) or lists[path.name]
            if lists[path.name] not in ("", splits[name]):
                twice.append(f"{name}: in {path.name}, and in the list of {splits[name]}")
    base.raise_problems(twice, f"names are in two lists of {home / LISTS}")
    unused = sorted(unknown.union(masks, images) - splits.keys())
    if unused:
        some = ", ".join([*unused[:3], *["..."][: len(unused) > 3]])
        log.info("%s: left out: %d names that are in no split (%s)", home, len(unused), some)
    return splits
