"""Rare classes: which regions of the training masks are drawn, and how often each class is seen.

Half of the draws of an epoch take every image equally often, as without them. Each of the others
aims at a class, the likelier the fewer pixels it has, then at an image that holds it and at a
region of it. A class is drawn in proportion to the square root of its rarity, as images are in
LVIS (Gupta et al. 2019), first the class and then an image that holds it, as in DAFormer (Hoyer et
al. 2022).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from seg_torch.data.check import DatasetStatistics

TIMES = 4  # an epoch draws an image of a class, aiming at that; LVIS' largest factor is about 8


class Regions(NamedTuple):
    """Connected regions of the training masks, each with the chance that a draw takes it.

    Attributes:
        table: Image, class, number of pixels, top, left, height and width, int32 [R, 7], by image.
        chances: Of each region, float64 [R]; they add up to 1.
        sizes: Height and width of each image's mask, which the table is about, int64 [N, 2].
        shares: Of the labelled pixels, for each value of a mask, float64 [256]; -1 for 255.
    """

    table: np.ndarray
    chances: np.ndarray
    sizes: np.ndarray
    shares: np.ndarray

    def box(self, row: int, shape: tuple[int, int]) -> tuple[int, int, int, int, int]:
        """Return class, top, left, height and width of a region in its mask, resized to a shape."""
        image, kind, _, *place = self.table[row].tolist()
        stored = self.sizes[image].tolist()
        box = []
        for start, length, old, new in zip(place[:2], place[2:], stored, shape, strict=True):
            first = start * new // old
            box.append((first, -(-(start + length) * new // old) - first))
        (top, height), (left, width) = box
        return kind, top, left, height, width


def regions_of(found: DatasetStatistics) -> Regions:
    """Return the regions of the training masks, with the chances of draws that aim at a class."""
    table = found.regions[np.argsort(found.regions[:, 0], kind="stable")]
    shares = np.append(found.pixels[:255] / max(1, found.pixels[:255].sum()), -1.0)
    chances = region_chances(table, shares, len(found.sizes))
    return Regions(table, chances, found.sizes, shares)


def region_chances(table: np.ndarray, shares: np.ndarray, length: int) -> np.ndarray:
    """Return the chance of each region: of its class, of the image then, of the region then.

    Args:
        table: The regions, int32 [R, 7], see `Regions`.
        shares: Of the pixels, float64 [256]. A class is drawn in proportion to 1 / sqrt(share), but
            not so often that its images come more than `TIMES` times in an epoch, before what that
            leaves goes to all classes; of the images that hold it each is as likely; and its
            regions there are drawn in proportion to the square root of their pixels: most are
            specks, most of its pixels in a few.
        length: Number of images.

    Returns:
        float64 [R], of sum 1.
    """
    pairs, pair = np.unique(table[:, :2], axis=0, return_inverse=True)
    pair = pair.reshape(-1)
    classes, kind, images = np.unique(pairs[:, 1], return_inverse=True, return_counts=True)
    of_class = 1 / np.sqrt(shares[classes])
    of_class = np.minimum(of_class / of_class.sum(), 2 * TIMES * images / length)
    of_pair = (of_class / of_class.sum() / images)[kind]
    sides = np.sqrt(table[:, 2])
    return of_pair[pair] * sides / np.bincount(pair, sides)[pair]


def rare_classes(shares: np.ndarray) -> list[int]:
    """Return the classes with less than half the pixels that they had if all had as many."""
    present = np.flatnonzero(shares > 0)
    return [int(k) for k in present if shares[k] < 0.5 / len(present)]


def to_paste(regions: Regions) -> Regions:
    """Return the regions of rare classes whose boxes take at most half of their image."""
    area = regions.sizes[regions.table[:, 0]].prod(axis=1)
    small = regions.table[:, 5].astype(np.int64) * regions.table[:, 6] * 2 <= area
    chosen = small & np.isin(regions.table[:, 1], rare_classes(regions.shares))
    chances = regions.chances[chosen]
    return regions._replace(table=regions.table[chosen], chances=chances / chances.sum())


def exposures(regions: Regions, draws: int, aimed: int) -> tuple[np.ndarray, ...]:
    """Return in how many draws, on average, an image is drawn that holds a class.

    Args:
        regions: Of the training masks.
        draws: All of them.
        aimed: Those that aim at a class; the others take every image equally often.

    Returns:
        By class, float64 [256]: where no draw aims at a class; where these do; and how many of them
        aim at this one.
    """
    pairs = np.unique(regions.table[:, :2], axis=0)
    image, kind = pairs.T
    usual = np.bincount(kind, minlength=256) / len(regions.sizes)
    of_image = np.bincount(regions.table[:, 0], regions.chances, len(regions.sizes))
    aiming = np.bincount(kind, of_image[image], 256)
    at_it = np.bincount(regions.table[:, 1], regions.chances, 256)
    return draws * usual, (draws - aimed) * usual + aimed * aiming, aimed * at_it
