"""ADE20K in the form of the scene parsing challenge, 150 classes."""

from pathlib import Path

from seg_torch.datasets import base
from seg_torch.labels import IGNORE_INDEX

ADE20K_LABELS = base.published_labels("ade20k")
SOURCE = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"

read_mask = base.mapped_masks({0: IGNORE_INDEX} | {i + 1: i for i in range(150)})


def ade20k(root: str | Path, split: str) -> base.SegmentationDataset:
    """Return ADE20K (Zhou et al., CVPR 2017), SceneParsing: 20,210 train, 2,000 val, 150 classes.

    `root/ADEChallengeData2016` holds `images/{training,validation}/*.jpg` and
    `annotations/{training,validation}/*.png`, where 0 is "other" and becomes 255, and 1 to 150
    become 0 to 149. The test split is val.

    Args:
        root: The dataset's folder.
        split: "train", "val" or "test".

    Returns:
        The samples of the split.

    Raises:
        InputError: The split is unknown, there is no such dataset, or a mask has no image.
    """
    split = base.val_for_test(split, "ADE20K")
    part = "training" if split == "train" else "validation"
    entries = [f"ADEChallengeData2016/{kind}/{part}" for kind in ("images", "annotations")]
    images, masks = base.find(root, "ADE20K (SceneParsing)", entries, SOURCE)
    pairs = base.pair_files(images, masks)
    return base.SegmentationDataset(pairs, ADE20K_LABELS, read_mask)
