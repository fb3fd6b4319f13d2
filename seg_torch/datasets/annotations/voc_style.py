"""Exports in the layout of PASCAL VOC: CVAT's "Segmentation mask 1.1", and labelme2voc's."""

import re
from functools import partial
from pathlib import Path

import numpy as np

from seg_torch.datasets import base
from seg_torch.datasets.annotations.annotated import (
    BACKGROUND,
    IGNORED,
    Annotated,
    choose_split,
    name_of,
)
from seg_torch.errors import InputError
from seg_torch.images.read import IMAGE_SUFFIXES
from seg_torch.labels import Labels

LISTS = "ImageSets/Segmentation"


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
    labelmap, *folders = base.find(root, "A CVAT export", entries, source)
    labels = read_labelmap(labelmap)
    read_mask = partial(base.read_colour_mask, palette=labels.palette)
    pairs = _pairs(folders[0], folders[1], split, val_fraction, seed)
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
    masks = "SegmentationClassPNG" if png.is_dir() else "SegmentationClass"
    entries = ["class_names.txt", "JPEGImages", masks]
    classes, *folders = base.find(root, "An export of labelme2voc.py", entries, source)
    names = [name for name in base.read_list(classes) if name != IGNORED]
    names = ["background" if name == BACKGROUND else name for name in names]
    with base.parsing(classes):
        labels = Labels(tuple(names))
    pairs = _pairs(folders[0], folders[1], split, val_fraction, seed)
    return base.SegmentationDataset(pairs, labels)


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


def _pairs(
    images: Path, masks: Path, split: str, val_fraction: float, seed: int
) -> list[tuple[str, str, str]]:
    """Return name, image and mask of the samples of a split."""
    home = images.parent
    image_files = {name_of(file): file for file in base.list_files(images, IMAGE_SUFFIXES)}
    mask_files = {name_of(file): file for file in base.list_files(masks, (".png",))}
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
    base.raise_problems(missing, "files are missing; an image and its mask have one name")
    samples = [
        Annotated(
            name, f"{images}/{image_files[name]}", f"{masks}/{mask_files[name]}", split=of_split
        )
        for name, of_split in sorted(splits.items())
    ]
    if not samples:
        raise InputError(f"{masks}: no masks here")
    chosen = choose_split(home, samples, split, val_fraction, seed)
    return [sample[:3] for sample in chosen]
