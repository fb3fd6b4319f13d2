"""The connected regions of a mask: how large they are, and where; and its outlines."""

import numpy as np

from seg_torch.labels import IGNORE_INDEX

MOST = 64  # regions of one class in one mask
MOST_RUNS = 1 << 18  # no mask of up to 512 x 512 pixels has more


def regions(mask: np.ndarray) -> np.ndarray:
    """Return the connected regions of a mask: pixels of one class that touch, also at a corner.

    What is joined are runs, the pixels of one class side by side in a row, of all classes at once:
    a photo's mask has a hundredth as many of them as pixels. A mask of more than `MOST_RUNS` of
    them, which is large and ragged, is measured on every second pixel of every second row.

    Args:
        mask: Classes, uint8 [H, W]; pixels of 255 are in no region.

    Returns:
        Class, number of pixels, top, left, height and width of each region, int32 [R, 6], by class
        and then by size. Of more than `MOST` regions of a class that many, evenly spaced in the
        order of their sizes, the smallest and the largest among them.
    """
    starts = np.ones(mask.shape, bool)
    np.not_equal(mask[:, 1:], mask[:, :-1], out=starts[:, 1:])
    first = np.flatnonzero(starts)  # pixel of each run, counted through the whole mask
    if len(first) > MOST_RUNS:
        found = regions(mask[::2, ::2]) * np.array([1, 4, 2, 2, 2, 2], np.int32)
        found[:, 4:] = np.minimum(found[:, 4:], np.array(mask.shape) - found[:, 2:4])
        return found
    last, classes = np.append(first, mask.size)[1:] - 1, mask.reshape(-1)[first]
    labelled = classes != IGNORE_INDEX
    first, last, classes = first[labelled], last[labelled], classes[labelled]
    if not len(first):
        return np.zeros((0, 6), np.int32)
    width = mask.shape[1]
    rows, lefts = np.divmod(first, width)
    rights = last - rows * width
    # Those that a run touches in the row below, also with the corner of a pixel.
    begin = np.searchsorted(last, first + width - (lefts > 0))
    end = np.searchsorted(first, last + width + (rights < width - 1), "right")
    region = _joined(begin, end, classes)
    order = np.argsort(region, kind="stable")
    rows, lefts, rights, region = rows[order], lefts[order], rights[order], region[order]
    begins = np.flatnonzero(np.append(True, region[1:] != region[:-1]))
    pixels = np.add.reduceat(rights - lefts + 1, begins)
    top, left = rows[begins], np.minimum.reduceat(lefts, begins)
    bottom, right = (np.maximum.reduceat(ends, begins) + 1 for ends in (rows, rights))
    found = np.stack([classes[order][begins], pixels, top, left, bottom - top, right - left], 1)
    found = found[np.lexsort((pixels, found[:, 0]))].astype(np.int32)
    return np.concatenate([_some(found[found[:, 0] == k]) for k in np.unique(found[:, 0])])


def _joined(begin: np.ndarray, end: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return for each run the first run of its region, int64 [runs].

    Args:
        begin: The first run that a run touches in the row below, int64 [runs].
        end: One after the last, int64 [runs].
        classes: Of each run, uint8 [runs].
    """
    count = end - begin
    above = np.repeat(np.arange(len(count)), count)
    below = np.arange(len(above)) + np.repeat(begin - (np.cumsum(count) - count), count)
    same = classes[above] == classes[below]
    above, below = above[same], below[same]
    region = np.arange(len(count))
    while len(above):
        a, b = region[above], region[below]
        np.minimum.at(region, np.maximum(a, b), np.minimum(a, b))
        while (region[region] != region).any():
            region = region[region]
        apart = region[above] != region[below]
        above, below = above[apart], below[apart]
    return region


def _some(found: np.ndarray) -> np.ndarray:
    """Return `MOST` of the regions of one class, evenly spaced, or all of fewer."""
    return found[np.linspace(0, len(found) - 1, min(MOST, len(found))).round().astype(int)]


def outlines(mask: np.ndarray) -> np.ndarray:
    """Return the length of the outlines of each class: sides of its pixels next to other classes.

    Args:
        mask: Classes, uint8 [H, W]; sides next to pixels of 255 do not count.

    Returns:
        int64 [256].
    """
    sides = np.zeros(256, np.int64)
    for one, other in ((mask[:, 1:], mask[:, :-1]), (mask[1:], mask[:-1])):
        border = one != other
        pair = np.stack([one[border], other[border]])
        sides += np.bincount(pair[:, (pair != IGNORE_INDEX).all(0)].ravel(), minlength=256)
    return sides
