"""Exports as images and masks: of Roboflow, of CVAT and of labelme's script labelme2voc.py."""

import csv
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from seg_torch.datasets import base
from seg_torch.datasets.annotations import annotated
from seg_torch.datasets.folder import read_palette_mask
from seg_torch.errors import InputError
from seg_torch.images.read import IMAGE_SUFFIXES
from seg_torch.labels import IGNORE_INDEX, Labels

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
    others = [f for f in base.list_files(home, IMAGE_SUFFIXES) if not f.lower().endswith(MASK)]
    images = _by_name(home, others)
    missing = [f"{home / name}{MASK}" for name in masks if name not in images]
    what = "no image of its name beside it"
    base.raise_problems(missing, f"masks have {what}", what)
    samples = [
        annotated.Annotated(n, images[n], f"{home}/{n}{MASK}", split=base.split_of(n))
        for n in masks
    ]
    chosen = annotated.choose_split(home, samples, split, val_fraction, seed)
    ids = {IGNORE_INDEX: IGNORE_INDEX} | {value: i for i, value in enumerate(classes)}
    with base.parsing(home / files[0]):
        labels = Labels(tuple(classes.values()))
    pairs = (sample[:3] for sample in chosen)
    return base.SegmentationDataset(pairs, labels, base.mapped_masks(ids))


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
    the classes (`name:R,G,B:parts:actions`), `background` among them. Lists named train, val and
    test, as the subsets of CVAT's tasks, make the split; else it is made as in `folder`.

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
    pairs = _pairs(images, masks, split, val_fraction, seed)
    return base.SegmentationDataset(pairs, labels, read_mask)


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
        InputError: A line is not `name:R,G,B:parts:actions`, or two classes have one colour.
    """
    names, colours = [], []
    for line in base.read_list(path):
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"(.+?):(\d{1,3}),(\d{1,3}),(\d{1,3}):[^:]*:[^:]*", line)
        if match is None:
            raise InputError(f"{path}: the line {line!r} is not name:R,G,B:parts:actions")
        names.append(match[1])
        colours.append([int(value) for value in match.groups()[1:]])
    twice = sorted({tuple(colour) for colour in colours if colours.count(colour) > 1})
    if twice:
        raise InputError(f"{path}: two classes have the colour {twice[0]}, give each its own")
    with base.parsing(path):
        return Labels(tuple(names), np.array(colours).reshape(-1, 3))


def _by_name(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """Return the paths of files below a folder by their names without suffix."""
    return {annotated.name_of(file): f"{folder}/{file}" for file in files}


def _pairs(
    images: Path, masks: Path, split: str, val_fraction: float, seed: int
) -> list[tuple[str, str, str]]:
    """Return name, image and mask of the samples of a split."""
    home = images.parent
    image_files = _by_name(images, base.list_files(images, IMAGE_SUFFIXES))
    mask_files = _by_name(masks, base.list_files(masks, (".png",)))
    splits = dict.fromkeys(mask_files, "")
    lists = sorted((home / LISTS).glob("*.txt"))
    if lists:
        # One without the split of its name, such as default.txt, leaves it to `choose_split`.
        known = {"train": "train", "val": "val", "validation": "val", "test": "test"}
        listed = {path: known.get(path.stem.lower(), "") for path in lists}
        if "train" in listed.values():  # then VOC's trainval.txt has nothing to add
            listed = {path: name for path, name in listed.items() if name}
        splits = {line: name for path, name in listed.items() for line in base.read_list(path)}
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
