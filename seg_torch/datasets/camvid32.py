"""CamVid with all of its 32 classes, from the colours of the original labels."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from seg_torch.datasets.base import (
    SegmentationDataset,
    check_split,
    find_root,
    pair_files,
    read_colour_mask,
    val_for_test,
)
from seg_torch.datasets.folder import split_names
from seg_torch.labels import Labels

CAMVID32_CLASSES = {
    "Animal": (64, 128, 64),
    "Archway": (192, 0, 128),
    "Bicyclist": (0, 128, 192),
    "Bridge": (0, 128, 64),
    "Building": (128, 0, 0),
    "Car": (64, 0, 128),
    "CartLuggagePram": (64, 0, 192),
    "Child": (192, 128, 64),
    "Column_Pole": (192, 192, 128),
    "Fence": (64, 64, 128),
    "LaneMkgsDriv": (128, 0, 192),
    "LaneMkgsNonDriv": (192, 0, 64),
    "Misc_Text": (128, 128, 64),
    "MotorcycleScooter": (192, 0, 192),
    "OtherMoving": (128, 64, 64),
    "ParkingBlock": (64, 192, 128),
    "Pedestrian": (64, 64, 0),
    "Road": (128, 64, 128),
    "RoadShoulder": (128, 128, 192),
    "Sidewalk": (0, 0, 192),
    "SignSymbol": (192, 128, 128),
    "Sky": (128, 128, 128),
    "SUVPickupTruck": (64, 128, 192),
    "TrafficCone": (0, 0, 64),
    "TrafficLight": (0, 64, 64),
    "Train": (192, 64, 128),
    "Tree": (128, 128, 0),
    "Truck_Bus": (192, 128, 192),
    "Tunnel": (64, 0, 64),
    "VegetationMisc": (192, 192, 0),
    "Void": (0, 0, 0),
    "Wall": (64, 192, 0),
}
CAMVID32_LABELS = Labels(tuple(CAMVID32_CLASSES), np.array(list(CAMVID32_CLASSES.values())))


def camvid32(root: str | Path, split: str) -> SegmentationDataset:
    """CamVid (Brostow, Fauqueur, Cipolla, 2009), 960 x 720, 701 images, 32 classes with Void.

    `root` holds `701_StillsRaw_full/*.png` and `LabeledApproved_full/*_L.png`. The dataset
    comes without a split: put lists of names in `train.txt`, `val.txt` and `test.txt`, or a
    fixed random fifth is val and also test.

    Raises:
        InputError: an unknown split, no such dataset, or an image without its mask.
    """
    check_split(split)
    folder = find_root(
        root,
        "CamVid (32 classes)",
        ["701_StillsRaw_full", "LabeledApproved_full"],
        "http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid/, the raw stills and the "
        "labelled images",
    )
    if not (folder / "test.txt").exists():
        split = val_for_test(split, "CamVid (32 classes)")
    images, masks = folder / "701_StillsRaw_full", folder / "LabeledApproved_full"
    pairs = {pair.name: pair for pair in pair_files(images, masks, ".png", "_L.png")}
    chosen = split_names(folder, list(pairs), split)
    read_mask = partial(read_colour_mask, palette=CAMVID32_LABELS.palette)
    return SegmentationDataset([pairs[n] for n in chosen], CAMVID32_LABELS, read_mask)
