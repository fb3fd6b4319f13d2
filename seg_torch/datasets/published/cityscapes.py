"""Cityscapes: the fine annotations with their 19 training classes."""

from functools import partial
from pathlib import Path

import numpy as np

from seg_torch.datasets import base
from seg_torch.errors import InputError
from seg_torch.labels import IGNORE_INDEX

CITYSCAPES_LABELS = base.published_labels("cityscapes")
LABEL_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
SOURCE = (
    "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from "
    "https://www.cityscapes-dataset.com/downloads/ (registration needed)"
)

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
    looked_up = table.take(ids.astype(np.uint8))
    if (looked_up == base.NOT_ALLOWED).any() or ids.min(initial=0) < -1 or ids.max(initial=0) > 255:
        raise InputError(f"not Cityscapes ids: {np.unique(ids)[:10].tolist()}")
    return looked_up


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
    entries = [f"leftImg8bit/{split}", f"gtFine/{split}"]
    images, masks = base.find(root, "Cityscapes", entries, SOURCE)
    pairs = base.pair_files(images, masks, "_leftImg8bit.png", "_gtFine_labelIds.png")
    read_mask = partial(base.read_mapped_mask, table=_TO_TRAIN_ID)
    return base.SegmentationDataset(pairs, CITYSCAPES_LABELS, read_mask)
