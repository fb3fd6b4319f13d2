"""Cityscapes: the fine annotations with their 19 training classes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from seg_torch.datasets import base
from seg_torch.errors import InputError
from seg_torch.labels import IGNORE_INDEX, Labels

# name: (label id, colour), in the order of the train ids
CITYSCAPES_CLASSES = {
    "road": (7, (128, 64, 128)),
    "sidewalk": (8, (244, 35, 232)),
    "building": (11, (70, 70, 70)),
    "wall": (12, (102, 102, 156)),
    "fence": (13, (190, 153, 153)),
    "pole": (17, (153, 153, 153)),
    "traffic light": (19, (250, 170, 30)),
    "traffic sign": (20, (220, 220, 0)),
    "vegetation": (21, (107, 142, 35)),
    "terrain": (22, (152, 251, 152)),
    "sky": (23, (70, 130, 180)),
    "person": (24, (220, 20, 60)),
    "rider": (25, (255, 0, 0)),
    "car": (26, (0, 0, 142)),
    "truck": (27, (0, 0, 70)),
    "bus": (28, (0, 60, 100)),
    "train": (31, (0, 80, 100)),
    "motorcycle": (32, (0, 0, 230)),
    "bicycle": (33, (119, 11, 32)),
}
CITYSCAPES_LABELS = Labels(
    tuple(CITYSCAPES_CLASSES), np.array([colour for _, colour in CITYSCAPES_CLASSES.values()])
)
LABEL_IDS = [label_id for label_id, _ in CITYSCAPES_CLASSES.values()]

# Label ids run from 0 to 33; -1, the licence plate, is 255 in 8 bits. Those without a train id are
# void.
_TO_TRAIN_ID = base.id_table(
    dict.fromkeys([*range(34), 255], IGNORE_INDEX) | {id_: i for i, id_ in enumerate(LABEL_IDS)}
)
# Void becomes 0, "unlabeled".
_TO_LABEL_ID = base.id_table({**dict(enumerate(LABEL_IDS)), IGNORE_INDEX: 0})


def to_train_ids(label_ids: np.ndarray) -> np.ndarray:
    """Return the train ids, 0 to 18 and 255, of label ids.

    Args:
        label_ids: Values -1 to 33, any integer type and shape.

    Returns:
        uint8, the same shape.

    Raises:
        InputError: A value is out of range.
    """
    return _look_up(_TO_TRAIN_ID, label_ids)


def to_label_ids(train_ids: np.ndarray) -> np.ndarray:
    """Return the label ids of train ids, the form that the benchmark's server takes.

    Args:
        train_ids: Values 0 to 18 and 255, any integer type and shape; 255 becomes 0, unlabeled.

    Returns:
        uint8, the same shape.

    Raises:
        InputError: A value is out of range.
    """
    return _look_up(_TO_LABEL_ID, train_ids)


def _look_up(table: np.ndarray, ids: np.ndarray) -> np.ndarray:
    found = table.take(ids.astype(np.uint8))
    if (found == base.NOT_ALLOWED).any() or ids.min(initial=0) < -1 or ids.max(initial=0) > 255:
        raise InputError(f"not Cityscapes ids: {np.unique(ids)[:10].tolist()}")
    return found


def cityscapes(root: str | Path, split: str) -> base.SegmentationDataset:
    """Return Cityscapes (Cordts et al., CVPR 2016): 2048 x 1024, 19 classes.

    2,975 train, 500 val.

    `root` holds `leftImg8bit/{train,val}/CITY/*_leftImg8bit.png` and
    `gtFine/{train,val}/CITY/*_gtFine_labelIds.png`. The labels of the test images are not
    public, so the test split is val.

    Args:
        root: The dataset's folder.
        split: "train", "val" or "test".

    Returns:
        The samples of the split.

    Raises:
        InputError: The split is unknown, there is no such dataset, or a mask has no image.
    """
    split = base.val_for_test(split, "Cityscapes")
    folder = base.find_root(
        root,
        "Cityscapes",
        [f"leftImg8bit/{split}", f"gtFine/{split}"],
        "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from "
        "https://www.cityscapes-dataset.com/downloads/ (registration needed)",
    )
    pairs = base.pair_files(
        folder / "leftImg8bit" / split,
        folder / "gtFine" / split,
        "_leftImg8bit.png",
        "_gtFine_labelIds.png",
    )
    read_mask = partial(base.read_mapped_mask, table=_TO_TRAIN_ID)
    return base.SegmentationDataset(pairs, CITYSCAPES_LABELS, read_mask)
