"""COCO-Stuff 164k: things and stuff, 171 classes."""

from pathlib import Path

from seg_torch.datasets import base
from seg_torch.labels import IGNORE_INDEX

# COCO numbered its things 1 to 91 and labelled 80 of them; these it dropped.
UNUSED_CATEGORIES = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
CATEGORIES = [i for i in range(1, 183) if i not in UNUSED_CATEGORIES]

COCO_STUFF_LABELS = base.published_labels("coco_stuff")

# A pixel holds its category less one.
read_mask = base.mapped_masks(
    {category - 1: i for i, category in enumerate(CATEGORIES)} | {255: IGNORE_INDEX}
)


def coco_stuff(root: str | Path, split: str) -> base.SegmentationDataset:
    """Return COCO-Stuff (Caesar, Uijlings, Ferrari, CVPR 2018): 171 classes.

    118,287 train, 5,000 val.

    `root` holds `images/{train2017,val2017}/*.jpg` and the pixel maps
    `stuffthingmaps/{train2017,val2017}/*.png` (or `annotations/...`). The test split is val.

    Args:
        root: The dataset's folder.
        split: "train", "val" or "test".

    Returns:
        The samples of the split.

    Raises:
        InputError: The split is unknown, there is no such dataset, or a mask has no image.
    """
    split = base.val_for_test(split, "COCO-Stuff")
    maps = "stuffthingmaps"
    if (Path(root).expanduser() / f"annotations/{split}2017").is_dir():
        maps = "annotations"
    source = (
        f"https://images.cocodataset.org/zips/{split}2017.zip, unpacked in images, and "
        "stuffthingmaps_trainval2017.zip from https://github.com/nightrome/cocostuff, unpacked in "
        "stuffthingmaps"
    )
    entries = [f"images/{split}2017", f"{maps}/{split}2017"]
    images, masks = base.find(root, "COCO-Stuff", entries, source)
    pairs = base.pair_files(images, masks)
    return base.SegmentationDataset(pairs, COCO_STUFF_LABELS, read_mask)
