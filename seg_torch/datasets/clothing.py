"""Clothing Co-Parsing: street photos with every garment labelled."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from seg_torch.datasets import base
from seg_torch.labels import Labels

# The names in the dataset's label_list.mat; null, the background, is a class.
NAMES = (
    "null accessories bag belt blazer blouse bodysuit boots bra bracelet cape cardigan clogs "
    "coat dress earrings flats glasses gloves hair hat heels hoodie intimate jacket jeans "
    "jumper leggings loafers necklace panties pants pumps purse ring romper sandals scarf "
    "shirt shoes shorts skin skirt sneakers socks stockings suit sunglasses sweater "
    "sweatshirt swimwear t-shirt tie tights top vest wallet watch wedges"
)
CLOTHING_LABELS = Labels(tuple(NAMES.split()))


def read_clothing_mask(path: Path) -> np.ndarray:
    """Return the variable `groundtruth` of an annotation file, uint8 [H, W]."""
    return np.ascontiguousarray(base.read_mat(path, "groundtruth"), np.uint8)


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
    folder = base.find_root(
        root,
        "Clothing Co-Parsing",
        ["photos", "annotations/pixel-level"],
        "git clone https://github.com/bearpaw/clothing-co-parsing",
    )
    pairs = base.pair_files(folder / "photos", folder / "annotations/pixel-level", ".jpg", ".mat")
    pairs = pairs[:limit]
    order = np.random.RandomState(0).permutation(len(pairs))  # scikit-learn's generator
    held_out = -(-len(pairs) // 5)
    chosen = order[held_out:] if split == "train" else order[:held_out]
    return base.SegmentationDataset([pairs[i] for i in chosen], CLOTHING_LABELS, read_clothing_mask)
