"""PASCAL VOC, and its usual training set enlarged by SBD."""

import random
from pathlib import Path

import numpy as np
from torchvision.datasets import VOCSegmentation

from seg_torch.datasets import base
from seg_torch.datasets.published.matlab import read_mat_mask
from seg_torch.errors import check_choice

VOC_LABELS = base.published_labels("voc")

SBD_SOURCE = (
    "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/"
    "benchmark.tgz, unpacked there"
)

YEARS = ("2007", "2008", "2009", "2010", "2011", "2012")


def voc(
    root: str | Path,
    split: str,
    year: str = "2012",
    download: bool = False,
    halve_val: bool = False,
) -> base.SegmentationDataset:
    """Return PASCAL VOC segmentation (Everingham et al., IJCV 2015), 21 classes.

    2012 has 1,464 train and 1,449 val images.

    `root` holds `VOCdevkit/VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation}`. The
    masks are palette PNGs whose indices are the classes; 255 is the rim around objects. Only 2007
    has public test labels; in the other years the test split is val.

    Args:
        root: The folder that holds `VOCdevkit` (for 2011: `TrainVal/VOCdevkit`, as its archive
            unpacks).
        split: "train", "val" or "test".
        year: "2007" to "2012".
        download: Fetch it (2012: 2 GB) into `root` where it is missing.
        halve_val: Make a test set out of val: its list is shuffled by Python's
            `random.Random(42)`; the first half, rounded down, is val, the second test.

    Returns:
        The samples of the split.

    Raises:
        InputError: The split or year is unknown, there is no such dataset, or the download failed.
    """
    year = str(year)  # data.year=2012 on the command line is a number
    check_choice("data.dataset.year", year, YEARS)
    devkit = f"{'TrainVal/' if year == '2011' else ''}VOCdevkit/VOC{year}"
    lists = f"{devkit}/ImageSets/Segmentation"
    split = base.val_for_test(split, f"VOC {year}", year == "2007" or halve_val)
    listing = "val" if halve_val and split == "test" else split
    if download and not (Path(root).expanduser() / lists / f"{listing}.txt").exists():
        with base.downloading(f"VOC {year}", root):
            VOCSegmentation(Path(root).expanduser(), year, listing, download=True)
    entries = [f"{devkit}/JPEGImages", f"{devkit}/SegmentationClass", f"{lists}/{listing}.txt"]
    source = f"data.download=true, or http://host.robots.ox.ac.uk/pascal/VOC/voc{year}/"
    images, masks, listed = base.find(root, f"PASCAL VOC {year}", entries, source)
    names = base.read_list(listed)
    if halve_val and split != "train":
        random.Random(42).shuffle(names)
        half = len(names) // 2
        names = names[:half] if split == "val" else names[half:]
    return base.SegmentationDataset(base.pair_files(images, masks, names=names), VOC_LABELS)


def read_voc_or_sbd_mask(path: Path) -> np.ndarray:
    """Return a VOC mask (PNG) or an SBD mask (MATLAB), uint8 [H, W]."""
    if path.suffix == ".png":
        return base.read_index_mask(path)
    return read_mat_mask(path, "GTcls", "Segmentation")


def voc_sbd(root: str | Path, split: str) -> base.SegmentationDataset:
    """Return VOC 2012 with the training images of SBD (Hariharan et al., ICCV 2011).

    10,582 train, 1,449 val.

    The training set known as "trainaug": every image of VOC train, SBD train and SBD val that is
    not in VOC val. Where VOC has a mask of its own for a training image, that one is taken. Val
    and test are VOC val.

    `root` holds `VOCdevkit/VOC2012` and SBD, either as its archive unpacks
    (`benchmark_RELEASE/dataset/{img,cls,train.txt,val.txt}`) or as torchvision's SBDataset leaves
    it (`{img,cls,train.txt,val.txt}`).

    Args:
        root: The folder that holds both.
        split: "train", "val" or "test".

    Returns:
        The samples of the split.

    Raises:
        InputError: The split is unknown, or one of the two datasets is missing.
    """
    if split != "train":
        return voc(root, split)
    folder = Path(root).expanduser()
    bare = (folder / "cls").exists() and not (folder / "benchmark_RELEASE").exists()
    dataset = "" if bare else "benchmark_RELEASE/dataset/"
    entries = [dataset + entry for entry in ("img", "cls", "train.txt", "val.txt")]
    images, masks, *lists = base.find(root, "SBD", entries, SBD_SOURCE)
    train, val = voc(root, "train").pairs, {pair.name for pair in voc(root, "val").pairs}
    listed = {name for path in lists for name in base.read_list(path)}
    names = sorted(listed - val - {pair.name for pair in train})
    added = base.pair_files(images, masks, ".jpg", ".mat", names)
    return base.SegmentationDataset(train + added, VOC_LABELS, read_voc_or_sbd_mask)
