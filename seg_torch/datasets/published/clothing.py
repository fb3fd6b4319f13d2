"""Clothing Co-Parsing: street photos with every garment labelled."""

from pathlib import Path

import numpy as np

from seg_torch.datasets import base
from seg_torch.datasets.published.matlab import read_mat_mask

CLOTHING_LABELS = base.published_labels("clothing")
SOURCE = "git clone https://github.com/bearpaw/clothing-co-parsing"


def read_clothing_mask(path: Path) -> np.ndarray:
    """Return the variable `groundtruth` of an annotation file, uint8 [H, W]."""
    return read_mat_mask(path, "groundtruth")


def clothing(root: str | Path, split: str, limit: int | None = None) -> base.SegmentationDataset:
    """Return Clothing Co-Parsing (Yang, Luo, Lin, CVPR 2014): 1,004 annotated images, 59 classes.

    `root` holds `photos/*.jpg` and `annotations/pixel-level/*.mat`. A fifth of the annotated
    images, rounded up, is val and also test; the rest is train. The split is the one of
    scikit-learn's `train_test_split(images, test_size=0.2, random_state=0)` over the images in
    the order of their names.

    Args:
        root: The dataset's folder.
        split: "train", "val" or "test".
        limit: Take at most so many annotated images, the first by name.

    Returns:
        The samples of the split.

    Raises:
        InputError: The split is unknown, there is no such dataset, or an annotation has no image.
    """
    split = base.val_for_test(split, "Clothing Co-Parsing")
    entries = ["photos", "annotations/pixel-level"]
    images, masks = base.find(root, "Clothing Co-Parsing", entries, SOURCE)
    pairs = base.pair_files(images, masks, ".jpg", ".mat")[:limit]
    order = np.random.RandomState(0).permutation(len(pairs))  # scikit-learn's generator
    held_out = -(-len(pairs) // 5)
    chosen = order[held_out:] if split == "train" else order[:held_out]
    return base.SegmentationDataset([pairs[i] for i in chosen], CLOTHING_LABELS, read_clothing_mask)
