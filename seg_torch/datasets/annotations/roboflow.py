"""Roboflow's export for semantic segmentation: images, masks and a list of classes in a folder."""

import csv
from pathlib import Path

from seg_torch.datasets import base
from seg_torch.datasets.annotations.annotated import Annotated, choose_split, files_in, name_of
from seg_torch.errors import InputError
from seg_torch.images.read import IMAGE_SUFFIXES
from seg_torch.labels import IGNORE_INDEX, Labels

MASK = "_mask.png"


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
    home, files = files_in(root, ("_classes.csv",), "A Roboflow export", "_classes.csv", source)
    classes = read_csv(home / files[0])
    for file in files[1:]:
        if read_csv(home / file) != classes:
            raise InputError(f"{home / file}: other classes than in {home / files[0]}")
    masks = [file.removesuffix(MASK) for file in base.list_files(home, (MASK,))]
    others = [f for f in base.list_files(home, IMAGE_SUFFIXES) if not f.lower().endswith(MASK)]
    images = {name_of(file): file for file in others}
    missing = [f"{home / name}{MASK}" for name in masks if name not in images]
    base.raise_problems(missing, "masks have no image of their name beside them")
    samples = [
        Annotated(name, f"{home}/{images[name]}", f"{home}/{name}{MASK}", split=base.split_of(name))
        for name in masks
    ]
    chosen = choose_split(home, samples, split, val_fraction, seed)
    ids = {IGNORE_INDEX: IGNORE_INDEX} | {value: i for i, value in enumerate(classes)}
    with base.parsing(home / files[0]):
        labels = Labels(tuple(classes.values()))
    pairs = [sample[:3] for sample in chosen]
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
