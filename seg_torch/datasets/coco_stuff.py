"""COCO-Stuff 164k: things and stuff, 171 classes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from seg_torch.datasets import base
from seg_torch.labels import IGNORE_INDEX, Labels

# COCO numbered its things 1 to 91 and labelled 80 of them; these it dropped.
UNUSED_CATEGORIES = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
CATEGORIES = [i for i in range(1, 183) if i not in UNUSED_CATEGORIES]

NAMES = (
    # things
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, "
    "fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, "
    "elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, "
    "skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, "
    "apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, "
    "couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard, "
    "cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, "
    "scissors, teddy bear, hair drier, toothbrush, "
    # stuff
    "banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard, "
    "carpet, ceiling-other, ceiling-tile, cloth, clothes, clouds, counter, cupboard, "
    "curtain, desk-stuff, dirt, door-stuff, fence, floor-marble, floor-other, "
    "floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit, "
    "furniture-other, grass, gravel, ground-other, hill, house, leaves, light, mat, "
    "metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow, "
    "plant-other, plastic, platform, playingfield, railing, railroad, river, road, rock, "
    "roof, rug, salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other, "
    "stairs, stone, straw, structural-other, table, tent, textile-other, towel, tree, "
    "vegetable, wall-brick, wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, "
    "wall-wood, water-other, waterdrops, window-blind, window-other, wood"
)
COCO_STUFF_LABELS = Labels(tuple(NAMES.split(", ")))

# A pixel holds its category less one.
IDS = base.id_table(
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
    folder = base.find_root(
        root,
        "COCO-Stuff",
        [f"images/{split}2017", f"{maps}/{split}2017"],
        f"https://images.cocodataset.org/zips/{split}2017.zip, unpacked in images, and "
        "stuffthingmaps_trainval2017.zip from https://github.com/nightrome/cocostuff, unpacked in "
        "stuffthingmaps",
    )
    pairs = base.pair_files(folder / f"images/{split}2017", folder / f"{maps}/{split}2017")
    return base.SegmentationDataset(
        pairs, COCO_STUFF_LABELS, partial(base.read_mapped_mask, table=IDS)
    )
