"""ADE20K in the form of the scene parsing challenge, 150 classes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from seg_torch.datasets import base
from seg_torch.labels import IGNORE_INDEX, Labels

# The first name of each line in the challenge's objectInfo150.txt, most frequent class first.
NAMES = (
    "wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, "
    "sidewalk, person, earth, door, table, mountain, plant, curtain, chair, car, water, "
    "painting, sofa, shelf, house, sea, mirror, rug, field, armchair, seat, fence, desk, "
    "rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, "
    "chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, "
    "grandstand, path, stairs, runway, case, pool table, pillow, screen door, stairway, "
    "river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, "
    "countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, "
    "arcade machine, hovel, bus, towel, light, truck, tower, chandelier, awning, "
    "streetlight, booth, television, airplane, dirt track, apparel, pole, land, "
    "bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, "
    "conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, "
    "waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name, "
    "microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, "
    "sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, "
    "bulletin board, shower, radiator, glass, clock, flag"
)
ADE20K_LABELS = Labels(tuple(NAMES.split(", ")))

IDS = base.id_table({0: IGNORE_INDEX} | {i + 1: i for i in range(150)})


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
    folder = base.find_root(
        root,
        "ADE20K (SceneParsing)",
        [f"ADEChallengeData2016/{kind}/{part}" for kind in ("images", "annotations")],
        "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
    )
    folder = folder / "ADEChallengeData2016"
    pairs = base.pair_files(folder / "images" / part, folder / "annotations" / part)
    return base.SegmentationDataset(pairs, ADE20K_LABELS, partial(base.read_mapped_mask, table=IDS))
