"""The connected regions of masks."""

import numpy as np
import pytest
from scipy import ndimage

from seg_torch.data import regions as module
from seg_torch.data.regions import outlines, regions


def scipys(mask):
    """All regions as scipy finds them in one class after the other, in some order."""
    found = [np.zeros((0, 6), int)]
    for value in set(np.unique(mask)) - {255}:
        labelled, count = ndimage.label(mask == value, np.ones((3, 3)))
        pixels = ndimage.sum_labels(mask == value, labelled, range(1, count + 1))
        for area, (rows, columns) in zip(pixels, ndimage.find_objects(labelled), strict=True):
            size = rows.stop - rows.start, columns.stop - columns.start
            found.append(np.array([[value, area, rows.start, columns.start, *size]], int))
    return np.concatenate(found)


def in_order(found):
    return found[np.lexsort(found.T)].tolist()


def spiral(size):
    """One line that winds to the middle, with another one beside it."""
    mask = np.full((size, size), 9, np.uint8)
    (row, column), (down, right) = (0, 0), (0, 1)
    for turn in range(size - 1):
        for _ in range(size - 1 - 2 * (turn // 2)):
            mask[row, column] = 3
            row, column = row + down, column + right
        down, right = right, -down
    return mask


def noise(shape, values):
    return np.random.default_rng(0).choice(np.array(values, np.uint8), shape)


@pytest.mark.parametrize(
    "mask",
    [
        noise((1, 1), [4]),
        noise((1, 1), [255]),
        noise((8, 6), [255]),
        noise((0, 0), [0]),
        noise((0, 5), [0]),
        noise((1, 60), [0, 1, 255]),
        noise((60, 1), [0, 1, 255]),
        noise((2, 2), [0, 1]),
        noise((37, 61), [0, 1]),
        noise((61, 37), [0, 7, 254, 255]),
        noise((64, 64), range(20)),
        noise((9, 13), [0, 1, 2, 255]).repeat(5, 0).repeat(3, 1),
        np.eye(20, dtype=np.uint8)[::-1],
        np.indices((16, 16)).sum(0).astype(np.uint8) % 2,
        spiral(41),
        spiral(41)[:, ::-1].T,
    ],
    ids=lambda mask: f"{mask.shape}",
)
def test_regions_are_scipys(mask, monkeypatch):
    monkeypatch.setattr(module, "MOST", 10**6)
    before, found = mask.copy(), regions(mask)
    assert in_order(found) == in_order(scipys(mask))
    assert found.dtype == np.int32
    assert found[:, :2].tolist() == sorted(found[:, :2].tolist())  # by class, then by size
    assert (mask == before).all()


def test_of_many_regions_of_a_class_some_of_all_sizes_are_told():
    mask = np.zeros((256, 256), np.uint8)
    for i in range(100):  # lines of 1 to 100 pixels
        mask[2 * i + 1, : i + 1] = 1
    mask[250, 200:203] = mask[252, 200:205] = 2
    found = regions(mask)
    ranks = [round(i * 99 / 63) for i in range(64)]
    assert found[found[:, 0] == 1][:, 1].tolist() == [rank + 1 for rank in ranks]
    assert found[found[:, 0] == 2].tolist() == [[2, 3, 250, 200, 1, 3], [2, 5, 252, 200, 1, 5]]
    assert found[found[:, 0] == 0][:, 1:].tolist() == [[256 * 256 - 5050 - 8, 0, 0, 256, 256]]


def test_a_large_ragged_mask_is_measured_on_every_second_pixel(monkeypatch):
    monkeypatch.setattr(module, "MOST_RUNS", 3000)
    mask = noise((101, 151), [8, 9])
    mask[10:60, 20:80] = 1
    mask[90:, 120:] = 2  # to the corner, whose sides are odd
    found = regions(mask)
    assert found[found[:, 0] == 1].tolist() == [[1, 50 * 60, 10, 20, 50, 60]]
    assert found[found[:, 0] == 2].tolist() == [[2, 6 * 16 * 4, 90, 120, 11, 31]]
    assert (found[:, 2:4] + found[:, 4:] <= mask.shape).all()
    monkeypatch.setattr(module, "MOST_RUNS", 10**6)
    assert [1, 50 * 60, 10, 20, 50, 60] in regions(mask).tolist()
    assert [2, 11 * 31, 90, 120, 11, 31] in regions(mask).tolist()


def test_outlines_are_the_sides_between_classes():
    # A square of 3 x 3 inside of another class has 12 sides; what touches 255 has none there.
    mask = np.zeros((7, 7), np.uint8)
    mask[1:4, 1:4] = 1
    found = outlines(mask)
    assert (found[0], found[1], found[2:].sum()) == (12, 12, 0)
    mask[0] = 255
    assert outlines(mask)[:2].tolist() == [9, 9]
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 4, (9, 11)).astype(np.uint8)
    mask[mask == 3] = 255
    expected = np.zeros(256, np.int64)
    for y, x in np.ndindex(mask.shape):
        for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)):
            if 0 <= y + dy < 9 and 0 <= x + dx < 11:
                pair = {int(mask[y, x]), int(mask[y + dy, x + dx])}
                expected[mask[y, x]] += len(pair) == 2 and 255 not in pair
    np.testing.assert_array_equal(outlines(mask), expected)
