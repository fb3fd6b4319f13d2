import numpy as np
import pytest
import scipy.ndimage
import torch
from scored import NUM_CLASSES, blocks_of, updated
from torch import Tensor

from seg_torch.errors import InputError
from seg_torch.metrics import BoundaryScores


def blobs(seed: int, size: tuple[int, int] = (40, 56)) -> tuple[Tensor, Tensor]:
    """Maps with regions of some pixels across: prediction and labels, some of them ignored."""
    rng = np.random.default_rng(seed)
    maps = scipy.ndimage.gaussian_filter(rng.normal(size=(NUM_CLASSES, *size)), (0, 4, 4))
    other = scipy.ndimage.gaussian_filter(rng.normal(size=(NUM_CLASSES, *size)), (0, 4, 4))
    target = maps.argmax(0)
    prediction = (maps + 0.6 * other).argmax(0)
    hole = scipy.ndimage.gaussian_filter(rng.normal(size=size), 3)
    target[hole > np.quantile(hole, 0.85)] = 255
    return torch.from_numpy(prediction).byte(), torch.from_numpy(target).byte()


def boundary_reference(images: list, width: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Both scores by SciPy's erosions and distances, class by class."""
    sums = np.zeros((6, NUM_CLASSES))
    square = np.ones((3, 3))
    for prediction, target in images:
        ignored = target.numpy() == 255
        reach = width or max(1, round(0.02 * np.hypot(*target.shape)))
        for c in range(NUM_CLASSES):
            bands, lines = [], []
            for ids in (target.numpy(), prediction.numpy()):
                region = ids == c
                eroded = scipy.ndimage.binary_erosion(region | ignored, square, reach)
                bands.append(region & ~ignored & ~eroded)
                inner = scipy.ndimage.binary_erosion(region | ignored, square, border_value=1)
                lines.append(region & ~ignored & ~inner)
            far = np.full(target.shape, 10**6)
            near = [
                (scipy.ndimage.distance_transform_cdt(~line, "chessboard") if line.any() else far)
                <= reach
                for line in lines
            ]
            sums[0, c] += (bands[0] & bands[1]).sum()
            sums[1, c] += (bands[0] | bands[1]).sum()
            sums[2, c] += (lines[1] & near[0]).sum()
            sums[3, c] += lines[1].sum()
            sums[4, c] += (lines[0] & near[1]).sum()
            sums[5, c] += lines[0].sum()
    precision, recall = sums[2] / sums[3], sums[4] / sums[5]
    return sums[0] / sums[1], 2 * precision * recall / (precision + recall)


def boundary_scores_of(
    images: list, width: int | None = None, rows: int = 1000
) -> dict[str, Tensor]:
    metric = BoundaryScores(NUM_CLASSES, width)
    for prediction, target in images:
        updated(metric, blocks_of(target, prediction, rows=rows))
    return metric.compute()


@pytest.mark.parametrize(("width", "rows"), [(None, 1000), (1, 1000), (3, 7), (30, 1)])
def test_boundary_scores_are_those_of_scipys_in_whatever_parts_images_come(width, rows):
    # The first image has a diagonal of 69 pixels, thus a width of 1, the second of 144, thus 3.
    images = [blobs(0), blobs(1, (80, 120)), blobs(2)]
    iou, f = boundary_reference(images, width)
    assert 0.1 < iou.min() < iou.max() < 0.95
    found = boundary_scores_of(images, width, rows)
    np.testing.assert_allclose(found["boundary_iou"], iou, rtol=1e-12)
    np.testing.assert_allclose(found["boundary_f"], f, rtol=1e-12)


def test_boundary_scores_of_two_processes_add_up():
    images = [blobs(seed) for seed in range(3)]
    metric, other = BoundaryScores(NUM_CLASSES, 2), BoundaryScores(NUM_CLASSES, 2)
    for number, (prediction, target) in enumerate(images):
        updated(other if number else metric, blocks_of(target, prediction))
    metric.merge_state(other)
    for name, values in boundary_scores_of(images, 2).items():
        assert torch.equal(metric.compute()[name], values)


def test_an_ignored_region_makes_no_boundary_and_its_prediction_does_not_matter():
    target = torch.zeros(20, 20, dtype=torch.uint8)
    target[8:12, 8:12] = 255  # a hole in the only class
    prediction = torch.zeros_like(target)
    metric = BoundaryScores(2, 2)
    updated(metric, blocks_of(target, prediction))
    # Of the class, 2 pixels along each edge of the image are at a boundary: 20^2 - 16^2.
    assert metric.counts[0].tolist() == metric.counts[1].tolist() == [144, 0]
    assert metric.compute()["boundary_f"].isnan().all()
    other = BoundaryScores(2, 2)
    updated(other, blocks_of(target, torch.where(target == 255, 1, prediction)))
    assert torch.equal(other.counts, metric.counts)


def test_a_boundary_is_seen_across_a_band_of_ignored_pixels():
    target = torch.zeros(20, 20, dtype=torch.uint8)
    target[:, 9:11], target[:, 11:] = 255, 1
    metric = BoundaryScores(2, 3)
    updated(metric, blocks_of(target, (torch.arange(20) >= 10).byte().expand(20, 20)))
    # Within 3 of the other class: column 8 of class 0 and 11 of class 1. And 3 along each edge,
    # which leaves 14 rows, of which columns 3 to 7 and 12 to 16 are inside.
    assert metric.counts[:3].tolist() == [[20 * 9 - 14 * 5] * 2] * 3
    assert metric.counts[3:].sum() == 0
    assert metric.compute()["boundary_iou"].tolist() == [1, 1]


def test_a_missed_class_scores_zero_and_an_absent_one_nothing():
    target = torch.zeros(20, 20, dtype=torch.uint8)
    target[5:10, 5:10] = 1
    metric = BoundaryScores(3, 1)
    updated(metric, blocks_of(target, torch.zeros_like(target)))
    found = metric.compute()
    assert found["boundary_f"].tolist()[:2] == [0, 0]
    assert found["boundary_iou"][1] == 0
    assert found["boundary_iou"][2].isnan()
    assert found["boundary_f"][2].isnan()


def test_e65_labels_without_boundary_pixels_have_no_boundary_f_whatever_is_predicted():
    """As VOC's, which leave a band between the classes unlabelled."""
    target = torch.zeros(20, 20, dtype=torch.uint8)
    target[:, 8:12], target[:, 12:] = 255, 1
    prediction = torch.zeros_like(target)
    prediction[:, 15:] = 1  # a boundary where the labels have none
    metric = BoundaryScores(3, 2)
    updated(metric, blocks_of(target, prediction))
    found = metric.compute()
    assert found["boundary_f"].isnan().all()
    assert found["boundary_iou"].isnan().tolist() == [False, False, True]


@pytest.mark.parametrize("width", [0, -1, 2.5, False])
def test_an_impossible_width_is_refused(width):
    with pytest.raises(InputError, match=f"boundary={width}: expected true for 2 %"):
        BoundaryScores(3, width)
