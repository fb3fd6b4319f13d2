"""CamVid with all of its 32 classes, from the colours of the original labels."""

import re
from functools import partial
from pathlib import Path

from seg_torch.datasets import base
from seg_torch.datasets.layout import read_split_lists
from seg_torch.errors import InputError

CAMVID32_LABELS = base.published_labels("camvid32")
SOURCE = (
    "http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid/, the raw stills and their labels"
)


def standard_split(name: str) -> str:
    """Return the split of a frame in the lists that SegNet and later work use.

    Badrinarayanan, Kendall, Cipolla (TPAMI 2017) evaluate on 367 train, 101 val and 233 test
    frames. The splits are stretches of video, so that neighbouring frames are never in two splits
    but where a stretch ends.

    Args:
        name: A frame such as "0001TP_006690" or "Seq05VD_f00000".

    Returns:
        "train", "val" or "test".

    Raises:
        InputError: The name is no frame of the four sequences.
    """
    match = re.fullmatch(r"(0001TP|0006R0|0016E5|Seq05VD)_f?(\d+)", name)
    if match is None:
        raise InputError(
            f"{name} is no frame of CamVid, so the standard split does not cover it; give "
            "train.txt, val.txt and test.txt"
        )
    sequence, frame = match[1], int(match[2])
    if sequence == "Seq05VD" or (sequence == "0001TP" and frame > 8520):
        return "test"
    return "val" if sequence == "0016E5" and 7959 <= frame <= 8159 else "train"


def camvid32(root: str | Path, split: str) -> base.SegmentationDataset:
    """Return CamVid (Brostow, Fauqueur, Cipolla, 2009), 960 x 720, with all 32 classes.

    367 train, 101 val, 233 test; Void is a class.

    `root` holds `701_StillsRaw_full/*.png` and `LabeledApproved_full/*_L.png`. The split is the
    standard one (see `standard_split`) unless `train.txt` and `val.txt` list the names of
    another; `test.txt` is optional then, without it the test split is val.

    Args:
        root: The dataset's folder.
        split: "train", "val" or "test".

    Returns:
        The samples of the split.

    Raises:
        InputError: The split is unknown, there is no such dataset, a mask has no image, or a name
            is no frame of CamVid.
    """
    entries = ["701_StillsRaw_full", "LabeledApproved_full"]
    images, masks = base.find(root, "CamVid (32 classes)", entries, SOURCE)
    folder = images.parent
    pairs = {pair.name: pair for pair in base.pair_files(images, masks, ".png", "_L.png")}
    lists = read_split_lists(folder, list(pairs))
    split = base.val_for_test(split, "CamVid (32 classes)", not lists or "test" in lists)
    if lists and split not in lists:
        raise InputError(f"{folder / split}.txt is missing: give train.txt and val.txt, or neither")
    chosen = lists.get(split) or [name for name in pairs if standard_split(name) == split]
    read_mask = partial(base.read_colour_mask, palette=CAMVID32_LABELS.palette)
    return base.SegmentationDataset([pairs[name] for name in chosen], CAMVID32_LABELS, read_mask)
